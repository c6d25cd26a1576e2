"""The twelve examples of DESIGN §7b, word for word, on the real model, against hooks on transformers' modules."""

import contextlib

import pytest
import torch

import fastweights as fw
from fastweights.sae import SAE

L, H, E = 30, 9, 64


@pytest.fixture(scope="module")
def theirs(smollm2_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.fixture
def setting(smollm2):
    """(model, tokenizer, an episode of the model as it is)."""
    model, tokenizer = smollm2
    return model, tokenizer, fw.Episode(model)


@contextlib.contextmanager
def changed(module, before=None, after=None):
    """A hook on a module of theirs: `before` changes its input, `after` its output."""
    if before is not None:
        hook = module.register_forward_pre_hook(lambda m, args: (before(args[0]), *args[1:]))
    else:
        hook = module.register_forward_hook(lambda m, args, out: after(out))
    try:
        yield
    finally:
        hook.remove()


def kept(module, ids, model, side="out"):
    """What a module of theirs gave, or got, [1, T, D]."""
    found = []
    hook = (
        module.register_forward_hook(lambda m, args, out: found.append(out))
        if side == "out"
        else module.register_forward_pre_hook(lambda m, args: found.append(args[0]))
    )
    model(torch.tensor([ids]))
    hook.remove()
    return found[0]


def close(ours, exact, tolerance=2e-4):
    torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance * float(exact.abs().max()))


def test_1_logit_lens(setting, theirs):
    model, tokenizer, episode = setting
    ids, answer = tokenizer.encode("The capital of France is"), tokenizer.encode(" Paris")[0]
    h = episode.probe(ids, sites="resid_post", positions="last").hidden_states[:, 0, -1]
    ranks = fw.rank(fw.lens(model, h), answer)  # [L+1]
    hidden = [theirs.model.embed_tokens(torch.tensor([ids]))]
    hidden += [kept(block, ids, theirs) for block in theirs.model.layers]
    logits = torch.stack([theirs.lm_head(theirs.model.norm(x))[0, -1] for x in hidden])
    close(fw.lens(model, h), logits)
    assert ranks.shape == (L + 1,)
    assert int(ranks[-1]) == int((logits[-1] > logits[-1, answer]).sum()) == 0


def mean_z(theirs, tokenizer, texts, layer):
    """[H, E] over all tokens of some texts."""
    o_proj = theirs.model.layers[layer].self_attn.o_proj
    each = [kept(o_proj, tokenizer.encode(text), theirs, "in")[0] for text in texts]
    return torch.cat(each).mean(0).view(H, E)


OTHERS = ["Rain fell on the town", "Two and two"]


def test_2_every_head_mean_ablated(setting, theirs):
    _, tokenizer, episode = setting
    exam = fw.Exam(tokenizer, ["The capital of France is"], [" Paris", " London"])
    others = [tokenizer.encode(text) for text in OTHERS]
    ref = episode.probe(others, sites="z")
    sweep = [fw.ablate("z", "mean", ref, layers=l, heads=h) for l in range(L) for h in range(H)]
    grid = episode.probe(exam, sweep=sweep).scores.difference.reshape(L, H, -1)
    assert grid.shape == (L, H, 1)
    (paris,), (london,) = exam.answer_ids[0]
    for layer, head in ((0, 0), (4, 8), (17, 2), (29, 5)):
        mean_HE = mean_z(theirs, tokenizer, OTHERS, layer)

        def before(x, head=head, mean_HE=mean_HE):
            x = x.unflatten(-1, (H, E)).clone()
            x[:, :, head] = mean_HE[head]
            return x.flatten(2)

        with changed(theirs.model.layers[layer].self_attn.o_proj, before):
            logits = theirs(torch.tensor(exam.rows)).logits[0, -1]
        assert float(grid[layer, head, 0]) == pytest.approx(float(logits[paris] - logits[london]), abs=2e-3)


def greedy(theirs, ids, count, hook):
    """What transformers writes when all of the sequence is read again for every token, under a hook."""
    ids = list(ids)
    for _ in range(count):
        with hook(len(ids)):
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_3_while_the_sequence_grows(setting, theirs):
    _, tokenizer, episode = setting
    ref = episode.probe([tokenizer.encode(text) for text in OTHERS], sites="z")
    ids = tokenizer.encode("1, 2, 3, 4,")
    steps = episode.generate(ids, 40, edits=[fw.ablate("z", "mean", ref, layers=23, heads=3)], stop_token_ids=())
    ours = [int(step.token_ids) for _, step in zip(range(6), steps, strict=False)]
    mean_HE = mean_z(theirs, tokenizer, OTHERS, 23)

    def before(x):
        x = x.unflatten(-1, (H, E)).clone()
        x[:, :, 3] = mean_HE[3]
        return x.flatten(2)

    o_proj = theirs.model.layers[23].self_attn.o_proj
    assert [*ids, *ours] == greedy(theirs, ids, 6, lambda length: changed(o_proj, before))


