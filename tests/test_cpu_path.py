"""The path "cpu" against the modules it stands in for, and against the float64 oracle; and when it must not run."""

import copy
import pickle

import pytest
import torch
from oracle import Oracle
from tiny import CONFIG, described, prompt, tiny

import fastweights as fw
from fastweights.engine import table
from fastweights.kernels.cpu import library
from fastweights.model import Linear

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = {
    "grouped": {},
    "full": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide head": {"head_dim": 34},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}
RULES = {
    "hebbian": fw.Hebbian(rate=0.05),
    "everything": fw.Hebbian(rate=0.1, mu=0.3, gate="derivative", decay=0.1, clip=0.02, bias=True),
    "slow": fw.LocalLeastSquares(gamma=0.3, target="slow", gate="positive"),
    "delta": fw.Delta(beta=0.2, target=torch.linspace(-1, 1, 24)),
}


class Own:
    """A user's rule: no twin."""

    rate, mu, decay, clip, bias, neuron_local = 0.1, 1e-3, 0.05, None, False, True

    def value(self, a, z, at):
        return torch.tanh(z) - 0.1 * at.frozen_a


@pytest.fixture
def steps(monkeypatch):
    """How often C has run."""
    calls = []
    real = table.decode
    monkeypatch.setattr(table, "decode", lambda *args: (calls.append(len(args[5])), real(*args))[1])
    return calls


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request):
    """More of them than some shapes have heads or rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def relative(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_frozen_steps_equal_one_pass_of_a_float64_model(shape, rows, steps):
    ids = prompt(rows, 40)
    model, exact = tiny(F32, **SHAPES[shape]), tiny(**SHAPES[shape])
    episode = fw.Episode(model, rows)
    found = torch.cat([episode.feed(ids[:, t : t + 1]) for t in range(40)], dim=1)
    assert steps == [rows] * 40
    assert relative(found, exact(ids)) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", [None, RULES["everything"]], ids=["frozen", "plastic"])
def test_bfloat16_steps_round_where_the_modules_do(shape, rule, steps):
    """Sums of another order round to a neighbour now and then, and torch's attention rounds its scores: so neither has
    the other's bits, and neither is nearer to float64. With one token to look at they are nearly the same."""
    ids, runs = prompt(2, 40), []
    exact = tiny(**SHAPES[shape])
    exact.load_state_dict({k: v.bfloat16() for k, v in exact.state_dict().items()})
    models = [tiny(BF16, **SHAPES[shape]), tiny(BF16, **SHAPES[shape]), exact]
    models[1].model.norm.register_forward_hook(lambda *_: None)
    for model in models:
        if rule:
            fw.attach(model, [0, 2], rule, rank=8)
        episode = fw.Episode(model, 2)
        logits = torch.cat([episode.feed(ids[:, t : t + 1]) for t in range(40)], dim=1)
        runs.append([logits, *(episode.delta_weight(2, "up_proj", row) for row in (0, 1) if rule)])
    assert steps == [2] * 40
    for fused_, modules, wanted in zip(*runs, strict=True):
        assert fused_.dtype == modules.dtype
        assert relative(fused_, wanted) < 1.25 * relative(modules, wanted)
        assert relative(fused_, modules) < 0.015
    assert relative(runs[0][0][:, 0], runs[1][0][:, 0]) < 0.005


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rows", [1, 2])
def test_plastic_steps_equal_the_oracle(name, rows, steps):
    rule, linears = RULES[name], ("gate_proj", "up_proj", "down_proj")
    if name == "delta":
        linears = ("down_proj",)
    model = tiny(F32)
    fw.attach(model, [1, 3], rule, linears=linears)
    ids, update = prompt(rows, 30), [0, 1, 4, *range(6, 25), 29]
    episode = fw.Episode(model, rows)
    found = torch.cat([episode.feed(ids[:, t : t + 1], update=update) for t in range(30)], dim=1)
    assert len(steps) == 30
    plastic = {(layer, linear): described(rule) for layer in (1, 3) for linear in linears}
    for row in range(rows):
        oracle = Oracle({k: v.double() for k, v in model.state_dict().items()}, CONFIG, plastic)
        exact = oracle.feed(ids[row].tolist(), [t in update for t in range(30)])
        assert relative(found[row], exact) < 1e-5
        for site in plastic:
            assert relative(episode.delta_weight(*site, row), oracle.dW[site]) < 1e-4


