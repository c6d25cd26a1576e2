"""Edits at every site, and the named edits, against the naive model, whatever the split of a prompt."""

import json
import random

import pytest
import torch
from naive import HEADS, LAYERED, SQUARE, WHOLE, Naive, bent, both, columns, twin
from test_model import VARIANTS
from tiny import CONFIG, cached, described, fed, naive_cache, naive_of, prompt, tiny

import fastweights as fw

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
IDS = [3, 14, 15, 9, 26, 5, 35, 8]
T = len(IDS)
HEBB = fw.Hebbian(rate=0.3, mu=0.1, decay=0.05, bias=True)
RULES = {
    "hebbian": HEBB,
    "local-least-squares": fw.LocalLeastSquares(gamma=0.4, mu=0.1, target="slow", clip=0.3),
    "delta": fw.Delta(beta=0.3, target=torch.linspace(-1, 1, 52, dtype=torch.float64), mu=0.1, decay=0.05),
    "gradient": fw.GradientAscent(rate=0.3, decay=0.05),
}
LINEARS = ["gate_proj", "up_proj"]
GROUPED = ("k", "k_rot", "v")


SPLITS = [[T], [1] * T, [3, 1, T - 4]]


# ---- every site, every split


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("site", [*LAYERED, *WHOLE])
def test_an_edit_hits_the_same_token_in_every_split(site, split):
    model = tiny()
    places = {"layers": [0, 2]} if site in LAYERED else {}
    episode, naive = fw.Episode(model), naive_of(model)
    edit = fw.Edit(site, lambda x, at: bent(x), positions=[1, 2, 5], **places)
    logits = fed(episode, split, IDS, edits=[edit])
    exact = naive.feed(IDS, twin(site, positions=[1, 2, 5], **places))
    torch.testing.assert_close(logits, exact, **CLOSE)
    torch.testing.assert_close(cached(episode), naive_cache(naive), **CLOSE)


@pytest.mark.parametrize("variant", ["multi-query", "biases", "head_dim", "llama3 rope", "tied"])
@pytest.mark.parametrize(
    "site", ["q", "k", "v", "q_rot", "k_rot", "z", "result", "scores", "pattern", "gate", "embedding"]
)
def test_edits_of_odd_models_equal_the_naive_model(site, variant):
    model, config = tiny(**VARIANTS[variant]), {**CONFIG, **VARIANTS[variant]}
    places = {} if site in ("gate", "embedding") else {"heads": [0] if site in GROUPED else [1, 3]}
    if site not in ("scores", "pattern"):
        places["units"] = [0, 2, 3]
    exact = naive_of(model, config=config).feed(IDS, twin(site, **places))
    episode = fw.Episode(model)
    edit = fw.Edit(site, lambda x, at: bent(x), **places)
    torch.testing.assert_close(fed(episode, [5, 3], IDS, edits=[edit]), exact, **CLOSE)
    torch.testing.assert_close(episode.probe(IDS, edits=edit).logits[0], exact, **CLOSE)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("site", ["embedding", "resid_mid", "z", "mlp_norm", "gate", "up", "act", "mlp_out", "logits"])
def test_edits_and_plasticity_together_equal_the_dense_loop(site, rule, split):
    """An edited gate still writes the event of its own a; gradient rules see the edited logits."""
    model = tiny()
    fw.attach(model, [1, 2], RULES[rule], LINEARS, rank=16)
    episode, naive = fw.Episode(model), naive_of(model, RULES[rule])
    edit = fw.Edit(site, lambda x, at: bent(x), positions=range(2, 7))
    logits = fed(episode, split, IDS, edits=edit)
    torch.testing.assert_close(logits, naive.feed(IDS, twin(site, positions=range(2, 7)), write=True), **CLOSE)
    for address, fast in naive.fast.items():
        torch.testing.assert_close(episode.delta_weight(*address), fast.dW, **CLOSE)
    after = naive.feed([7, 7, 4])  # a gradient event is written when its next token comes
    torch.testing.assert_close(episode.feed([[7, 7, 4]], update="none")[0], after, **CLOSE)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("rule", [name for name in RULES if name != "gradient"])
