"""A context as events: exact in every family, ordinary events each of which it takes, refused in plain words."""

import json
import math

import pytest
import torch
from family_models import MODELS, SHAPE
from tiny import prompt, tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import fastweights as fw
from fastweights import report
from fastweights.__main__ import main
from fastweights.config import LlamaConfig
from fastweights.context import begun
from fastweights.model import Llama, RMSNorm
from fastweights.reach import Reach
from fastweights.tokenizer import Tokenizer

IDS = torch.arange(20) * 11 % 131
CONTEXT, QUERY = IDS[:14], IDS[14:]
PRENORM = [name for name in MODELS if not name.startswith(("gemma", "olmo"))]
POSTNORM = [name for name in MODELS if name.startswith(("gemma", "olmo"))]
EVENTS = {"gpt2": 2, "gpt_neox": 2, "gpt_neox, one after the other": 2, "phi3": 2}  # per layer, where not three


def family(name, dtype=torch.float64, depth=3):
    """A random model of a family, its logits of the order of 1."""
    pair = MODELS[name]
    fields = {**SHAPE, **pair.ours, "num_hidden_layers": depth}
    if "windows" in pair.ours:
        fields["windows"] = (pair.ours["windows"] * depth)[:depth]
    model = Llama(LlamaConfig(**fields, model_type=pair.model_type))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            one = "norm" in key or "ln_" in key
            value = (1.0 if one and "weight" in key and model.config.family.norm != "rms1" else 0.0) + 0.2 * noise
        else:
            value = noise * (1.0 if "emb" in key or "wte" in key else parameter.shape[1] ** -0.5)
        parameter.data = value.to(dtype)
    model.tie_weights()
    return model


def with_context(model, context, query):
    """[T, V] of the frozen model's own forward pass."""
    whole = torch.cat([torch.as_tensor(context), torch.as_tensor(query)])[None]
    return model(whole)[0, len(context) :]


def untouched(model):
    return not [m for m in model.modules() if type(m).__name__ == "PlasticLinear"]


@pytest.mark.parametrize("name", PRENORM)
def test_without_the_context_the_events_give_the_logits_it_gave_in_every_layer_to_rounding(name):
    model = family(name)
    wanted = with_context(model, CONTEXT, QUERY)
    patch = fw.context_patch(model, CONTEXT, QUERY)
    torch.testing.assert_close(patch.tokens.reference, wanted, rtol=0, atol=1e-12)
    scale = float(wanted.abs().max())
    assert float((patch.tokens.patched - wanted).abs().max()) < 1e-14 * scale * len(QUERY)
    assert patch.tokens.unpatched_difference > 0.2 * scale
    assert float(patch.tokens.layer_error.max()) < 1e-15
    assert float(patch.tokens.unpatched_layer_error[0].min()) > 1e-3
    assert patch.tokens.agreement == 1
    assert len(patch.fast.linears) == 3 * EVENTS.get(name, 3)
    assert set(map(tuple, patch.episode.event_counts.values())) == {(len(QUERY),)}
    assert torch.equal(patch.logits, patch.tokens.patched[-1])
    assert torch.equal(patch.episode.logits[0], patch.logits)
    assert patch.episode.length == len(IDS)
    assert patch.episode.token_ids == [QUERY.tolist()]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3"])
def test_the_events_alone_give_it_again_and_leaving_out_any_one_of_them_does_not(name):
    patch = fw.context_patch(family(name), CONTEXT, QUERY[:2])
    assert torch.equal(patch.replay(), patch.tokens.patched)
    for left_out in patch.fast.linears:
        found = patch.replay(lambda token, address, left_out=left_out: address != left_out)
        assert float((found - patch.tokens.reference).abs().max()) > 0.1
    none = patch.replay(lambda token, address: 0.0)
    torch.testing.assert_close(none, patch.tokens.unpatched, rtol=0, atol=1e-12)


