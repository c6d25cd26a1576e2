"""A context as a change of weights: what the theorem says, and what it leaves out in a Llama.

    python examples/implicit_dynamics.py

Dherin et al. 2025 (arXiv 2507.16003, Theorem 2.2): let A(C, x) be what a linear W reads at the query token x behind
the context C, and A(x) what it reads without C. Then with ΔW = W (A(C, x) − A(x)) A(x)ᵀ / ‖A(x)‖² the linear gives
without the context what it gave with it. This script checks that, asks how far it carries in a whole model, and ends
with what a Llama's block needs: `fw.context_patch`.
"""

import torch

import fastweights as fw

CONTEXT = "The capital of Malaysia is Kuala Lumpur. The capital of USA is Washington D.C. The capital of Germany is"
QUERY = " Berlin"
SITES = ["mlp_norm", "gate", "up", "mlp_out", "resid_post", "logits"]

SUMMARY = """
The algebra of one linear is exact, and so is the MLP's output. The block is not: the residual stream beside
the MLP still lacks what attention took from the context, and no change of gate and up can give it back,
because nothing of it goes through them. A third rank-1 event, at down_proj, can: it adds what the stream lacks.
Layer by layer on the stream already patched, three events are the whole context, for this one token.
A token that sees itself alone is an extreme case as well: models park their attention on the first token, and
a token without any other becomes such a first token, with a stream far longer than any that follows. The
change belongs to this token: that it would serve others is not what the theorem claims."""


def relative(x, y):
    return float((x - y).norm() / y.norm())


def without_context(query, kept=()):
    """An edit: the query token attends to itself and to the kept positions alone, and stays where it is."""

    def change(scores, at):
        key = torch.arange(scores.shape[-1])
        seen = (key == at.positions[:, None, :, None]) | torch.isin(key, torch.tensor(kept, dtype=key.dtype))
        return scores.masked_fill(~seen, -torch.inf)

    return fw.Edit("scores", change, positions=query)


def main(layer=5):
    model, tokenizer = fw.load()
    episode = fw.Episode(model)
    ids = tokenizer.encode(CONTEXT + QUERY)
    query, depth = len(ids) - 1, model.config.num_hidden_layers

    def run(*edits):
        return episode.probe(ids, sites=SITES, edits=edits, positions=[query])

    def says(trace):
        return tokenizer.tokens([int(trace.logits[0, 0].argmax())])[0]

    informed, bare = run(), run(without_context(query))
    by_itself = episode.probe([ids[-1:]], sites="resid_post")
    position = relative(by_itself["resid_post"], bare["resid_post"])
    print(
        f"the query {QUERY!r} at position {query}, its attention to the context cut, is the query alone at position 0"
    )
    print(f"to {position:.0e}: rope turns q and k alike, so a token that attends to itself does not know its place")

    a_context, a = (trace["mlp_norm", layer][0, 0].double() for trace in (informed, bare))
    print(f"\nthe theorem, at the two linears of layer {layer} that read A (float64)")
    algebra = {}
    for name in ("gate_proj", "up_proj"):
        W = model.get_submodule(f"model.layers.{layer}.mlp.{name}").weight.detach().double()
        delta = torch.outer(W @ (a_context - a), a) / a.norm() ** 2
        algebra[name] = relative((W + delta) @ a, W @ a_context)
        print(f"  {name:9}  ‖ΔW‖ / ‖W‖ = {float(delta.norm() / W.norm()):.2f}   relative error {algebra[name]:.0e}")

    # At this one token the rank-1 change gives exactly W A(C, x): to patch `gate` and `up` is to apply it.
    print("\nthe same in the model: gate and up give what they gave with the context; relative error of what")
    print(
        f"layer {layer}'s MLP adds, of the stream behind it, of the stream at the end of the model, and of the logits"
    )
    print(f"{'the query sees':24}{'patched':10}{'MLP out':>9}{'stream':>9}{'at end':>9}{'logits':>9}   next token")
    errors = {}
    for seen, kept in (("itself", ()), ("itself and token 0", (0,))):
        for patched, layers in (("nothing", []), (f"layer {layer}", [layer]), ("all", list(range(depth)))):
            patches = [fw.patch(site, informed, layers=layers, positions=query) for site in ("gate", "up") if layers]
            trace = run(without_context(query, kept), *patches)
            at = (("mlp_out", layer), ("resid_post", layer), ("resid_post", depth - 1))
            error = [relative(trace[site, l], informed[site, l]) for site, l in at]
            error.append(relative(trace.logits, informed.logits))
            errors[seen, patched] = error
            print(f"{seen:24}{patched:10}" + "".join(f"{e:9.2f}" for e in error) + f"   {says(trace)!r}")
    print(
        f"{'everything (the truth)':24}{'nothing':10}"
        + "".join(f"{0:9.2f}" for _ in range(4))
        + f"   {says(informed)!r}"
    )

    # The events of `context_patch` are computed in order, each on the stream that the ones before it have patched.
    patch = fw.context_patch(model, ids[:query], ids[query:])
    print(f"\nthree events in every layer: {len(patch.norms)} for this token, none larger than", end=" ")
    print(f"{max(float(norm) for norm in patch.norms.values()):.1%} of its W; relative error of the logits")
    linears = ("gate_proj", "up_proj", "down_proj")
    events = {}
    for kept in ((), linears[:1], linears[:2], linears[2:], linears):
        logits = patch.replay(lambda token, address, kept=kept: address[1] in kept)
        events[kept] = relative(logits[-1], patch.reference_logits)
        choice = tokenizer.tokens([int(logits[-1].argmax())])[0]
        print(f"  {', '.join(kept) or 'none':32}{events[kept]:9.0e}   {choice!r}")
    logits = patch.replay(lambda token, address: address != (layer, "up_proj"))
    without = relative(logits[-1], patch.reference_logits)
    print(f"  {f'all but up_proj of layer {layer}':32}{without:9.0e}")
    fw.detach(model)

    print(SUMMARY)
    return {"position": position, "algebra": algebra, "errors": errors, "events": events, "without": without}


if __name__ == "__main__":
    main()