@pytest.mark.parametrize("part", ["read", "key", "value"])
def test_what_is_read_and_written_is_edited_token_by_token_as_in_the_dense_loop(part, rule, split):
    model = tiny()
    fw.attach(model, [1, 2], RULES[rule], LINEARS, rank=16)
    episode, naive = fw.Episode(model), naive_of(model, RULES[rule])
    places = {"positions": [1, 2, 3, 6], "layers": [1], "units": [0, 3, 4]}
    edits = [fw.Edit(f"{name}.{part}", lambda x, at: bent(x), **places) for name in ("gate", "up")]
    logits = fed(episode, split, IDS, edits=edits)
    change = both(*(twin(f"{name}.{part}", **places) for name in ("gate", "up")))
    torch.testing.assert_close(logits, naive.feed(IDS, change, write=True), **CLOSE)
    for address, fast in naive.fast.items():
        torch.testing.assert_close(episode.delta_weight(*address), fast.dW, **CLOSE)
    torch.testing.assert_close(cached(episode), naive_cache(naive), **CLOSE)


@pytest.mark.parametrize("written", [True, False])
def test_reading_is_edited_where_a_gradient_rule_writes(written):
    model = tiny()
    fw.attach(model, [1, 2], RULES["gradient"], LINEARS, rank=16)
    episode, naive = fw.Episode(model), naive_of(model, RULES["gradient"])
    episode.feed([[4, 4, 2]])
    naive.feed([4, 4, 2], write=True)
    edit = fw.Edit("up.read", lambda x, at: 3 * x, layers=2)
    logits = episode.feed([IDS], update="all" if written else "none", edits=edit)
    exact = naive.feed(IDS, twin("up.read", lambda x: 3 * x, layers=[2]), write=written)
    torch.testing.assert_close(logits[0], exact, **CLOSE)


def test_a_gradient_event_is_zero_where_an_edit_cut_its_linear_off():
    model = tiny()
    fw.attach(model, [1, 2], RULES["gradient"], LINEARS, rank=16)
    for edit, change in (
        (fw.ablate("mlp_out", layers=1), twin("mlp_out", torch.zeros_like, layers=[1])),
        (fw.ablate("logits"), twin("logits", torch.zeros_like)),
        (fw.ablate("resid_post", layers=2), twin("resid_post", torch.zeros_like, layers=[2])),
    ):
        episode, naive = fw.Episode(model), naive_of(model, RULES["gradient"])
        logits = episode.feed([IDS], edits=edit)[0]
        torch.testing.assert_close(logits, naive.feed(IDS, change, write=True), **CLOSE)
        for address, fast in naive.fast.items():
            torch.testing.assert_close(episode.delta_weight(*address), fast.dW, **CLOSE)
        torch.testing.assert_close(episode.feed([[7, 4]])[0], naive.feed([7, 4], write=True), **CLOSE)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("rule", "site"),
    [
        *(("hebbian", site) for site in ("z", "gate", "up.read", "gate.key", "up.value")),
        *(("gradient", site) for site in ("z", "up", "up.read")),
    ],
)
def test_edits_in_shared_episodes_equal_the_dense_loop(rule, site, ragged):
    model, rows = tiny(), 3
    fw.attach(model, [1, 2], RULES[rule], LINEARS, rank=64)
    episode, ids = fw.Episode(model, rows, shared=True), prompt(rows, 6)
    mask = torch.ones(3, 6, dtype=torch.bool)
    if ragged:
        mask[0, :2] = mask[1, 3:] = mask[2, 4] = False
    first = naive_of(model, RULES[rule])
    naive = [first, *(Naive(model.state_dict(), CONFIG, fast=first.fast) for _ in range(rows - 1))]
    edit = fw.Edit(site, lambda x, at: bent(x), positions=[1, 2, 4], rows=[0, 2])
    changed, same = twin(site, positions=[1, 2, 4]), twin("none")

    def agrees(logits, exact, real):
        for t, column in enumerate(exact):
            for row, there in enumerate(column):
                assert (there is not None) == bool(real[row, t])
                if there is not None:
                    torch.testing.assert_close(logits[row, t], there, **CLOSE)

    tokens = [[int(i) if m else None for i, m in zip(*pair, strict=True)] for pair in zip(ids, mask, strict=True)]
    exact = columns(naive, tokens, [changed, same, changed], write=True)
    parts = zip(ids.split([2, 4], 1), mask.split([2, 4], 1), strict=True)
    logits = torch.cat([episode.feed(part, edits=edit, attention_mask=real) for part, real in parts], 1)
    agrees(logits, exact, mask)
    for address, fast in first.fast.items():
        torch.testing.assert_close(episode.delta_weight(*address), fast.dW, **CLOSE)
    if site.endswith(("key", "value")):
        return
    edit = fw.Edit(site, lambda x, at: bent(x), rows=1)  # nothing is written here
    exact = columns(naive, ids.tolist(), [same, twin(site), same], write=False)
    agrees(episode.feed(ids, update="none", edits=edit), exact, torch.ones_like(mask))