def test_a_parallel_block_whose_stream_is_right_already_needs_the_event_of_down_alone():
    """Its MLP reads the stream before attention, which is the context's own: gate and up lack nothing."""
    patch = fw.context_patch(family("gpt_neox"), CONTEXT, QUERY)
    norms = {name: max(float(n.max()) for (_, own), n in patch.norms.items() if own == name) for _, name in patch.norms}
    assert norms["dense_h_to_4h"] < 1e-14
    assert norms["dense_4h_to_h"] > 0.01


@pytest.mark.parametrize("name", POSTNORM)
def test_behind_a_norm_the_logits_are_exact_though_single_layers_cannot_be(name):
    patch = fw.context_patch(family(name, depth=6), CONTEXT, QUERY[:3])
    assert patch.tokens.difference < 1e-11 < 1 < patch.tokens.unpatched_difference
    assert float(patch.tokens.layer_error[:, -1].max()) < 1e-12
    assert float(patch.tokens.layer_error[:, 1:-1].max()) > 1e-3
    torch.testing.assert_close(patch.tokens.reference, with_context(family(name, depth=6), CONTEXT, QUERY)[:3])


def test_a_norm_gives_what_lies_within_its_ellipsoid_and_else_the_nearest_point():
    generator = torch.Generator().manual_seed(3)
    norm = RMSNorm(7, 1e-5).double().requires_grad_(False)
    norm.weight.data = torch.rand(7, generator=generator, dtype=torch.float64) + 0.2
    y = torch.randn(7, generator=generator, dtype=torch.float64)
    inside = 0.6 * y / (y / norm.weight).square().mean().sqrt()
    reach = Reach.of(norm, inside)
    assert reach.exact
    torch.testing.assert_close(norm(reach.before), inside)
    outside = 3 * inside
    reach = Reach.of(norm, outside)
    nearest, distance = norm(reach.before), float((norm(reach.before) - outside).norm())
    assert not reach.exact
    assert float((nearest / norm.weight).square().mean()) == pytest.approx(1, abs=1e-5)
    for _ in range(200):
        other = norm(torch.randn(7, generator=generator, dtype=torch.float64) + reach.before * 3)
        assert float((other - outside).norm()) > distance * (1 - 1e-5)


def test_chosen_layers_are_right_behind_themselves_and_the_rest_is_shown():
    patch = fw.context_patch(family("llama"), CONTEXT, QUERY, layers=[0, 1])
    assert float(patch.layer_error[:2].max()) < 1e-15
    assert 1e-3 < float(patch.layer_error[2]) < float(patch.unpatched_layer_error[2])
    assert {layer for layer, _ in patch.fast.linears} == {0, 1}
    fw.detach(patch.episode.model)
    last = fw.context_patch(patch.episode.model, CONTEXT, QUERY, layers=-1)
    assert float(last.layer_error[2]) < 1e-15
    torch.testing.assert_close(last.layer_error[:2], last.unpatched_layer_error[:2])
    assert last.tokens.difference < 1e-13