@pytest.mark.parametrize("overflow", ["compress", "evict", "grow"])
@pytest.mark.parametrize("rule", [RULES["hebbian"], RULES["everything"], Own()], ids=["hebbian", "everything", "own"])
def test_fused_and_modules_agree_past_the_capacity(rule, overflow, steps):
    ids, mask = prompt(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, 7:11] = mask[0, 30] = 0
    runs = []
    for hooks in (False, True):
        model = tiny(F32)
        fw.attach(model, [0, 2], rule, rank=8, overflow=overflow)
        if hooks:
            model.model.norm.register_forward_hook(lambda *_: None)
        episode = fw.Episode(model, 2)
        logits = [episode.feed(ids[:, :5])]
        for t in range(5, 60):
            column = slice(t, t + 1)
            update = "none" if t % 5 == 0 else "all"
            logits.append(episode.feed(ids[:, column], update=update, attention_mask=mask[:, column]))
        runs.append((torch.cat(logits, 1)[mask.bool()], *(episode.delta_weight(2, "up_proj", row) for row in (0, 1))))
    assert len(steps) == 55  # all of the first run
    for found, exact in zip(*runs, strict=True):
        assert relative(found, exact) < 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_rate_of_zero_and_no_update_give_the_bits_of_the_plain_model(dtype, steps):
    ids, plain = prompt(1, 12), tiny(dtype)
    cache = plain.new_cache(1)
    exact = torch.cat([plain(ids[:, t : t + 1], cache=cache) for t in range(12)], dim=1)
    for rate, update in ((0.0, "all"), (0.5, "none")):
        model = tiny(dtype)
        fw.attach(model, [1, 2], fw.Hebbian(rate=rate))
        episode = fw.Episode(model)
        assert torch.equal(torch.cat([episode.feed(ids[:, t], update=update) for t in range(12)], dim=1), exact)
    assert torch.equal(plain(ids[:, :1]), exact[:, :1])  # without a cache
    assert len(steps) == 37


def hook_forward(model):
    return model.model.layers[2].mlp.up_proj.register_forward_hook(lambda *_: None).remove


def hook_before(model):
    return model.model.layers[0].register_forward_pre_hook(lambda *_: None).remove


def hook_globally(model):
    return torch.nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def patch_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)
    return lambda: mlp.__dict__.pop("forward")


def replace_module(model):
    class Other(Linear):
        pass

    attention = model.model.layers[1].self_attn
    old, new = attention.q_proj, Other(24, 24, bias=False)
    new.weight = old.weight
    attention.q_proj = new
    return lambda: setattr(attention, "q_proj", old)


def plastic_meanwhile(model):
    fw.attach(model, [1], fw.GradientAscent(rate=0.1))
    fw.attach(model, [2], fw.Hebbian(rate=0.1))  # which writes at once
    return lambda: fw.detach(model)


@pytest.mark.parametrize(
    "change", [hook_forward, hook_before, hook_globally, patch_forward, replace_module, plastic_meanwhile]
)
def test_modules_run_while_anything_of_the_users_would(change, steps):
    model, ids = tiny(F32), prompt(1, 3)

    def run():
        episode = fw.Episode(model)
        return torch.cat([episode.feed(ids[:, t]) for t in range(3)], dim=1)

    before = run()
    undo = change(model)
    assert len(steps) == 3
    during = run()
    assert len(steps) == 3
    if change is not plastic_meanwhile:
        torch.testing.assert_close(during, before, rtol=1e-5, atol=1e-5)
    undo()
    assert torch.equal(run(), before)
    assert len(steps) == 6


def test_float64_half_gradients_and_many_rows_go_through_the_modules(steps):
    tiny(torch.float64)(prompt(1, 1))
    tiny(torch.float16)(prompt(1, 1))
    tiny(F32)(prompt(9, 1))
    model = tiny(F32).requires_grad_(True)
    model(prompt(1, 1)).sum().backward()
    assert model.lm_head.weight.grad is not None
    assert steps == []