def test_a_key_that_is_edited_in_a_full_log_is_compressed_as_it_was_edited():
    model = tiny()
    fw.attach(model, [1], HEBB, LINEARS, rank=3, overflow="compress")
    episode, naive = fw.Episode(model), naive_of(model, HEBB, layers=[1])
    edit = fw.ablate("gate.value", positions=[0, 1, 2, 5])  # ΔW of gate has rank 3 at most
    episode.feed([IDS[:6]], edits=edit)
    naive.feed(IDS[:6], twin("gate.value", torch.zeros_like, positions=[0, 1, 2, 5]), write=True)
    torch.testing.assert_close(episode.delta_weight(1, "gate_proj"), naive.fast[1, "gate_proj"].dW, **CLOSE)
    assert episode.events == 6


def test_the_first_generated_token_and_all_later_ones_are_edited():
    model = tiny()
    fw.attach(model, [1, 2], HEBB, LINEARS, rank=32)
    edits = [fw.Edit("z", lambda x, at: bent(x), layers=[0, 3], heads=1), fw.ablate("act", units=[3, 4])]
    change = both(twin("z", layers=[0, 3], heads=[1]), twin("act", torch.zeros_like, units=[3, 4]))
    for update, writes in (("generated", [False] * T), ("all", [True] * T)):
        episode, naive = fw.Episode(model), naive_of(model, HEBB)
        steps = list(episode.generate([IDS], 6, update=update, edits=edits, stop_token_ids=()))
        logits = naive.feed(IDS, change, write=writes)[-1]
        for step in steps:
            torch.testing.assert_close(step.logits[0], logits, **CLOSE)
            assert int(step.token_ids) == int(logits.argmax())
            logits = naive.feed([int(logits.argmax())], change, write=True)[0]
        torch.testing.assert_close(episode.logits[0], logits, **CLOSE)
        torch.testing.assert_close(cached(episode), naive_cache(naive), **CLOSE)
        assert episode.path == "modules"


# ---- the named edits


def reference_of(model, sites, rows=((5, 6, 7, 8), (9, 10))):
    return fw.Episode(model).probe([list(row) for row in rows], sites=sites)