def test_a_moment_is_one_tokens_events_and_a_probe_of_the_first_token_gives_its_logits():
    patch = fw.context_patch(family("llama"), CONTEXT, QUERY)
    asked = patch.episode.probe(QUERY[:1], at=[0, patch.at(0), patch.at(0, without=[1]), patch.at(0, layers=[0, 1, 2])])
    unpatched, own, without, again = asked.logits[:, 0, 0]
    torch.testing.assert_close(own, patch.tokens.reference[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(unpatched, patch.tokens.unpatched[0], rtol=0, atol=1e-12)
    assert torch.equal(without, unpatched)
    assert torch.equal(again, own)
    delta = patch.episode.delta_weight(1, "up_proj")
    assert int(torch.linalg.matrix_rank(delta)) == 1
    assert float(delta.norm() / patch.fast.linears[1, "up_proj"].weight.norm()) == pytest.approx(
        float(patch.norms[1, "up_proj"][-1])
    )
    with pytest.raises(ValueError, match=r"at\(6\): expected a query token from 0 to 5"):
        patch.at(6)


def test_what_follows_reads_the_last_events_and_writes_none_and_can_be_undone(tmp_path):
    patch = fw.context_patch(family("gpt2"), CONTEXT, QUERY)
    episode, before = patch.episode, patch.episode.event_counts
    episode.save(tmp_path / "life.safetensors")
    again = fw.Episode.load(episode.model, tmp_path / "life.safetensors")
    fork = episode.fork()
    logits = episode.feed([5, 6])
    assert list(episode.generate(None, 3, stop_token_ids=()))
    assert episode.event_counts == before
    assert episode.path == "modules"
    for other in (again, fork):  # the places before the query stay out of sight
        assert torch.equal(other.feed([5, 6]), logits)
    fork.undo(1)
    last = fork.delta_weight(0, "c_fc")
    U, K, *_ = episode.logs[0, "c_fc"].moment_factors()
    torch.testing.assert_close(last, torch.outer(U[0, -2], K[0, -2]))
    episode.reset()
    plain = fw.Episode(episode.model).feed(QUERY)
    assert torch.equal(episode.feed(QUERY), plain)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_life_that_begins_later_sees_nothing_before_itself_on_any_path(name):
    """Under rope it is the life from position 0 on, of one token, of several, padded, and behind a cache."""
    model = family(name, torch.float32)
    wanted = fw.Episode(model).feed(QUERY)
    close = dict(rtol=0, atol=1e-5 * float(wanted.abs().max()))
    whole, steps, padded, bare = (begun(model, 14) for _ in range(4))
    torch.testing.assert_close(whole.feed(QUERY), wanted, **close)
    single = torch.cat([steps.feed([[token]]) for token in QUERY.tolist()], 1)
    torch.testing.assert_close(single, wanted, **close)
    assert steps.path == "modules"
    assert steps.why["cpu"] == "a row begins at a later position, and the places before it are never seen"
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 1]])
    with_padding = padded.feed(torch.cat([QUERY[:1], QUERY[:1], QUERY[1:]]), attention_mask=mask)
    torch.testing.assert_close(with_padding[:, [0, 2, 3, 4, 5, 6]], wanted, **close)
    cached = torch.cat([model(QUERY[None, t : t + 1], cache=bare.cache) for t in range(6)], 1)
    torch.testing.assert_close(cached, wanted, **close)
    assert whole.length == 20
    with pytest.raises(ValueError, match="70 tokens do not fit"):
        begun(model, 70)


def test_several_patches_of_one_model_follow_each_other():
    model = family("llama")
    first = fw.context_patch(model, CONTEXT, QUERY[:1])
    second = fw.context_patch(model, CONTEXT[:5], QUERY)
    assert second.tokens.difference < 1e-13
    assert torch.equal(first.replay(), first.tokens.patched)


def test_half_precision_keeps_float32_factors_and_errs_by_its_own_rounding():
    patch = fw.context_patch(family("llama", torch.bfloat16), CONTEXT, QUERY)
    assert {log.dtype for log in patch.episode.logs.values()} == {torch.float32}
    assert float(patch.tokens.layer_error.max()) < 2**-8
    assert patch.tokens.difference < 0.04 < 1 < patch.tokens.unpatched_difference
    float32 = fw.context_patch(family("llama", torch.float32), CONTEXT, QUERY)
    assert float32.tokens.difference < 1e-5


def test_the_base_weights_and_the_logits_of_the_model_stay_what_they_were():
    model = family("llama")
    before, logits = {key: w.clone() for key, w in model.state_dict().items()}, model(IDS[None])
    modules = dict(model.named_modules())
    patch = fw.context_patch(model, CONTEXT, QUERY)
    assert torch.equal(model(IDS[None]), logits)
    assert torch.equal(fw.Episode(model).feed(IDS), logits)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    fw.detach(model)
    with pytest.raises(ValueError, match=r"attach\(\) or detach\(\) changed this model after the episode was made"):
        patch.replay()
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(w, before[key]) for key, w in model.state_dict().items())


