"""Lens, rank, OV and the parts of the stream, against transformers' modules taken apart, with a norm written out."""

from types import SimpleNamespace

import pytest
import torch
from oracle import Oracle
from test_plastic import relative
from tiny import CONFIG, prompt, tiny

import fastweights as fw


def naive_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def twin_of(model, **changes):
    """transformers' Llama with the same weights, in float64; its norms compute in float32 and are not used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**CONFIG, **changes}, attn_implementation="eager")
    twin = LlamaForCausalLM(config).double()
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: naive_norm(x, m.weight, m.variance_epsilon)
    return twin.eval().requires_grad_(False)


SHAPES = [
    {},
    {"num_key_value_heads": 1},
    {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    {"head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 2, "attention_bias": True},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_lens_is_the_final_norm_and_lm_head_of_transformers(changes):
    model = tiny(**changes)
    twin = twin_of(model, **changes)
    hidden = torch.randn(3, 2, 5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = twin.lm_head.weight
    normed = naive_norm(hidden, twin.model.norm.weight, 1e-5)
    assert relative(fw.lens(model, hidden), normed @ weight.T) < 1e-12
    assert relative(fw.lens(model, hidden, norm=False), hidden @ weight.T) < 1e-12
    assert relative(fw.lens(model, hidden[0, 0, 0]), normed[0, 0, 0] @ weight.T) < 1e-12


def test_the_lens_of_the_last_layer_is_the_models_own_logits_and_takes_any_dtype():
    model, ids = tiny(), prompt(2, 7)
    trace = fw.Episode(model, 2).probe(ids, sites="resid_post")
    assert relative(fw.lens(model, trace.hidden_states)[-1], trace.logits) < 1e-12
    half = tiny(torch.bfloat16)
    logits = fw.lens(half, trace.hidden_states[-1])
    assert logits.dtype == torch.bfloat16
    assert relative(logits.double(), trace.logits) < 0.05


def test_a_hidden_state_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"lens\(\) got hidden \[2, 61\], expected \[.., 24\], the model's width"):
        fw.lens(tiny(), torch.zeros(2, 61))


def test_rank_counts_the_tokens_that_stand_strictly_higher():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 5.0]])
    assert fw.rank(logits, 2).tolist() == [1, 1]
    assert fw.rank(logits, [0, 3]).tolist() == [0, 0]
    assert fw.rank(logits, torch.tensor([[1], [2], [3]])).tolist() == [[3, 1], [1, 1], [1, 0]]
    assert fw.rank(logits[0], 1).shape == ()
    assert fw.rank(logits[0], [1, 0]).tolist() == [3, 0]
    assert fw.rank(torch.zeros(4, 3, 4), [1, 2, 3]).shape == (4, 3)
    assert fw.rank(logits * float("nan"), 0).tolist() == [4, 4]


def test_rank_equals_a_place_in_the_sorted_order():
    logits = torch.randn(3, 4, 61, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(61, (3, 4), generator=torch.Generator().manual_seed(1))
    places = logits.argsort(-1, descending=True).argsort(-1)
    assert torch.equal(fw.rank(logits, ids), places.gather(-1, ids[..., None])[..., 0])


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (61, "the token id 61, which is outside the vocabulary of 61"),
        ([3, -1], "the token id -1, which is outside the vocabulary of 61"),
        (2.5, "token_ids of torch.float32, expected whole numbers"),
        (True, "token_ids of torch.bool, expected whole numbers"),
        ([1, 2, 3], r"token_ids \[3\], which do not broadcast against \[2\]"),
        ("a", "token_ids='a': expected whole numbers"),
    ],
)
def test_token_ids_that_rank_cannot_use_are_refused(token_ids, message):
    with pytest.raises(ValueError, match=message):
        fw.rank(torch.zeros(2, 61), token_ids)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("layer", [0, 2])
def test_ov_equals_transformers_modules_taken_apart_head_by_head_and_token_by_token(changes, layer):
    model = tiny(**changes)
    twin = twin_of(model, **changes)
    ids = [5, 17, 60, 5, 0]
    found = fw.ov(model, layer, ids)
    H, KH = twin.config.num_attention_heads, twin.config.num_key_value_heads
    E = twin.config.head_dim
    assert found.shape == (H, len(ids), 61)
    attention = twin.model.layers[layer].self_attn
    for n, token in enumerate(ids):
        x = twin.model(torch.tensor([[token]]), output_hidden_states=True).hidden_states[1][0, 0]
        v = attention.v_proj(naive_norm(x, twin.model.layers[layer].input_layernorm.weight, 1e-5))
        for head in range(H):
            kv = head // (H // KH)
            part = attention.o_proj.weight[:, head * E : (head + 1) * E]
            written = part @ v[kv * E : (kv + 1) * E]
            logits = twin.lm_head.weight @ naive_norm(written, twin.model.norm.weight, 1e-5)
            assert relative(found[head, n], logits) < 1e-10


def test_ov_of_targets_ranks_as_in_a_loop():
    model, days = tiny(), [5, 6, 7, 8]
    found = fw.ov(model, 1, torch.tensor(days[:-1]))
    ranks = fw.rank(found, days[1:])
    assert ranks.shape == (4, 3)
    for head in range(4):
        for n in range(3):
            assert int(ranks[head, n]) == int((found[head, n] > found[head, n, days[n + 1]]).sum())


def test_ov_sees_the_frozen_weights_and_leaves_plastic_linears_alone():
    model = tiny()
    before = fw.ov(model, 1, [3, 4])
    fw.attach(model, [0, 1], fw.Hebbian(rate=0.3))
    episode = fw.Episode(model)
    episode.feed([1, 2, 3])
    assert torch.equal(fw.ov(model, 1, [3, 4]), before)
    assert episode.events == 3


@pytest.mark.parametrize(
    ("layer", "ids", "message"),
    [
        (4, [1], "layer 4 does not exist: this model has layers 0 to 3"),
        (-1, [1], "layer -1 does not exist"),
        (1.0, [1], "layer 1.0 does not exist"),
        (0, [], "got no token_ids"),
        (0, [61], "the token id 61, which is outside the vocabulary of 61"),
        (0, [1.5], "expected whole numbers"),
    ],
)
def test_a_layer_or_token_that_ov_cannot_use_is_refused(layer, ids, message):
    with pytest.raises(ValueError, match=message):
        fw.ov(tiny(), layer, ids)


def seen(model, ids, result):
    """What the contract says a trace holds, taken with torch's own hooks from every module by itself."""
    D, H = model.config.hidden_size, model.config.num_attention_heads
    attention, heads, mlp, handles = [], [], [], []
    first = {}

    def z_of(module, arguments):
        z = arguments[0].unflatten(-1, (H, -1))
        heads.append(torch.einsum("bthe,dhe->bthd", z, module.weight.view(D, H, -1)))

    for block in model.model.layers:
        handles += [
            block.self_attn.register_forward_hook(lambda _m, _i, out: attention.append(out)),
            block.self_attn.o_proj.register_forward_pre_hook(z_of),
            block.mlp.register_forward_hook(lambda _m, _i, out: mlp.append(out)),
        ]
    handles += [
        model.model.embed_tokens.register_forward_hook(lambda _m, _i, out: first.update(embedding=out)),
        model.model.norm.register_forward_hook(lambda _m, _i, out: first.update(final_norm=out)),
    ]
    logits = model(ids)
    for handle in handles:
        handle.remove()
    written = {"result": torch.stack(heads)} if result else {"attn_out": torch.stack(attention)}
    sites = {**first, "mlp_out": torch.stack(mlp), **written}
    layers = {site: [*range(len(mlp))] for site in ("mlp_out", *written)}
    return SimpleNamespace(sites=sites, layers=layers, logits=logits)


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("result", [False, True])
def test_the_parts_sum_to_the_final_norm_and_to_every_logit(changes, result):
    model = tiny(**changes)
    trace = seen(model, prompt(2, 7), result)
    names, parts = fw.decompose(model, trace)
    assert parts.shape == (len(names), 2, 7, 24)
    assert relative(parts.sum(0), trace.sites["final_norm"]) < 1e-13
    assert relative((parts @ model.lm_head.weight.T).sum(0), trace.logits) < 1e-13
    heads, bias = model.config.num_attention_heads, bool(changes.get("attention_bias"))
    attention = [f" H{head}" for head in range(heads)] + [" attn_bias"] * bias if result else [" attn"]
    assert names == ["embedding", *(f"L{layer}{part}" for layer in range(4) for part in (*attention, " mlp"))]