def test_4_steering(setting, theirs):
    _, tokenizer, episode = setting
    pos = [tokenizer.encode(text) for text in ("I love this wonderful film", "What a great day")]
    neg = [tokenizer.encode(text) for text in ("I hate this awful film", "What a terrible day it was")]
    good, bad = (
        episode.probe(p, sites="resid_post", positions="last")["resid_post", 12].mean((0, 1)) for p in (pos, neg)
    )
    ends = [torch.stack([kept(theirs.model.layers[12], ids, theirs)[0, -1] for ids in each]) for each in (pos, neg)]
    direction = ends[0].mean(0) - ends[1].mean(0)
    close(good - bad, direction, 1e-3)
    ids = tokenizer.encode("I think that it")
    steps = episode.generate(
        ids, 40, edits=[fw.steer("resid_post", good - bad, 2.0, layers=12, positions="last")], stop_token_ids=()
    )
    ours = [int(step.token_ids) for _, step in zip(range(5), steps, strict=False)]

    def hook(length):
        def after(x):  # the last token of the prompt, and all that was written
            x = x.clone()
            x[:, len(ids) - 1 : length] += 2.0 * direction
            return x

        return changed(theirs.model.layers[12], after=after)

    assert [*ids, *ours] == greedy(theirs, ids, 5, hook)


def test_5_activation_patching_and_6_attribution_patching(setting, theirs):
    _, tokenizer, episode = setting
    clean = tokenizer.encode("In Paris, in")
    corrupt_exam = fw.Exam(tokenizer, ["In Tokyo, in"], [" France", " Japan"])
    T = len(clean)
    assert len(corrupt_exam.rows[0]) == T
    src = episode.probe(clean, sites="resid_pre")
    sweep = [fw.patch("resid_pre", src, layers=l, positions=p) for l in range(L) for p in range(T)]
    grid = episode.probe(corrupt_exam, sweep=sweep).scores.difference.reshape(L, T)
    (france,), (japan,) = corrupt_exam.answer_ids[0]
    for layer, position in ((0, 1), (12, 1), (25, T - 1)):
        source = kept(theirs.model.layers[layer], clean, theirs, "in")

        def before(x, position=position, source=source):
            x = x.clone()
            x[:, position] = source[:, position]
            return x

        with changed(theirs.model.layers[layer], before):
            logits = theirs(torch.tensor(corrupt_exam.rows)).logits[0, -1]
        assert float(grid[layer, position]) == pytest.approx(float(logits[france] - logits[japan]), abs=2e-3)
    with_all = episode.probe(clean).logits[0, -1]
    assert float(grid[0, 1]) == pytest.approx(float(with_all[france] - with_all[japan]), abs=2e-3)
    # 6: the gradient, against autograd through transformers' modules
    a, b = episode.probe(clean, sites="z"), episode.probe(corrupt_exam, sites="z", gradient=True)
    attribution = ((a["z"] - b["z"]) * b.gradients["z"]).sum((-1, 2))  # [L, B, H]
    assert attribution.shape == (L, 1, H)
    found = {}

    def at(layer):
        def before(x):
            found[layer] = x.detach().requires_grad_()
            return found[layer]

        return before

    for layer in (3, 20):  # one leaf at a time: a later one would cut off the earlier
        with changed(theirs.model.layers[layer].self_attn.o_proj, at(layer)), torch.enable_grad():
            logits = theirs(torch.tensor(corrupt_exam.rows)).logits[0, -1]
            (gradient,) = torch.autograd.grad(logits[france] - logits[japan], found[layer])
        source = kept(theirs.model.layers[layer].self_attn.o_proj, clean, theirs, "in")
        exact = ((source - found[layer].detach()) * gradient).unflatten(-1, (H, E)).sum((-1, 1))
        close(attribution[layer], exact, 1e-3)


def test_7_direct_logit_attribution(setting):
    model, tokenizer, episode = setting
    ids = tokenizer.encode("The capital of France is")
    (right,), (wrong,) = tokenizer.encode(" Paris"), tokenizer.encode(" London")
    W = model.lm_head.weight
    names, parts = fw.decompose(model, episode.probe(ids, sites=["embedding", "result", "mlp_out"], positions="last"))
    each = parts[:, 0, -1] @ (W[right] - W[wrong])  # [C]; W = model.lm_head.weight
    logits = episode.probe(ids, positions="last").logits[0, 0]
    assert len(names) == len(each) == 1 + L * H + L
    assert float(each.sum()) == pytest.approx(float(logits[right] - logits[wrong]), abs=2e-3)


