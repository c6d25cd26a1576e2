"""The hand-written backward of a gradient rule's token: against autograd, central differences, and float64."""

import pytest
import torch
from tiny import prompt, tiny

import fastweights as fw
from fastweights.episode_state import Graph, Taped
from fastweights.kernels.cpu import MOST_ROWS
from fastweights.kernels.linear import LEAST_WEIGHTS, product_back
from fastweights.model import Attention

RULE = fw.GradientAscent(rate=0.3, decay=0.05)
ALL = ("gate_proj", "up_proj", "down_proj")
MODELS = {
    "grouped": {},
    "full": {"num_key_value_heads": 4},
    "one-head-of-keys": {"num_key_value_heads": 1},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide-heads": {"head_dim": 10},
}
PLACES = {
    "all": [([1, 2], ALL)],
    "one-down": [([2], ["down_proj"])],
    "first-and-last": [([0, 3], ["up_proj"])],
    "top-gate": [([3], ["gate_proj"])],
}


def observed(model):
    """A hook that changes nothing: autograd has to differentiate the token then."""
    return model.model.layers[0].register_forward_hook(lambda *_: None)


def episodes(*plastic, rows=1, dtype=torch.float64, shared=False, **changes):
    """Two lives alike: one on the tape, one on autograd's graph."""
    lives = []
    for graph in (False, True):
        model = tiny(dtype, **changes)
        for layers, rule, linears in plastic:
            fw.attach(model, layers, rule, linears, rank=64)
        if graph:
            observed(model)
        lives.append(fw.Episode(model, rows, shared=shared))
    return lives


def ragged(episode, rows=3, steps=8, seed=3):
    """Logits of single tokens, some of them padding, some of them not written."""
    random, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        real = torch.rand(rows, 1, generator=random) < 0.7
        real[0] = True
        ids, write = torch.randint(61, (rows, 1), generator=random), torch.rand(rows, 1, generator=random) < 0.8
        found.append(episode.feed(ids, write, attention_mask=real)[real])
    return torch.cat(found)