def test_each_part_is_what_its_module_wrote_under_the_norms_one_scale():
    model, ids = tiny(), prompt(1, 6)
    names, parts = fw.decompose(model, seen(model, ids, result=True))
    oracle = Oracle(model.state_dict(), CONFIG, {})
    stream = oracle.frozen_probe(ids[0].tolist())[1][:, -1]  # before the final norm
    scale = model.model.norm.weight / (stream.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    trace = seen(model, ids, result=False)
    for layer in range(4):
        mlp = parts[names.index(f"L{layer} mlp"), 0]
        assert relative(mlp, trace.sites["mlp_out"][layer, 0] * scale) < 1e-12
        heads = sum(parts[names.index(f"L{layer} H{head}"), 0] for head in range(4))
        assert relative(heads, trace.sites["attn_out"][layer, 0] * scale) < 1e-12
    assert relative(parts[0, 0], model.model.embed_tokens.weight[ids[0]] * scale) < 1e-12


def stacked(traces, axis_of):
    """Traces side by side in a new axis at the front."""
    sites = {site: torch.stack([trace.sites[site] for trace in traces]) for site in axis_of.sites}
    return SimpleNamespace(sites=sites, layers=axis_of.layers)


def test_moments_and_alternatives_stay_in_front_and_layers_may_come_in_any_order():
    model = tiny()
    traces = [[seen(model, prompt(2, 5, seed=3 * m + n), result=True) for n in range(3)] for m in range(2)]
    rows = [stacked(row, row[0]) for row in traces]
    whole = stacked(rows, rows[0])
    order = [2, 0, 3, 1]
    whole.sites["mlp_out"] = whole.sites["mlp_out"][:, :, order]
    whole.layers = {**whole.layers, "mlp_out": order}
    names, parts = fw.decompose(model, whole)
    assert parts.shape == (len(names), 2, 3, 2, 5, 24)
    for m in range(2):
        for n in range(3):
            assert torch.equal(parts[:, m, n], fw.decompose(model, traces[m][n])[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_parts_have_the_traces_dtype(dtype, tolerance):
    model = tiny(dtype)
    trace = seen(model, prompt(2, 7), result=True)
    _, parts = fw.decompose(model, trace)
    assert parts.dtype == dtype
    assert relative(parts.double().sum(0), trace.sites["final_norm"].double()) < tolerance


def test_a_trace_that_lacks_a_piece_or_was_edited_is_refused():
    model = tiny()
    trace = seen(model, prompt(1, 5), result=False)

    def without(site):
        return SimpleNamespace(sites={k: v for k, v in trace.sites.items() if k != site}, layers=trace.layers)

    for site, message in (
        ("embedding", "needs the site 'embedding', and this trace holds final_norm, mlp_out, attn_out"),
        ("mlp_out", "needs the site 'mlp_out'"),
        ("attn_out", "needs the site 'attn_out' or 'result'"),
    ):
        with pytest.raises(ValueError, match=message):
            fw.decompose(model, without(site))
    partial = SimpleNamespace(sites=trace.sites, layers={**trace.layers, "mlp_out": [0, 1, 3]})
    with pytest.raises(ValueError, match="needs 'mlp_out' of all 4 layers, and layer 2 is missing"):
        fw.decompose(model, partial)
    steered = SimpleNamespace(
        sites={**trace.sites, "final_norm": trace.sites["final_norm"] + 0.01}, layers=trace.layers
    )
    with pytest.raises(ValueError, match=r"the parts do not sum to this trace's final_norm \(relative difference"):
        fw.decompose(model, steered)
    fw.decompose(model, without("final_norm"))


def test_the_real_models_lens_ov_and_parts_are_those_of_transformers(smollm2, smollm2_folder):
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm2
    twin = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32, attn_implementation="eager")
    twin.requires_grad_(False)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    hidden = twin(ids, output_hidden_states=True).hidden_states
    middle = twin.lm_head(twin.model.norm(hidden[20]))
    trace = fw.Episode(model).probe(ids, sites="resid_post")
    assert relative(fw.lens(model, trace.hidden_states[20]), middle) < 1e-5
    days = [tokenizer.encode(" " + day)[0] for day in ("Monday", "Tuesday", "Wednesday")]
    x = torch.stack([twin(torch.tensor([[day]]), output_hidden_states=True).hidden_states[1][0, 0] for day in days])
    block = twin.model.layers[22]
    v = block.self_attn.v_proj(block.input_layernorm(x)).view(3, 3, 64)
    for head in (0, 2, 8):
        written = v[:, head // 3] @ block.self_attn.o_proj.weight[:, 64 * head : 64 * head + 64].T
        assert relative(fw.ov(model, 22, days)[head], twin.lm_head(twin.model.norm(written))) < 1e-4
    seen_here = seen(model, ids, result=True)
    names, parts = fw.decompose(model, seen_here)
    assert len(names) == 1 + 30 * 10
    assert relative((parts @ model.lm_head.weight.T).sum(0), twin(ids).logits) < 1e-5