def test_edits_that_stand_around_it_are_not_made():
    model = family("llama")
    alone = fw.context_patch(model, CONTEXT, QUERY).tokens
    with pytest.warns(UserWarning, match="never acted"), fw.edited(model, fw.ablate("z", layers=1)):
        inside = fw.context_patch(model, CONTEXT, QUERY).tokens
    assert torch.equal(inside.patched, alone.patched)


REFUSED = {
    r"context_patch\(query_ids=...\): token id 131 is outside the vocabulary": (CONTEXT, [131], {}),
    r"context_patch\(query_ids=...\): input_ids has shape \[1, 0\]": (CONTEXT, [], {}),
    r"context_patch\(context_ids=...\): input_ids has batch 2": ([[1], [2]], QUERY, {}),
    "context of 60 tokens and a query of 5, but this model has positions up to 64": ([3] * 60, [3] * 5, {}),
    "layer 3 does not exist": (CONTEXT, QUERY, {"layers": [3]}),
    "layers='none': expected layer numbers": (CONTEXT, QUERY, {"layers": "none"}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_nothing_changes(said):
    model = family("llama")
    context, query, options = REFUSED[said]
    with pytest.raises(ValueError, match=said):
        fw.context_patch(model, context, query, **options)
    assert untouched(model)


def test_a_model_that_is_plastic_otherwise_is_refused():
    model = family("llama")
    fast = fw.attach(model, [1], fw.Hebbian(), "up_proj")
    with pytest.raises(ValueError, match=r"1 plastic linears \(Hebbian\), which are not those of this patch"):
        fw.context_patch(model, CONTEXT, QUERY)
    assert model.model.layers[1].mlp.up_proj is fast.linears[1, "up_proj"]
    fw.detach(model)
    fw.context_patch(model, CONTEXT, QUERY, layers=[0])
    with pytest.raises(ValueError, match=r"3 plastic linears \(ContextPatch\)"):
        fw.context_patch(model, CONTEXT, QUERY)
    fw.attach(model, [1], fw.Hebbian())
    mixed = fw.Episode(model)
    with pytest.raises(ValueError, match="ContextPatch writes nothing by itself"):
        mixed.feed([1, 2])
    assert mixed.length == 0
    assert mixed.feed([1, 2], update="none").shape == (1, 2, 131)


def test_an_input_of_norm_zero_is_refused_by_its_linear_and_position():
    model = family("llama")
    model.model.layers[1].before_mlp.weight.data.zero_()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj reads an input of norm 0 at position 14"):
        fw.context_patch(model, CONTEXT, QUERY)
    assert untouched(model)
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_an_event_that_is_not_finite_is_refused_by_its_number():
    model = family("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"event 1 of layers\.1\.mlp\.down_proj \(row 0\) has a non-finite factor"):
        fw.context_patch(model, CONTEXT, QUERY)
    assert untouched(model)


# ---- the command line and its page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    words = ["<b>", "the", "sky", "is", "red", "who", "?"]
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(words)} | {"…": 60}, unk_token="…"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(path / "tokenizer.json"))
    fw.save(tiny(torch.float32, eos_token_id=59), path, Tokenizer.from_folder(path))
    return path


def test_the_command_shows_what_the_call_gives_and_saves_a_page_and_a_picture(folder, capsys, tmp_path):
    words = ["--context", "the sky is red", "--query", "who <b> ?", "--model", str(folder)]
    options = ["--layers", "0,1,-1", "--tokens", "2", "--out", str(tmp_path / "out"), "--json"]
    assert main(["patch", *words, *options]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    whole = json.loads(last)
    model, tokenizer = fw.load(folder)
    patch = fw.context_patch(model, tokenizer.encode("the sky is red"), whole["query_ids"], [0, 1, 3])
    assert whole["query_ids"][:3] == tokenizer.encode("who <b> ?")
    assert len(whole["query_ids"]) == 5
    assert whole["layers"] == [0, 1, 3]
    assert whole["layer_error"] == patch.tokens.layer_error.tolist()
    assert whole["difference"] == patch.tokens.difference
    assert whole["norms"]["3.down_proj"] == patch.norms[3, "down_proj"].tolist()
    assert len(whole["norms"]) == 9
    assert whole["choices"]["reference"][2:4] == whole["query_ids"][3:]
    largest = patch.tokens.layer_error.max(0).values.tolist()
    assert [float(line.split()[1]) for line in shown[1:5]] == pytest.approx(largest, rel=0.1)
    assert "45 events in 3 of 4 layers for 5 query tokens behind a context of 4" in shown[-2]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<code dir=auto>&lt;b&gt;</code>" in page
    assert "<b>" not in page
    assert "45 events in 3 of 4 layers" in page
    assert (tmp_path / "out" / "patch.png").stat().st_size > 5000
    lines = report.patch_picture(whole).axes[0].get_lines()
    assert [*lines[1].get_ydata()] == pytest.approx(largest)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--query", ""], "--query is empty: expected at least one token"),
        (["--tokens", "-1"], "--tokens -1: expected 0 or more"),
        (["--layers", "4"], "layer 4 does not exist: this model has layers 0 to 3"),
        (["--context", "@nowhere"], "cannot read nowhere"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_status_2(folder, capsys, options, said):
    given = ["patch", "--context", "the sky", "--query", "who", "--model", str(folder), *options]
    try:
        status = main(given)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# ---- the ridge form


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_without_a_ridge_the_one_change_serves_all_fitted_tokens_exactly(name):
    model = family(name)
    queries = [[3, 4, 5], [7, 8], [9, 10, 11, 12]]
    wanted = torch.cat([with_context(model, CONTEXT, query) for query in queries])
    patch = fw.ridge_patch(model, CONTEXT, queries, mu=0.0)
    torch.testing.assert_close(patch.tokens.reference, wanted, rtol=0, atol=1e-12)
    assert patch.tokens.difference < 1e-11
    assert patch.tokens.unpatched_difference > 1
    assert patch.episode.events == 9
    fed = patch.episode.fork().feed([queries[0]])[0]
    torch.testing.assert_close(fed, wanted[:3], rtol=0, atol=1e-11)
    assert set(map(tuple, patch.episode.event_counts.values())) == {(9,)}


def test_the_ridge_is_the_formula_and_its_error_on_other_queries_is_shown():
    """ΔW = ΔA (HᵀH + μI)⁻¹ Hᵀ, dense and by itself, at the first linear, whose inputs no event has touched."""
    model, queries, mu = family("llama"), prompt(3, 4), 0.7
    seen = {}
    handle = model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _m, args: seen.update(h=args[0]))
    model(queries)
    H = seen["h"].flatten(0, 1).T
    model(torch.cat([CONTEXT.expand(3, -1), queries], 1))
    dH = seen["h"][:, len(CONTEXT) :].flatten(0, 1).T - H
    handle.remove()
    W = model.model.layers[0].mlp.gate_proj.weight
    wanted = W @ dH @ torch.linalg.inv(H.T @ H + mu * torch.eye(12, dtype=H.dtype)) @ H.T
    patch = fw.ridge_patch(model, CONTEXT, queries, mu=mu)
    torch.testing.assert_close(patch.episode.delta_weight(0, "gate_proj"), wanted, rtol=0, atol=1e-12)
    other = patch.compare(prompt(2, 4, seed=5))
    assert 0 < patch.tokens.difference < other.difference
    assert other.reference.shape == (8, 131)
    with pytest.raises(ValueError, match=r"ridge_patch\(mu=-1\): expected a number, 0 or more"):
        fw.ridge_patch(model, CONTEXT, queries, mu=-1)


def test_a_tiny_llama_of_one_query_token_has_one_ridge_that_is_its_patch():
    model, context, query = tiny(), prompt(1, 9)[0], prompt(1, 1, seed=4)[0]
    ridge = fw.ridge_patch(model, context, query, mu=0.0)
    dense = {a: ridge.episode.delta_weight(*a) for a in ridge.fast.linears}
    fw.detach(model)
    patch = fw.context_patch(model, context, query)
    for address, delta in dense.items():
        torch.testing.assert_close(patch.episode.delta_weight(*address), delta, rtol=0, atol=1e-10)