def close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def same_events(ours, theirs):
    assert ours.event_counts == theirs.event_counts
    assert ours.events > 0
    for address, log in ours.logs.items():
        for part, exact in zip(log.factors(), theirs.logs[address].factors(), strict=True):
            close(part, exact)


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_autograd_to_rounding(name, places):
    plastic = [(layers, RULE, linears) for layers, linears in PLACES[places]]
    ours, theirs = episodes(*plastic, **MODELS[name])
    for life in (ours, theirs):
        life.feed(prompt(1, 7))
    assert isinstance(ours.state.waiting[0].how, Taped)
    assert isinstance(theirs.state.waiting[0].how, Graph)
    close(ours.feed(prompt(1, 3)), theirs.feed(prompt(1, 3)))
    same_events(ours, theirs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_in_ragged_rows_and_between_linears_that_write_at_once_as_well(mixed, shared):
    """Copies are kept of what a log may not hold until the next token is known."""
    other = fw.Hebbian(rate=0.2, decay=0.1, bias=True) if mixed else fw.GradientAscent(0.1, 0.1, clip=0.2, bias=True)
    ours, theirs = episodes(([1, 3], RULE, ["up_proj"]), ([2], other, ALL), rows=3, shared=shared)
    close(ragged(ours), ragged(theirs))
    same_events(ours, theirs)


def test_it_is_what_central_differences_find():
    """A bias of the last token's pass alone is a change of its a: earlier keys and values stay."""
    model = tiny(mlp_bias=True, attention_bias=True)
    fw.attach(model, [1, 2], fw.GradientAscent(rate=1.0), ALL)
    episode, (token, following) = fw.Episode(model), (17, 5)
    episode.feed(prompt(1, 6))
    before = episode.snapshot()
    episode.feed([token])
    known = {address: list(counts) for address, counts in episode.event_counts.items()}
    episode.feed([following], update="none")
    for (layer, name), log in episode.logs.items():
        assert log.event_counts[0] == known[layer, name][0] + 1
        slope_O, other = log.U_BRO[0, log.event_counts[0] - 1].clone(), fw.Episode(model)
        bias = model.model.layers[layer].mlp.get_parameter(f"{name}.bias")
        for neuron in (0, 7, 20):
            found = []
            for change in (1e-5, -2e-5):
                bias[neuron] += change
                other.restore(before)
                found.append(float(other.feed([token], "none")[0, 0].log_softmax(-1)[following]))
            bias[neuron] += 1e-5
            assert (found[0] - found[1]) / 2e-5 == pytest.approx(float(slope_O[neuron]), rel=1e-6, abs=1e-9)


def half_errors(dtype, *lives):
    """The relative error of each life's values against float64, the mean over prompts and linears."""
    errors = []
    for seed in range(4):
        exact, _ = episodes(([1, 2], RULE, ALL))
        made = [make(dtype) for make in lives]
        exact.model.load_state_dict(made[0].model.state_dict())
        for life in (exact, *made):
            life.feed(prompt(1, 9, seed))
        values = [[log.factors()[0][0].double() for log in life.logs.values()] for life in (exact, *made)]
        errors.append(
            [[float((u - v).norm() / v.norm()) for u, v in zip(one, values[0], strict=True)] for one in values[1:]]
        )
    return torch.tensor(errors).mean((0, 2)).tolist()


def on_c(dtype):
    return episodes(([1, 2], RULE, ALL), dtype=dtype)[0]


def on_the_modules(dtype):
    episode = on_c(dtype)
    del episode.engine.paths[1]
    return episode


def by_autograd(dtype):
    return episodes(([1, 2], RULE, ALL), dtype=dtype)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_no_worse_than_autograd(dtype):
    fused, modules, autograd = half_errors(dtype, on_c, on_the_modules, by_autograd)
    assert modules < autograd
    assert fused < 1.2 * autograd
    assert autograd < 0.05


def test_an_undo_while_it_waits_leaves_the_gradient_as_it_was_read():
    ours, theirs = episodes(([1, 2], RULE, ALL))
    for life in (ours, theirs):
        life.feed(prompt(1, 8))
        life.undo(4)
        life.undo(1)
        life.feed(prompt(1, 2))
    same_events(ours, theirs)


def test_a_log_that_somebody_else_changed_is_refused():
    ours, _ = episodes(([1, 2], RULE, ALL))
    ours.feed(prompt(1, 8))
    ours.logs[2, "up_proj"].rewind([3])
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj was changed since, from 7 to 3 events"):
        ours.feed([4])


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_step_in_c_leaves_the_tape_that_the_modules_leave(name, rows):
    """float32 against autograd in float64."""
    places = [([1, 3], fw.GradientAscent(rate=0.05, decay=0.05), ALL)]
    exact, _ = episodes(*places, rows=rows, **MODELS[name])
    ours, _ = episodes(*places, rows=rows, dtype=torch.float32, **MODELS[name])
    exact.model.load_state_dict(ours.model.state_dict())
    for life in (exact, ours):
        life.feed(prompt(rows, 6))
    close(ragged(ours, rows).double(), ragged(exact, rows), 1e-4)
    assert (ours.path, exact.path) == ("cpu", "modules")
    assert ours.event_counts == exact.event_counts
    for address, log in ours.logs.items():
        for part, other in zip(log.factors(), exact.logs[address].factors(), strict=True):
            close(part.double(), other, 1e-4)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize(("O", "I"), [(257, 300), (300, 257), (2, 40000), (577, 128), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_of_a_gradient_and_a_weight_is_that_of_float64(dtype, O, I, rows, threads):
    random, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    weight, d = torch.randn(O, I, generator=random).to(dtype), torch.randn(rows, O, generator=random)
    torch.set_num_threads(threads)
    with torch.no_grad():
        y = product_back(d, weight)
    torch.set_num_threads(before)
    exact = d.double() @ weight.double()
    rounding = torch.finfo(dtype if rows > MOST_ROWS or O * I < LEAST_WEIGHTS else torch.float32).eps
    assert y.dtype == torch.float32
    assert float((y - exact).norm() / exact.norm()) < 8 * rounding


class Own(Attention):
    def forward(self, *arguments):
        return 2 * super().forward(*arguments)


@pytest.mark.parametrize("how", ["hook", "forward", "module", "edit", "capture"])
def test_what_the_tape_does_not_know_is_left_to_autograd_and_says_so(how):
    model = tiny(torch.float32)
    fw.attach(model, [1], RULE)
    layer, ids = model.model.layers[3], prompt(1, 4)
    episode = fw.Episode(model)
    match how:
        case "hook":
            layer.mlp.register_forward_hook(lambda module, inputs, out: 2 * out)
        case "forward":
            layer.mlp.forward = lambda x: 2 * type(layer.mlp).forward(layer.mlp, x)
        case "module":
            layer.self_attn.__class__ = Own
    if how == "capture":
        with fw.capture(model, "resid_post"):
            episode.feed(ids)
    else:
        episode.feed(ids, edits=[fw.ablate("z", layers=3)] if how == "edit" else [])
    assert isinstance(episode.state.waiting[0].how, Graph)
    assert episode.path == "modules"
    reasons = {"module": "a module that the step in C does not know: Own", "edit": "edits or a capture"}
    assert reasons.get(how, "edits or a capture" if how == "capture" else "there are hooks") in episode.why["cpu"]