def test_changed_moved_and_copied_weights_are_seen(steps):
    model, ids = tiny(F32), prompt(1, 1)
    model(ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[1].mlp.up_proj.weight.mul_(2)
        twin.lm_head.weight.data = torch.cat([twin.lm_head.weight * 3])
    found, steps_run = twin(ids), len(steps)
    twin.model.norm.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(found, twin(ids), rtol=1e-5, atol=1e-5)
    assert steps_run == len(steps) == 2


def test_without_a_compiler_the_modules_run(steps, monkeypatch):
    library.cache_clear()
    monkeypatch.setenv("FASTWEIGHTS_CC", "")
    try:
        tiny(F32)(prompt(1, 1))
        assert steps == []
    finally:
        library.cache_clear()


def test_a_growing_cache_and_ended_rows_keep_their_numbers(steps):
    model, exact = tiny(F32, max_position_embeddings=600), tiny(max_position_embeddings=600)
    ids, mask = prompt(2, 290), torch.ones(2, 290, dtype=torch.long)
    mask[1, 260:] = 0
    episode = fw.Episode(model, 2)
    episode.feed(ids[:, :250])
    found = [episode.feed(ids[:, t : t + 1], attention_mask=mask[:, t : t + 1]) for t in range(250, 290)]
    assert len(steps) == 40
    assert episode.lengths == [290, 260]
    assert relative(torch.cat(found, 1)[0], exact(ids[:1])[0, 250:]) < 2e-6
    assert relative(torch.cat(found[:10], 1)[1], exact(ids[1:])[0, 250:260]) < 2e-6


def test_an_event_that_is_not_finite_is_refused_by_name_and_leaves_nothing(steps):
    model, ids = tiny(F32), prompt(1, 6)
    fw.attach(model, [1], fw.Hebbian(rate=0.1))
    episode = fw.Episode(model)
    for t in range(5):
        episode.feed(ids[:, t])
    before = episode.snapshot()
    kept = model.model.embed_tokens.weight[7].clone()
    model.model.embed_tokens.weight[7] = float("inf")
    with pytest.raises(ValueError, match=r"event 6 of layers.1.mlp.gate_proj \(row 0\) has a non-finite factor"):
        episode.feed([7])
    model.model.embed_tokens.weight[7] = kept
    assert len(steps) == 6
    assert (episode.length, episode.events) == (5, 5)
    after = episode.feed(ids[:, 5])
    episode.restore(before)
    assert torch.equal(episode.feed(ids[:, 5]), after)


def test_what_a_dead_slot_holds_is_not_read(steps):
    model, ids = tiny(F32), prompt(2, 9)
    fw.attach(model, [1], fw.Hebbian(rate=0.1))
    runs = []
    for poison in (False, True):
        episode = fw.Episode(model, 2)
        update = torch.ones(2, 8, dtype=torch.bool)
        update[0, 3:] = False
        episode.feed(ids[:, :8], update=update)  # row 0 has three events, row 1 eight
        if poison:
            for log in episode.logs.values():
                log.U_BRO[0, 3:] = log.K_BRI[0, 3:] = float("nan")
        looks = torch.cat([episode.delta_weight(1, "up_proj", row).flatten() for row in (0, 1)])
        runs.append((episode.feed(ids[:, 8:]), looks, torch.tensor(episode.logs[1, "gate_proj"].effective_rank(0))))
    assert len(steps) == 2
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_rule_given_to_one_linear_later_is_seen():
    ids, runs = prompt(1, 12), []
    for hooks in (False, True):
        model = tiny(F32)
        fast = fw.attach(model, [1, 2], fw.Hebbian(rate=0.1))
        if hooks:
            model.model.norm.register_forward_hook(lambda *_: None)
        episode = fw.Episode(model)
        for t in range(12):
            if t == 6:
                fast.linears[2, "up_proj"].rule = fw.Hebbian(rate=-0.3)
            logits = episode.feed(ids[:, t])
        runs.append(logits)
    assert relative(*runs) < 1e-5


def test_a_deep_copy_is_a_fork_and_a_pickle_is_refused():
    model, ids = tiny(F32), prompt(1, 12)
    fw.attach(model, [1, 2], fw.Hebbian(rate=0.1))
    episode = fw.Episode(model)
    for t in range(6):
        episode.feed(ids[:, t])
    runs = [[one.feed(ids[:, t]) for t in range(6, 12)] for one in (copy.deepcopy(episode), episode.fork(), episode)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    for refused in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match=r"save\(\) and load\(\) it, or fork\(\) it"):
            refused(episode)