def test_8_successor_heads(setting):
    model, tokenizer, _ = setting
    days = [tokenizer.encode(f" {day}")[0] for day in ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")]
    shares = [(fw.rank(fw.ov(model, l, days[:-1]), days[1:]) < 5).float().mean(-1) for l in (21, 22, 23)]
    assert torch.stack(shares).shape == (3, H)
    assert float(shares[1].max()) >= 0.5  # head 22.2 counts days on


def test_9_induction_heads(setting, theirs):
    _, _, episode = setting
    r = torch.randint(1000, 40000, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    stripe = episode.probe([[0, *r, *r]], sites="pattern")["pattern"].diagonal(1 - len(r), -2, -1).mean((1, -1))
    assert stripe.shape == (L, H)  # [L, H]
    patterns = theirs(torch.tensor([[0, *r, *r]]), output_attentions=True).attentions
    exact = torch.stack([p.diagonal(1 - len(r), -2, -1).mean((0, -1)) for p in patterns])
    torch.testing.assert_close(stripe, exact, rtol=0, atol=1e-4)
    assert divmod(int(stripe.argmax()), H) == divmod(int(exact.argmax()), H)
    assert float(stripe.max()) > 0.5


def test_10_linear_probes(setting):
    _, tokenizer, episode = setting
    words = [("cat", 0), ("dog", 0), ("horse", 0), ("cow", 0), ("red", 1), ("blue", 1), ("green", 1), ("yellow", 1)]
    prompts, labels = [tokenizer.encode(f"I see a {word}") for word, _ in words], [label for _, label in words]
    score = fw.linear_probe(
        episode.probe(prompts, sites="resid_post", positions="last")["resid_post"][:, :, 0], labels, folds=4
    ).score
    assert score.shape == (L, 4)
    assert float(score[10].mean()) > 0.7


def test_11_while_the_weights_move(smollm2):
    model, tokenizer = smollm2
    fw.attach(model, layers=[11, 12], rule=fw.Hebbian(rate=0.01))
    try:
        episode = fw.Episode(model)
        context = tokenizer.encode("The sky is red")
        exam = fw.Exam(tokenizer, ["The sky is"], [" blue", " red"])
        before = episode.probe(exam).scores.difference
        episode.feed(context, edits=[fw.ablate("z", layers=12, heads=4)])
        found = episode.probe(exam, at="every", sweep=[[], fw.ablate("down.read")]).scores.difference  # [M, N, P]
        assert found.shape == (len(context) + 1, 2, 1)
        torch.testing.assert_close(found[0], before.expand(2, 1), rtol=0, atol=1e-4)
        torch.testing.assert_close(found[-1, 0], episode.probe(exam).scores.difference, rtol=0, atol=1e-4)
        without = episode.probe(exam, at=[fw.Moment(linears=["gate_proj", "up_proj"])]).scores.difference[0]
        torch.testing.assert_close(found[-1, 1], without, rtol=0, atol=1e-4)
        assert not torch.allclose(found[-1, 0], found[-1, 1], atol=1e-4)
        plain = fw.Episode(model)
        plain.feed(context)
        # layer 11 lies before the edit, the down projection of layer 12 behind it
        close(plain.delta_weight(11, "down_proj"), episode.delta_weight(11, "down_proj"), 1e-5)
        assert not torch.allclose(plain.delta_weight(12, "down_proj"), episode.delta_weight(12, "down_proj"))
    finally:
        fw.detach(model)


def test_12_an_sae_feature(setting, theirs):
    _, tokenizer, episode = setting
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(576, 96, generator=generator) / 24
    sae = SAE(W, W.T.clone(), torch.zeros(576), torch.zeros(96), None, "standard", 8, "resid_post")
    f, c = 5, 12.0
    edit = fw.Edit("resid_post", lambda x, at: x + (c - sae.encode(x)[..., f, None]) * sae.W_dec[f], layers=8)
    ids = tokenizer.encode("The capital of France is")

    def after(x):
        active = torch.relu(x @ W)[..., f, None]
        return x + (c - active) * W.T[f]

    with changed(theirs.model.layers[8], after=after):
        exact = theirs(torch.tensor([ids])).logits
    close(episode.feed([ids], edits=edit), exact)