@pytest.mark.parametrize("site", ["resid_pre", "z", "k_rot", "v", "result", "act", "final_norm", "logits", "embedding"])
def test_ablations_steering_and_projections_equal_the_naive_model(site):
    model = tiny()
    reference, episode = reference_of(model, site), fw.Episode(model)
    layered = site in LAYERED
    layers = {"layers": [1, 3]} if layered else {}
    naive_reference = []
    for row in ([5, 6, 7, 8], [9, 10]):
        naive_reference.append(naive_of(model))
        naive_reference[-1].feed(row)

    def pooled(layer):
        return torch.cat([each.stacked(site, layer) for each in naive_reference])

    direction = torch.linspace(-1, 2, reference[site].shape[-1], dtype=torch.float64)
    axes = torch.stack([direction, direction.flip(0) ** 2, 2 * direction])  # of rank two
    unit = torch.linalg.qr(axes[:2].T)[0]
    cases = [
        (fw.ablate(site, **layers), lambda layer, x: torch.zeros_like(x)),
        (fw.ablate(site, "mean", reference, **layers), lambda layer, x: pooled(layer).mean(0)),
        (fw.steer(site, direction, -1.5, **layers), lambda layer, x: x - 1.5 * direction),
        (fw.project_out(site, axes, **layers), lambda layer, x: x - (x @ unit) @ unit.T),
        (
            fw.project_out(site, direction, **layers),
            lambda layer, x: x - (x @ direction)[..., None] * direction / direction.square().sum(),
        ),
    ]
    if layered:
        two = torch.stack([direction, direction.flip(0)])
        cases.append((fw.steer(site, two, 2.0, layers=[3, 1]), lambda layer, x: x + 2 * two[[3, 1].index(layer)]))
    for edit, what in cases:

        def change(name, layer, position, x, what=what):
            return what(layer, x) if name == site and (not layered or layer in (1, 3)) else x

        exact = naive_of(model).feed(IDS, change)
        torch.testing.assert_close(episode.probe(IDS, edits=edit).logits[0], exact, **CLOSE)


def test_a_direction_for_every_layer_is_one_for_each():
    model, each = tiny(), torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    exact = naive_of(model).feed(IDS, lambda s, layer, p, x: x + each[layer] if s == "attn_out" else x)
    edit = fw.steer("attn_out", each)
    each_before = each.clone()
    each.zero_()  # the edit has a copy
    torch.testing.assert_close(fw.Episode(model).probe(IDS, edits=edit).logits[0], exact, **CLOSE)
    one = fw.steer("blocks.2.hook_attn_out", each_before[2])
    exact = naive_of(model).feed(IDS, lambda s, n, p, x: x + each_before[2] if (s, n) == ("attn_out", 2) else x)
    torch.testing.assert_close(fw.Episode(model).probe(IDS, edits=one).logits[0], exact, **CLOSE)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_resample_draws_real_tokens_of_the_reference_the_same_whatever_the_split(split):
    model = tiny()
    reference = reference_of(model, "z")
    edit = fw.ablate("z", "resample", reference, seed=5, layers=2, heads=[0, 2])
    episode, whole = fw.Episode(model), fw.Episode(model)
    with fw.capture(model, "z", layers=2) as seen:
        split_logits = fed(episode, split, IDS, edits=edit)
    torch.testing.assert_close(split_logits, whole.feed([IDS], edits=edit)[0], **CLOSE)
    torch.testing.assert_close(cached(episode), cached(whole), **CLOSE)
    pool = reference["z", 2][reference.positions >= 0]
    assert len(pool) == 6
    drawn = [[n for n, x in enumerate(pool) if torch.allclose(x[[0, 2]], z[[0, 2]])] for z in seen["z", 2][0]]
    assert all(len(each) == 1 for each in drawn)
    assert len({each[0] for each in drawn}) > 2
    other = fw.Episode(model).feed([IDS], edits=fw.ablate("z", "resample", reference, seed=6, layers=2, heads=[0, 2]))
    assert not torch.allclose(other[0], split_logits)
    # a sequence may grow: what is generated draws on, in each row on its own
    rows = fw.Episode(model, 2)
    with fw.capture(model, "z", layers=2, heads=0) as grown:
        list(rows.generate([IDS, IDS], 4, edits=edit, stop_token_ids=()))
    torch.testing.assert_close(grown["z", 2][0, :T, 0], seen["z", 2][0, :, 0], **CLOSE)
    assert not torch.allclose(grown["z", 2][1, :T], grown["z", 2][0, :T])


@pytest.mark.parametrize("site", ["embedding", "resid_pre", "resid_post", "final_norm", "logits"])
def test_patching_everything_gives_the_other_run(site):
    model = tiny()
    clean, other = [IDS, [30, 31, 32]], [[40, 41, 42, 43, 44, 45, 46, 47], [50, 51, 52]]
    source = fw.Episode(model).probe(clean, sites=site)
    layers = {"layers": 2} if site in LAYERED else {}
    exact, episode = fw.Episode(model).probe(clean), fw.Episode(model)
    patched = episode.probe(other, edits=fw.patch(site, source, **layers)).logits
    torch.testing.assert_close(patched[0], exact.logits[0], **CLOSE)
    torch.testing.assert_close(patched[1, :3], exact.logits[1, :3], **CLOSE)


@pytest.mark.parametrize(
    "sites", [["z"], ["pattern", "v"], ["scores", "v"], ["q_rot", "k_rot", "v"], ["attn_out"], ["result"]]
)
def test_patching_all_that_attention_does_and_the_mlps_gives_the_other_run(sites):
    model = tiny()
    source = fw.Episode(model).probe(IDS, sites=[*sites, "embedding", "mlp_out"])
    other = [n + 1 for n in IDS]
    edits = [fw.patch(site, source) for site in (*sites, "embedding", "mlp_out")]
    patched = fw.Episode(model).probe(other, edits=edits).logits
    torch.testing.assert_close(patched, fw.Episode(model).probe(IDS).logits, **CLOSE)
    episode = fw.Episode(model)
    torch.testing.assert_close(fed(episode, [2, 1, 5], other, edits=edits), patched[0], **CLOSE)


def test_a_patch_of_some_places_equals_the_naive_model():
    model = tiny()
    source, naive_source = fw.Episode(model).probe(IDS, sites=["v", "pattern"]), naive_of(model)
    naive_source.feed(IDS)
    other = [n + 2 for n in IDS]

    def change(site, layer, position, x):
        if (site, layer) == ("v", 1) and position in (2, 6):
            x = torch.stack([x[0], naive_source.stacked("v", 1)[position][1]])
        if (site, layer) == ("pattern", 2) and position == 5:
            x = torch.stack([x[0], naive_source.stacked("pattern", 2)[1, 5, :6], *x[2:]])
        return x

    edits = [
        fw.patch("v", source, layers=1, heads=1, positions=[2, 6]),
        fw.patch("pattern", source, layers=2, heads=1, positions=5),
    ]
    exact = naive_of(model).feed(other, change)
    torch.testing.assert_close(fw.Episode(model).probe(other, edits=edits).logits[0], exact, **CLOSE)
    torch.testing.assert_close(fed(fw.Episode(model), [5, 1, 2], other, edits=edits), exact, **CLOSE)


def test_edits_of_the_real_model_while_it_learns_equal_the_naive_model(smollm2, smollm2_folder):
    model, tokenizer = smollm2
    config = json.loads((smollm2_folder / "config.json").read_text())
    ids = tokenizer.encode("The sky is red, and")
    rule, linears = fw.Hebbian(rate=0.02), ["gate_proj", "up_proj", "down_proj"]
    fw.attach(model, [11, 12], rule, linears)
    try:
        plastic = {(layer, linear): described(rule) for layer in (11, 12) for linear in linears}
        naive, episode = Naive(model.state_dict(), config, plastic), fw.Episode(model)
        places = [
            ("resid_mid", {"layers": [3], "units": range(0, 576, 3), "positions": [1, 2]}),
            ("q", {"layers": [5], "heads": [1, 7]}),
            ("pattern", {"layers": [8], "heads": [2]}),
            ("k_rot", {"layers": [10], "heads": [2], "positions": [0, 4]}),
            ("gate", {"layers": [11], "positions": [2, 3]}),
            ("down.read", {"layers": [11, 12], "positions": [4, 5, 6]}),
            ("up.value", {"layers": [12], "positions": [1, 3]}),
            ("z", {"layers": [23], "heads": [3]}),
            ("result", {"layers": [25], "heads": [0], "units": [7, 8]}),
        ]
        edits = [fw.Edit(site, lambda x, at: bent(x), **own) for site, own in places]
        change = both(*(twin(site, **own) for site, own in places))
        logits = torch.cat([episode.feed([ids[:2]], edits=edits), episode.feed([ids[2:]], edits=edits)], 1)[0]
        exact = naive.feed(ids, change, write=True)
        torch.testing.assert_close(logits.double() / exact.abs().max(), exact / exact.abs().max(), rtol=0, atol=1e-4)
        for step in episode.generate(None, 3, edits=edits, stop_token_ids=()):
            assert int(step.token_ids) == int(exact[-1].argmax())
            exact = naive.feed([int(step.token_ids)], change, write=True)
        for address, fast in naive.fast.items():
            ours = episode.delta_weight(*address).double()
            assert float((ours - fast.dW).norm() / fast.dW.norm()) < 1e-4
    finally:
        fw.detach(model)


@pytest.mark.parametrize("seed", range(16))
def test_any_edits_together_in_any_split_equal_the_dense_loop(seed):
    draw = random.Random(seed)
    variant = draw.choice(["grouped", "multi-query", "biases", "head_dim", "llama3 rope", "tied"])
    config = {**CONFIG, **VARIANTS[variant]}
    model, rule, linears = tiny(**VARIANTS[variant]), draw.choice([*RULES]), draw.sample(["gate_proj", "up_proj"], 1)
    layers = draw.sample(range(4), 2)
    fw.attach(model, layers, RULES[rule], linears, rank=64)
    name = linears[0].removesuffix("_proj")
    own = [f"{name}.read"] + ([] if rule == "gradient" else [f"{name}.key", f"{name}.value"])
    edits, changes = [], []
    for site in draw.sample([*LAYERED, *WHOLE, *own], draw.randint(2, 5)):
        places = {}
        if site in LAYERED or site in own:
            places["layers"] = layers[:1] if site in own else draw.sample(range(4), draw.randint(1, 2))
        if draw.random() < 0.6:
            places["positions"] = draw.sample(range(12), draw.randint(1, 6))
        if site in HEADS or site in SQUARE:
            count = config["num_key_value_heads"] if site in GROUPED else 4
            places["heads"] = draw.sample(range(count), draw.randint(1, count))
        if site not in SQUARE and draw.random() < 0.5:
            places["units"] = draw.sample(range(6), 3)
        edits.append(fw.Edit(site, lambda x, at: bent(x), **places))
        changes.append(twin(site, **places))
    naive, episode = naive_of(model, RULES[rule], layers, linears, config), fw.Episode(model)
    ids, written, start = [draw.randrange(61) for _ in range(11)], [draw.random() < 0.7 for _ in range(11)], 0
    exact = naive.feed(ids, both(*changes), write=written)
    found = []
    while start < 11:
        length = draw.randint(1, 11 - start)
        part = slice(start, start + length)
        found.append(episode.feed([ids[part]], update=[written[part]], edits=edits)[0])
        start += length
    torch.testing.assert_close(torch.cat(found), exact, **CLOSE)
    torch.testing.assert_close(cached(episode), naive_cache(naive), **CLOSE)
    for address, fast in naive.fast.items():
        torch.testing.assert_close(episode.delta_weight(*address), fast.dW, **CLOSE)
    asked = [edit for edit in edits if not edit.places.site.name.endswith((".key", ".value"))]
    ids += ids[:1]  # a probe refuses positions that it does not have
    swept = episode.probe(ids, sweep=[[], asked])
    for number, each in enumerate(([], changes)):
        naive.restart()
        torch.testing.assert_close(swept.logits[number, 0], naive.feed(ids, both(*each)), **CLOSE)


def test_an_edited_resid_mid_flows_on_where_somebodys_hook_gives_the_norm_another_tensor():
    model, ids = tiny(), prompt(1, 5)
    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda _module, args: (args[0] * 1.0,))
    exact = fw.Episode(model).probe(ids, sites="resid_mid")["resid_mid", 1]
    edit = fw.Edit("resid_mid", lambda x, at: x + 1, layers=1)
    zero = fw.ablate("mlp_out", layers=1)
    trace = fw.Episode(model).probe(ids, sites=["resid_mid", "resid_post"], edits=[edit, zero])
    torch.testing.assert_close(trace["resid_mid", 1], exact + 1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace["resid_post", 1], exact + 1, rtol=1e-12, atol=1e-12)
