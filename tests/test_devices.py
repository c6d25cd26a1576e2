"""Every public call, with the model on one device and what it is given on another: the numbers of the CPU alone.

`everywhere` runs a scenario with everything on the CPU, with the model on the test device and what is given on the CPU,
and the other way round, and compares all that it returns. `both` puts both on the test device as well. Where there is
a GPU, it takes the test device's place.
"""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from other_device import OTHER, counting, moved
from tiny import prompt, tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import fastweights as fw
from fastweights.kernels import read, scan, values
from fastweights.tokenizer import Tokenizer

CPU = torch.device("cpu")
AWAY = torch.device("cuda", 0) if torch.cuda.is_available() else OTHER
ALL = ("gate_proj", "up_proj", "down_proj")
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0]])
WRITE = torch.tensor([[1, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 0, 1, 1], [0, 0, 1, 1, 1, 0, 1]]).bool()
TARGETS = torch.linspace(-1, 1, 3 * 40 * 24, dtype=torch.float64).reshape(3, 40, 24)


def same(found, expected, where="it"):
    """All that a scenario gave, tensors on any device."""
    assert type(found) is type(expected) or isinstance(found, torch.Tensor), where
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-11, atol=1e-11, equal_nan=True)
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for n, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{where}[{n}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-11, nan_ok=True), where
    else:
        assert found == expected, where


def on_cpu(x):
    """All that a scenario gave, on the CPU."""
    if isinstance(x, torch.Tensor):
        return x.cpu()
    if isinstance(x, dict):
        return {key: on_cpu(value) for key, value in x.items()}
    return [on_cpu(each) for each in x] if isinstance(x, list) else x


def everywhere(scenario, both=False):
    """scenario(model's device, device of what is given) gives the same wherever the two are."""
    expected = scenario(CPU, CPU)
    for places in ((AWAY, CPU), (CPU, AWAY), *[(AWAY, AWAY)] * both):
        same(scenario(*places), expected)


def model_at(device, dtype=torch.float64, **changes):
    model = tiny(dtype, num_hidden_layers=2, **changes)
    return moved(model, device) if device != CPU else model


def plastic(device, rule, rows=1, linears=ALL, rank=4, overflow="grow", shared=False, dtype=torch.float64, **options):
    model = model_at(device, dtype)
    fw.attach(model, 1, rule, linears, rank=rank, overflow=overflow, **options)
    return fw.Episode(model, rows, shared=shared)


def state(episode):
    """All that an episode holds, but what lies in scratch places."""
    assert episode.logits is None or episode.logits.device == episode.model.device
    rows = range(1 if episode.shared else episode.batch_size)
    found = {
        "lengths": episode.lengths,
        "events": {str(address): counts for address, counts in episode.event_counts.items()},
        "ids": episode.token_ids,
        "logits": episode.logits,
        "drift": [each | {"capacity": 0, "bytes": 0} for each in episode.drift().to_list()],  # those are of buffers
    }
    for address in episode.logs:
        found[str(address)] = [episode.delta_weight(*address, row) for row in rows]
        found[f"{address} certificate"] = [list(episode.logs[address].certificate(row)) for row in rows]
    for row, length in enumerate(episode.lengths):
        kept = (episode.cache.keys, episode.cache.values)
        found[f"cache of row {row}"] = [buffer[row, :, :length] for each in kept for buffer in each]
    return found


def trace_of(trace):
    """All that a trace holds."""
    scores = trace.scores
    return {
        "sites": trace.sites,
        "gradients": trace.gradients,
        "layers": trace.layers,
        "ids": trace.input_ids,
        "positions": trace.positions,
        "metric": trace.metric,
        "scores": None if scores is None else [scores.logprob, scores.rank],
    }


def as_given(device, trace):
    """A trace as an episode on that device gives it."""
    sites = {name: tensor.to(device) for name, tensor in trace.sites.items()}
    return fw.Trace(sites, trace.layers, trace.input_ids, trace.positions)


# ---- reading and writing


RULES = {
    "hebbian": fw.Hebbian(rate=0.3, mu=0.1, gate="derivative", decay=0.1, clip=0.05, bias=True),
    "a rate per row": fw.Hebbian(rate=(0.3, 0.0, 0.1)),
    "self": fw.LocalLeastSquares(gamma=0.3, mu=0.1, gate="positive"),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow", clip=0.5),
    "gradient": fw.GradientAscent(rate=0.3, decay=0.05, bias=True, mu=0.1),
}


def life(episode, ids, mask, write, at):
    """A ragged prompt, steps with padding, and a longer part: what they give, and the state behind them."""
    given = [x.to(at) for x in (ids, mask, write)]
    found = [episode.feed(given[0], update=given[2], attention_mask=given[1])[mask.bool()]]
    for t in (0, 1, 3):
        column = [x[:, t : t + 1] for x in given]
        found.append(episode.feed(column[0], update=column[2], attention_mask=column[1])[mask[:, t].bool()])
    found.append(episode.feed(given[0][:, :2], logits="last"))
    assert {x.device for x in found} == {episode.model.device}
    return [found, state(episode)]


@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
@pytest.mark.parametrize("name", RULES)
def test_a_ragged_life_by_every_rule_and_overflow(name, overflow):
    def scenario(model, given):
        return life(plastic(model, RULES[name], 3, overflow=overflow), prompt(3, 7), MASK, WRITE, given)

    everywhere(scenario)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["hebbian", "slow"])
def test_a_ragged_life_with_folds_in_the_narrow_dtypes(name, dtype):
    """Folds of float32 factors go by Gram matrices, half of which the CPU does."""

    def scenario(model, given):
        episode = plastic(model, RULES[name], 3, overflow="compress", dtype=dtype)
        found = life(episode, prompt(3, 7), MASK, WRITE, given)[0]
        weights = [episode.delta_weight(*address, row) for address in episode.logs for row in range(3)]
        assert {log.dtype for log in episode.logs.values()} == {torch.float32}
        return [x.float().flatten() for x in (*found, *weights)]

    expected = scenario(CPU, CPU)
    for places in ((AWAY, CPU), (CPU, AWAY)):
        for x, wanted in zip(scenario(*places), expected, strict=True):
            assert float((x.cpu() - wanted).norm()) <= (1e-4 if dtype == torch.float32 else 5e-2) * float(wanted.norm())


@pytest.mark.parametrize("options", [{"archive": True}, {"budget": 0.02}, {"budget": 0.02, "archive": True}], ids=str)
@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
def test_an_archive_and_a_budget(overflow, options):
    def scenario(model, given):
        episode = plastic(model, RULES["hebbian"], 3, overflow=overflow, **options)
        lived = life(episode, prompt(3, 7), MASK, WRITE, given)
        found = [lived, [log.scaled for log in episode.logs.values()]]
        oldest = max(log.oldest_exact_moment(row) for log in episode.logs.values() for row in range(3))
        fewest = min(count for counts in episode.event_counts.values() for count in counts)
        if fewest > oldest:
            trace = episode.probe(prompt(1, 4).to(given), at=torch.tensor([oldest, fewest]).to(given))
            found.append(trace_of(trace))
            episode.undo(fewest - oldest)
            found.append(state(episode))
        return found

    everywhere(scenario)


def test_a_budget_that_stops_is_refused_in_the_same_words():
    def scenario(model, given):
        episode = plastic(model, fw.Hebbian(rate=0.3), 2, budget=0.02, over_budget="stop")
        with pytest.raises(ValueError, match="over its budget") as refused:
            episode.feed(prompt(2, 9).to(given))
        return [str(refused.value), state(episode)]

    everywhere(scenario)


def test_a_full_log_and_an_event_that_is_not_finite_are_refused_in_the_same_words():
    def scenario(model, given):
        episode = plastic(model, fw.Hebbian(rate=0.3), 2, overflow="error")
        episode.feed(prompt(2, 2).to(given))
        with pytest.raises(ValueError, match="do not fit its rank of 4") as full:
            episode.feed(prompt(2, 3).to(given))
        weight = episode.model.model.embed_tokens.weight
        kept = weight[7].clone()
        weight[7] = math.nan
        with pytest.raises(ValueError, match="has a non-finite factor") as wrong:
            episode.feed(torch.tensor([[5, 6], [3, 7]]).to(given))
        weight[7] = kept
        return [str(full.value), str(wrong.value), episode.feed(prompt(2, 1).to(given)), state(episode)]

    everywhere(scenario)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("target", [TARGETS[0, 0], TARGETS[0], TARGETS], ids=["[O]", "[P, O]", "[B, P, O]"])
def test_targets_of_a_delta_rule(target, shared):
    def scenario(model, given):
        rule = fw.Delta(0.3, target.to(given), mu=0.1)
        return life(plastic(model, rule, 3, ["down_proj"], shared=shared), prompt(3, 7), MASK, WRITE, given)

    everywhere(scenario)


@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
@pytest.mark.parametrize("name", ["hebbian", "slow", "gradient"])
def test_rows_that_share_their_fast_weights(name, overflow):
    def scenario(model, given):
        episode = plastic(model, RULES[name], 3, overflow=overflow, shared=True)
        lived = life(episode, prompt(3, 7), MASK, WRITE, given)
        return [lived, trace_of(episode.probe(prompt(2, 4).to(given), sites="resid_post"))]

    everywhere(scenario)


def test_a_rule_of_ones_own_sees_the_models_device():
    class Own:
        rate, mu, decay, clip, bias, neuron_local = 0.3, 0.1, 0.0, None, False, True

        def value(self, a, z, at):
            assert {t.device for t in (a, z, at.frozen_a, at.position)} == {a.device}
            return z * (at.position % 2)[..., None]

    everywhere(lambda model, given: life(plastic(model, Own(), 3), prompt(3, 7), MASK, WRITE, given))


UPDATES = {
    "none": lambda at: "none",
    "positions": lambda at: torch.tensor([0, 2, 5]).to(at),
    "list": lambda at: [0, torch.tensor(2).to(at), 5],
    "range": lambda at: range(2, 4),
    "mask": lambda at: WRITE.to(at),
    "mask of one row": lambda at: WRITE[0].to(at),
    "token ids": lambda at: fw.token_ids(prompt(3, 7)[0, :3].to(at)),
    "function": lambda at: lambda position, token: position % 2 == 0 and token > 5,
}


@pytest.mark.parametrize("name", UPDATES)
def test_every_form_of_update(name):
    def scenario(model, given):
        episode = plastic(model, fw.Hebbian(rate=0.3), 3)
        return [episode.feed(prompt(3, 7), update=UPDATES[name](given)), state(episode)]

    everywhere(scenario)


ROWS = [prompt(3, 7)[row, :n] for row, n in enumerate((7, 4, 2))]
FORMS = {
    "tensor and mask": lambda at: (prompt(3, 7).to(at), MASK.to(at)),
    "tensor and bool mask": lambda at: (prompt(3, 7).int().to(at), MASK.bool().to(at)),
    "tensor and list": lambda at: (prompt(3, 7).to(at), MASK.tolist()),
    "list and mask": lambda at: (prompt(3, 7).tolist(), MASK.to(at)),
    "array and mask": lambda at: (prompt(3, 7).numpy(), MASK.to(at)),
    "ragged rows": lambda at: ([row.to(at) for row in ROWS], None),
    "ragged lists": lambda at: ([[token.to(at) for token in row] for row in ROWS], None),
    "what a tokenizer gave": lambda at: ({"input_ids": prompt(3, 7).to(at), "attention_mask": MASK.to(at)}, None),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_ids_and_masks_in_feed_generate_and_probe(name):
    def scenario(model, given):
        ids, mask = FORMS[name](given)
        episode = plastic(model, fw.Hebbian(rate=0.3), 3)
        logits = episode.feed(ids, attention_mask=mask, logits="last")
        steps = [step.logits for step in episode.generate(ids, 2, attention_mask=mask, stop_token_ids=())]
        return [logits, steps, trace_of(episode.probe(ids, "z", attention_mask=mask)), state(episode)]

    everywhere(scenario, both=True)


@pytest.mark.parametrize("cached", [False, True])
def test_the_model_itself_takes_ids_and_a_mask_from_anywhere(cached):
    def scenario(at, given):
        model, real = model_at(at), MASK.bool()
        cache = model.new_cache(3) if cached else None
        found = [model(prompt(3, 7).to(given), MASK.to(given), cache)[real]]
        found += [model(prompt(3, n).to(given), None, cache, logits="last") for n in (1, 7)]
        assert {x.device for x in found} == {at}
        return [found, None if cache is None else cache.lengths]

    everywhere(scenario)


SAMPLING = {
    "greedy": {},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 5},
    "a seed per row": {"temperature": 1.0, "seed": [3, 4, 3]},
    "penalty": {"repetition_penalty": 1.7},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_generation_with_every_option(name):
    def scenario(model, given):
        episode = plastic(model, fw.Hebbian(rate=0.3), 3)
        options = {"stop_token_ids": torch.arange(12).to(given), "update": "all", **SAMPLING[name]}
        steps = list(episode.generate(prompt(3, 7).to(given), 8, attention_mask=MASK.to(given), **options))
        assert {step.token_ids.device for step in steps} == {CPU}
        assert {step.logits.device for step in steps} == {episode.model.device}
        return [[[s.token_ids, s.logits, s.ended, s.finish_reason] for s in steps], state(episode)]

    everywhere(scenario)


def test_sampling_by_itself():
    logits = 3 * torch.randn(4, 61, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}

    def scenario(_, given):
        episode = fw.Episode(tiny(), 4)
        sampling, seen = fw.Sampling(**options), [[3, 4], [], [60], [1, 1]]
        drawn = sampling.choose(logits.to(given), seen, torch.Generator().manual_seed(1))
        assert drawn.device == given
        return [drawn, sampling.choose(logits.to(given), seen, episode.generator), sampling.filtered(logits.to(given))]

    everywhere(scenario)


@pytest.mark.parametrize("name", ["hebbian", "gradient"])
@pytest.mark.parametrize("at", [CPU, AWAY], ids=str)
def test_torchs_default_device_changes_nothing(at, name, tokenizer, tmp_path):
    """`torch.set_default_device("cuda")` is what many a notebook begins with; host data stay on the CPU."""
    ids, write, place = prompt(3, 7), WRITE, tmp_path / "life.safetensors"
    exam = fw.Exam(tokenizer, ["the sky is", "the sky and goes"], [["blue", "dark and"], ["red", "green"]])
    edits = [fw.ablate("z", layers=1, rows=[0, 2]), fw.ablate("mlp_out", layers=0, positions="last")]
    edits += [fw.ablate("mlp_out", layers=1, positions=[[0], [1], []])]

    def scenario(default):
        episode = plastic(at, RULES[name], 3, overflow="evict", archive=True)
        alone, model = plastic(at, RULES[name]), model_at(at)
        with torch.device(default):
            found = [life(episode, ids, MASK, write, CPU), episode.feed(ids, edits=edits)]
            steps = list(episode.generate(None, 2, temperature=0.7, seed=[1, 2, 3], stop_token_ids=(), update="all"))
            found += [[step.token_ids for step in steps], episode.fork(rows=[2, 0]).feed(ids[:2, :3])]
            found.append(trace_of(episode.probe(ids, "z", at="every", edits=edits, positions=[1, 3])))
            episode.save(place)
            found.append(fw.Episode.load(episode.model, place).feed(ids, update=fw.token_ids(ids[0])))
            episode.undo(1)
            alone.feed(ids[:1, :4])
            sweep = [[], fw.steer("resid_post", [1.0] * 24, layers=1)]
            found.append(trace_of(alone.probe(exam, sweep=sweep, at=[1, 2])))
            with fw.capture(model, "pattern", rows=[0, 2]) as seen:
                model(ids, MASK)
            options = {"layers": [1], "rule": RULES[name], "update": [0, 2, 3], "max_new_tokens": 1}
            record = fw.surgery(model, tokenizer, **TEXTS, **options)
        found += [state(episode), trace_of(seen), fw.ov(model, 1, [3, 4]), fw.lens(model, torch.ones(24))]
        return [*found, [getattr(record, array) for array in record.ARRAYS]]

    same(scenario(AWAY), on_cpu(scenario(CPU)))


def test_torchs_default_device_does_not_reach_the_buffers_of_the_step_in_c():
    def scenario(default):
        model = tiny(torch.float32, num_hidden_layers=2)
        fw.attach(model, 1, fw.Hebbian(0.3), rank=4)
        with torch.device(default):
            episode = fw.Episode(model, 2)
            return [episode.feed([[3 + n], [4]]) for n in range(6)], episode.path, str(episode.drift())

    same(scenario(AWAY), scenario(CPU))


# ---- moving through time


def two(rule, **options):
    """An episode on the CPU and one on the test device, alike."""
    return [plastic(device, rule, 3, **options) for device in (CPU, AWAY)]


KINDS = {
    "grow": {},
    "evict with an archive": {"overflow": "evict", "archive": True},
    "compress with a budget": {"overflow": "compress", "budget": 0.02},
    "shared": {"shared": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["hebbian", "gradient"])
def test_snapshot_restore_fork_undo_and_reset(name, kind):
    def scenario(model, given):
        episode = plastic(model, RULES[name], 3, **KINDS[kind])
        ids, mask = prompt(3, 7).to(given), MASK.to(given)
        episode.feed(ids, attention_mask=mask)
        snapshot = episode.snapshot()
        found = [episode.feed(ids[:, :3]), state(episode)]
        episode.restore(snapshot)
        same(episode.feed(ids[:, :3]), found[0].cpu())
        fork = episode.fork()
        found += [fork.feed(ids[:, 1:2]), episode.feed(ids[:, 2:3])]
        found.append(copy.deepcopy(episode).feed(ids[:, 3:4]))
        rows = episode.fork(rows=[2, 2, 0])
        found += [rows.feed(ids[:, 3:5]), state(rows)]
        if not episode.logs or kind != "compress with a budget":
            episode.undo(1)
        found.append(state(episode))
        episode.reset()
        return [*found, episode.feed(ids), state(episode)]

    everywhere(scenario)


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_is_restored_on_another_device(kind):
    for here, there in (two(RULES["hebbian"], **KINDS[kind]), two(RULES["hebbian"], **KINDS[kind])[::-1]):
        here.feed(prompt(3, 7), attention_mask=MASK)
        there.restore(here.snapshot())
        same(state(there), on_cpu(state(here)))
        for episode in (here, there):
            assert {log.device for log in episode.logs.values()} == {episode.model.device}
            assert episode.logits.device == episode.model.device
        same(there.feed(prompt(3, 4)).cpu(), here.feed(prompt(3, 4)).cpu())
        same(state(there), on_cpu(state(here)))


def test_a_snapshot_with_a_gradient_event_that_waits_is_restored_on_another_device():
    for here, there in (two(RULES["gradient"]), two(RULES["gradient"])[::-1]):
        here.feed(prompt(3, 4))
        there.restore(here.snapshot())
        same(there.feed(prompt(3, 3)).cpu(), here.feed(prompt(3, 3)).cpu())
        same(state(there), on_cpu(state(here)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["hebbian", "gradient"])
def test_an_episode_saved_on_one_device_lives_on_on_another(name, kind, tmp_path):
    for here, there in (two(RULES[name], **KINDS[kind]), two(RULES[name], **KINDS[kind])[::-1]):
        here.feed(prompt(3, 7), attention_mask=MASK)
        list(here.generate(None, 2, temperature=0.7, seed=3, stop_token_ids=()))
        here.save(tmp_path / "life.safetensors")
        loaded = fw.Episode.load(there.model, tmp_path / "life.safetensors")
        assert loaded.logits.device == there.model.device
        same(state(loaded), on_cpu(state(here)))
        for episode in (here, loaded):
            list(episode.generate(prompt(3, 2), 2, temperature=0.7, stop_token_ids=()))
        same(state(loaded), on_cpu(state(here)))


# ---- models


def test_attach_chooses_torch_says_what_triton_needs_and_detach_gives_the_linears_back():
    model = moved(tiny(num_hidden_layers=2))
    before = [(name, module) for name, module in model.named_modules()]
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"backend='triton' computes in float32"):
        fw.attach(model, "all", fw.Hebbian(0.3), backend="triton")
    fast = fw.attach(model, "all", fw.Hebbian(0.3))
    assert {linear.backend for linear in fast.linears.values()} == {"torch"}
    episode = fw.Episode(model)
    episode.feed([[3, 4, 5]])
    assert episode.path == "modules"
    assert episode.why["cuda"] == "the model is not on a GPU"
    assert episode.feed([[3]]).device == OTHER
    assert episode.why["cpu"] == "the model is not on the CPU"
    fw.detach(model)
    assert [(name, module) for name, module in model.named_modules()] == before
    same(dict(model.state_dict()), weights)


def test_a_float32_model_on_a_device_without_triton_says_so():
    model = moved(tiny(torch.float32))
    with pytest.raises(ValueError, match=r"backend='triton' needs CUDA .*: this model is on other:0"):
        fw.attach(model, 1, fw.Hebbian(0.3), backend="triton")
    fast = fw.attach(model, 1, fw.Hebbian(0.3))
    assert {linear.backend for linear in fast.linears.values()} == {"torch"}


def test_questions_about_the_fast_weights():
    def scenario(at, given):
        model = model_at(at)
        fast = fw.attach(model, [1], RULES["hebbian"], rank=4)
        episode = fw.Episode(model, 3)
        episode.feed(prompt(3, 14).to(given))
        asked = (fast.delta_weight, fast.delta_bias, fast.error, fast.delta_norm, fast.effective_rank)
        assert fast.delta_weight(1, "up_proj").device == at
        return [ask(1, "up_proj", row=row) for ask in asked for row in range(3)] + [str(episode.drift()), repr(fast)]

    everywhere(scenario)


def test_a_model_that_moves_before_its_episode_works_and_after_it_is_refused():
    model = tiny(num_hidden_layers=2)
    fw.attach(model, [1], RULES["hebbian"], budget=0.5)
    expected = fw.Episode(model).feed(prompt(1, 6))
    old = fw.Episode(model)
    old.feed(prompt(1, 6))
    snapshot = old.snapshot()
    moved(model, AWAY)
    for refused in (lambda: old.feed([[3]]), lambda: next(old.generate([[3]])), lambda: old.probe([[3]])):
        with pytest.raises(ValueError, match=rf"began with a model in torch.float64 on cpu, which is in .* on {AWAY}"):
            refused()
    episode = fw.Episode(model)
    same(episode.feed(prompt(1, 6)), expected)
    new = fw.Episode(model)
    new.restore(snapshot)
    same(new.feed([[3]]).cpu(), episode.feed([[3]]).cpu())
    moved(model, CPU)
    with pytest.raises(ValueError, match=rf"on {AWAY}, which is in torch.float64 on cpu now: make a new one"):
        episode.feed([[3]])
    fw.detach(model)
    same(fw.Episode(model).feed([[3]]), fw.Episode(tiny(num_hidden_layers=2)).feed([[3]]))


def test_detach_leaves_the_weights_that_the_model_has_now():
    """`to` of a device whose tensors are of another kind makes new parameters, as load_state_dict(assign=True) does."""
    model = tiny(num_hidden_layers=2)
    linear = model.model.layers[1].mlp.up_proj
    fw.attach(model, [1], fw.Hebbian(0.3))
    model.to(OTHER)
    fw.detach(model)
    assert model.model.layers[1].mlp.up_proj is linear
    assert {p.device for p in model.parameters()} == {OTHER}
    same(model(prompt(1, 5)).cpu(), tiny(num_hidden_layers=2)(prompt(1, 5)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_saved_from_and_loaded_onto_any_device(tied, tmp_path):
    for at in (CPU, AWAY):
        model = model_at(at, tie_word_embeddings=tied)
        fw.attach(model, [1], fw.Hebbian(0.3))
        fw.save(model, tmp_path / at.type, max_shard_bytes=9000)
        for device in (None, str(AWAY)):
            with pytest.warns(UserWarning, match="has no tokenizer"):
                loaded, _ = fw.load(tmp_path / at.type, device=device)
            assert loaded.device == (AWAY if device else CPU)
            assert {p.device for p in loaded.parameters()} == {loaded.device}
            assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
            assert list(loaded.state_dict()) == list(tiny(num_hidden_layers=2).state_dict())
            same(dict(loaded.state_dict()), dict(model_at(CPU, tie_word_embeddings=tied).state_dict()))
            same(loaded(prompt(1, 5)), model_at(CPU, tie_word_embeddings=tied)(prompt(1, 5)))
    assert [p.read_bytes() for p in sorted((tmp_path / "cpu").glob("*.safetensors"))] == [
        p.read_bytes() for p in sorted((tmp_path / AWAY.type).glob("*.safetensors"))
    ]


def test_a_copy_of_a_model_is_on_its_device_and_its_own():
    model = model_at(AWAY)
    other = copy.deepcopy(model)
    assert other.device == AWAY
    same(other(prompt(1, 5)).cpu(), model(prompt(1, 5)).cpu())


def test_anatomy_and_a_repr_do_not_look_at_the_device():
    model = moved(tiny(num_hidden_layers=2))
    with counting() as seen:
        assert repr(fw.anatomy(model)) == repr(fw.anatomy(tiny(num_hidden_layers=2)))
        repr(fw.Episode(model))
    assert seen.looks == []


def test_a_frozen_pass_looks_at_the_device_never():
    model = moved(tiny(num_hidden_layers=2))
    episode = fw.Episode(model, 3)
    with counting() as seen:
        episode.feed(prompt(3, 7), attention_mask=MASK)
        episode.feed(prompt(3, 1))
        episode.feed(prompt(3, 7), logits="last")
        model(prompt(3, 7))
    assert seen.looks == []


# ---- looking and intervening


@pytest.fixture
def tokenizer(tmp_path):
    """Words are tokens."""
    words = ["the", "sky", "is", "blue", "red", "green", "and", "dark", "question", ":", "who", "?", "A", "B", "goes"]
    backend = Backend(models.WordLevel({word: n + 2 for n, word in enumerate(words)} | {"!": 60}, unk_token="!"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer.from_folder(tmp_path)


SITES = [name for name in fw.SITES if not name.endswith((".key", ".value"))]


@pytest.mark.parametrize("at", ["now", "every"])
@pytest.mark.parametrize("positions", [None, "last", torch.tensor([1, 3])], ids=["all", "last", "columns"])
def test_a_probe_of_every_site(at, positions):
    def scenario(model, given):
        episode = plastic(model, RULES["hebbian"], 3)
        episode.feed(prompt(3, 3).to(given))
        columns = positions.to(given) if isinstance(positions, torch.Tensor) else positions
        asked = (prompt(3, 7).to(given), SITES)
        trace = episode.probe(*asked, at=at, attention_mask=MASK.to(given), positions=columns, max_bytes=1 << 22)
        assert {x.device for x in trace.sites.values()} == {episode.model.device}
        assert {x.device for x in (trace.input_ids, trace.positions)} == {CPU}
        return trace_of(trace)

    everywhere(scenario)


@pytest.mark.parametrize("archive", [False, True])
def test_a_probe_of_every_kind_of_moment(archive):
    def scenario(model, given):
        episode = plastic(model, RULES["hebbian"], overflow="evict", rank=4, archive=archive)
        episode.feed(prompt(1, 6 if archive else 4).to(given))
        moments = [0, 3, fw.Moment(3, without=[2]), fw.Moment(scale={4: 2.0}), fw.Moment(4, minus=2), fw.Moment()]
        moments += [fw.Moment(layers=[1]), fw.Moment(linears=["up_proj"])]
        found = [episode.probe(prompt(5, 4).to(given), at=each).logits for each in (moments, torch.tensor(2).to(given))]
        return [*found, episode.probe(prompt(1, 4).to(given), at=torch.tensor([1, 2]).to(given)).logits]

    everywhere(scenario)


METRICS = {
    "a tensor of the logits": lambda logits: logits[:, -1, 3] - logits[:, -1, 4],
    "a number": lambda logits: float(logits.sum()),
    "on the CPU": lambda logits: logits.cpu()[:, -1].logsumexp(-1),
    "on the CPU, one number": lambda logits: logits.sum().cpu(),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_and_its_gradient(name):
    def scenario(model, given):
        episode = plastic(model, RULES["slow"], 2)
        episode.feed(prompt(2, 3).to(given))
        sweep = [[], fw.ablate("z", layers=1, heads=torch.tensor([0, 2]).to(given))]
        options = {"metric": METRICS[name], "gradient": name != "a number", "at": [0, 2], "sweep": sweep}
        return trace_of(episode.probe(prompt(2, 5).to(given), ["resid_post", "z", "result"], **options))

    everywhere(scenario)


def test_an_exam_with_a_sweep_and_gradients(tokenizer):
    exam = fw.Exam(tokenizer, ["the sky is", "the sky and goes"], [["blue", "dark and"], ["red", "green"]])

    def scenario(model, given):
        episode = plastic(model, RULES["hebbian"])
        episode.feed(prompt(1, 3).to(given))
        sweep = [[], fw.ablate("z", layers=1, heads=0), fw.steer("resid_post", torch.ones(24).to(given), layers=1)]
        found = [trace_of(episode.probe(exam, at=[1, 3], sweep=sweep))]
        found.append(trace_of(episode.probe(exam, "resid_mid", gradient=True)))
        trace = episode.probe(exam.rows, positions=torch.tensor(exam.columns).to(given))
        scores = exam.score(trace.logits, torch.tensor(exam.columns).to(given))
        return [*found, scores.logprob, scores.rank, scores.difference]

    everywhere(scenario)


def edits_given(given, source):
    """One of each kind, with tensors and traces on a device."""
    random = torch.Generator().manual_seed(3)
    direction, several = (torch.randn(*shape, generator=random).to(given) for shape in ((24,), (2, 24)))
    trace = as_given(given, source)
    return {
        "zero": fw.ablate("z", layers=torch.tensor([0, 1]).to(given), heads=torch.tensor(1).to(given)),
        "mean": fw.ablate("mlp_out", "mean", trace, layers=1, positions=torch.tensor([0, 2]).to(given)),
        "resample": fw.ablate("resid_post", "resample", trace, seed=4, layers=1, rows=torch.tensor([0, 2]).to(given)),
        "patch": fw.patch("resid_pre", trace, layers=[0, 1], positions=[1, 2]),
        "patch of scores": fw.patch("pattern", trace, layers=1, positions=[2]),
        "steer": fw.steer("resid_post", direction, 2.0, layers=1, positions=WRITE.to(given)),
        "steer by layer": fw.steer("resid_post", several, torch.tensor(0.5).to(given), layers=[0, 1]),
        "project out": fw.project_out("attn_out", several, layers=1, units=None, positions="last"),
        "units": fw.ablate("act", units=torch.arange(9).to(given), positions=fw.token_ids(prompt(3, 7)[0].to(given))),
        "reading": fw.Edit("down.read", lambda x, at: 2 * x, layers=1),
        "value": fw.Edit("up.value", own_change, positions=[[0], [2], [1, 3]]),
        "own": fw.Edit("scores", own_change, layers=1, heads=[0]),
    }


def own_change(x, at):
    """What a change is told is where x is, and what it gives is a number of the CPU times x."""
    assert {at.rows.device, at.positions.device, at.token_ids.device} == {x.device}
    return torch.where(x.isfinite(), x * torch.tensor(1.5), x)


@pytest.fixture(scope="module")
def source():
    """A trace of other prompts, on the CPU."""
    sites = ["mlp_out", "resid_post", "resid_pre", "pattern"]
    return fw.Episode(tiny(num_hidden_layers=2), 3).probe(prompt(3, 7, seed=9), sites)


@pytest.mark.parametrize("name", list(edits_given(CPU, fw.Trace(positions=torch.zeros(1, 1, dtype=torch.long)))))
def test_every_edit_in_feed_generate_probe_and_around_them(name, source):
    def scenario(model, given):
        episode = plastic(model, RULES["hebbian"], 3)
        edit = edits_given(given, source)[name]
        ids, mask = prompt(3, 7).to(given), MASK.to(given)
        if not name.startswith("patch") and name != "value":
            ids = ids[:, :7]
        found = [episode.feed(ids, edits=edit, attention_mask=mask if name != "steer" else None)]
        if name not in ("steer", "value"):
            found += [step.logits for step in episode.generate(None, 2, edits=[edit], update="all", stop_token_ids=())]
        if name != "value":
            found.append(trace_of(episode.probe(ids, "resid_post", edits=edit, sweep=[[], edit], at=[0, 2])))
        fresh = fw.Episode(episode.model, 3)
        with fw.edited(episode.model, edit) as done, fw.capture(episode.model, [*SITES[:12], "up.key"]) as trace:
            fresh.feed(ids)
        return [found, state(episode), trace_of(trace), done[0], state(fresh)]

    everywhere(scenario)


def test_one_edit_serves_models_on_both_devices(source):
    edits = list(edits_given(CPU, source).items()) + list(edits_given(AWAY, source).items())
    episodes = two(RULES["hebbian"])
    for episode in episodes:
        episode.feed(prompt(3, 3))
    for name, edit in edits:
        if name in ("value", "steer"):
            continue
        here, there = (episode.probe(prompt(3, 7), edits=edit).logits for episode in episodes)
        same(there, here, name)


def test_a_capture_of_every_site_at_chosen_places():
    def scenario(model, given):
        episode = plastic(model, RULES["hebbian"], 3)
        numbers = [torch.tensor(x).to(given) for x in ([0, 1], [0, 1], [0, 2])]
        positions = torch.tensor([0, 2, 3]).to(given)
        with fw.capture(
            episode.model, ["z", "pattern"], layers=numbers[0], heads=numbers[1], rows=numbers[2], positions=positions
        ) as some:
            episode.feed(prompt(3, 7).to(given), attention_mask=MASK.to(given))
        with fw.capture(episode.model, list(fw.SITES)) as every:
            list(episode.generate(prompt(3, 2).to(given), 2, update="all", stop_token_ids=()))
        with fw.capture(episode.model, ["logits", "mlp_out"]) as plain:
            episode.model(prompt(3, 7).to(given), MASK.to(given), logits="last")
        assert {x.device for x in every.sites.values()} == {episode.model.device}
        return [trace_of(trace) for trace in (some, every, plain)]

    everywhere(scenario)


def test_a_trace_from_a_file_serves_a_model_on_any_device(tmp_path):
    path = tmp_path / "trace.safetensors"
    sites = ["embedding", "result", "attn_out", "mlp_out", "resid_pre", "resid_post", "final_norm"]

    def scenario(at, given):
        fw.Episode(model_at(given)).probe(prompt(1, 5).to(given), sites).save(path)
        trace = fw.Trace.load(path)
        assert {x.device for x in trace.sites.values()} == {CPU}
        model = model_at(at)
        names, parts = fw.decompose(model, trace)
        episode = fw.Episode(model)
        edits = [fw.patch("resid_pre", trace, layers=1, positions=[2]), fw.ablate("mlp_out", "mean", trace, layers=1)]
        found = [trace_of(trace), names, parts, episode.probe(prompt(1, 5, seed=3), edits=edits).logits]
        return [*found, fw.lens(model, trace["resid_post", 1])]

    everywhere(scenario)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_lora_out_and_in_and_merged_weights(rank, tmp_path):
    def scenario(at, given):
        model = model_at(at)
        fast = fw.attach(model, 1, fw.Hebbian(rate=0.1, decay=0.01), rank=3, archive=True)
        episode = fw.Episode(model, 2)
        episode.feed(prompt(2, 14).to(given))
        folder = tmp_path / f"{at.type} {given.type}"
        errors = fast.export_peft(folder, row=1, moment=11, rank=rank)
        merged = fast.merge(row=1)["model.layers.1.mlp.up_proj.weight"]
        assert merged.device == model.device
        fast.import_peft(folder)
        again = fw.Episode(model, 2)
        again.feed(prompt(2, 5).to(given))
        again.reset()
        return [list(map(list, errors.values())), merged, again.delta_weight(1, "down_proj", row=1)]

    everywhere(scenario)


def test_lens_rank_ov_decompose_and_directions():
    def scenario(at, given):
        model = model_at(at)
        trace = fw.Episode(model).probe(prompt(1, 5).to(given), ["embedding", "result", "mlp_out", "resid_post"])
        hidden = trace.hidden_states[:, 0, -1].to(given)
        logits = fw.lens(model, hidden)
        assert logits.device == at
        found = [logits, fw.lens(model, hidden, norm=False), fw.rank(logits, 7)]
        ids = torch.arange(3).to(given)
        found += [
            fw.rank(logits, ids),
            fw.rank(logits.to(given), ids.cpu()),
            fw.rank(logits, list(ids)),
        ]
        found += [fw.ov(model, 1, ids), fw.ov(model, 1, [3, 4]), *fw.decompose(model, trace)]
        return [*found, fw.slerp(hidden[0], hidden[1], 0.3)]

    everywhere(scenario)


def test_a_linear_probe():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, 6, generator=random), torch.arange(30) % 3

    def scenario(_, given):
        found = []
        for labels in (y.to(given), y.tolist(), y.double().to(given), [each.to(given) for each in y]):
            for where in (CPU, given):
                probe = fw.linear_probe(x.to(where), labels, folds=2)
                assert probe.weights.device == where
                found += [probe.score, probe.control, probe.weights, probe.bias, probe.classes]
        return found

    pytest.importorskip("sklearn")
    everywhere(scenario)


def test_a_heat_map(tmp_path):
    pytest.importorskip("matplotlib")
    for given in (CPU, AWAY):
        fw.heat_map(torch.rand(3, 4).to(given), y="layer", x="head", path=tmp_path / f"{given.type}.png")


TEXTS = {"context": "the sky is red and dark", "question": "question : who ?", "answers": ["A", "B goes and"]}


@pytest.mark.parametrize(("name", "one_by_one"), [("hebbian", False), ("gradient", True)])
def test_the_experiment_and_its_report(name, one_by_one, tokenizer, tmp_path):
    def scenario(at, given):
        model, seen = model_at(at), []
        options = (
            {"on_event": lambda episode, event: seen.append([event.logprob, event.distance])} if one_by_one else {}
        )
        update = torch.tensor([0, 1, 3, 6]).to(given)
        options |= {"layers": torch.tensor([1]).to(given).tolist(), "update": update, "max_new_tokens": 2}
        record = fw.surgery(model, tokenizer, rule=RULES[name], **TEXTS, **options)
        for array in record.ARRAYS:
            assert getattr(record, array).device == CPU, array
        if not one_by_one:
            assert {"record.json", "arrays.safetensors", "report.html"} <= {*record.save(tmp_path / at.type)}
        whole = record.to_dict()
        whole.pop("settings")
        return [whole, seen]

    pytest.importorskip("matplotlib")
    everywhere(scenario)


@pytest.mark.parametrize("name", ["hebbian", "gradient"])
def test_perplexity(name):
    def scenario(at, given):
        texts = [prompt(1, 9)[0].to(given), prompt(1, 5, seed=2)[0].to(given)]
        found = fw.perplexity(model_at(at), texts, RULES[name], [1], length=4, reset="never")
        assert found.losses[0].device == found.positions[0].device == CPU
        return [found.losses, found.positions, found.to_dict()["buckets"]]

    everywhere(scenario)


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_an_sae_beside_the_model(architecture, tmp_path):
    from test_sae import NEW, D, saelens, weights

    folder = saelens(tmp_path / "sae", {**NEW, "architecture": architecture}, weights(architecture))

    def scenario(at, given):
        sae = fw.load_sae(folder, dtype="float64", device=at, layer=1, site="resid_post")
        assert sae.W_dec.device == at
        x = torch.randn(5, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(at)
        features = sae.encode(x)
        value = torch.tensor([0.5, 2.0], dtype=torch.float64).to(given)
        change = sae.set([1, 2], value)
        return [features, sae.decode(features, x), list(sae.error(x)), change(x), sae.set(3, lambda f: f + 1)(x)]

    everywhere(scenario)
    sae = fw.load_sae(folder, device=AWAY)
    with pytest.raises(ValueError, match=rf"x is on cpu and the SAE on {AWAY}: load_sae\(\.\.\., device=\) moves it"):
        sae.encode(torch.zeros(5, D))
    with pytest.raises(ValueError, match=f"features are on cpu and the SAE on {AWAY}"):
        sae.decode(torch.zeros(5, len(sae.W_dec)))


def test_kernels_are_launched_with_the_gpu_of_their_tensors_as_the_current_one(monkeypatch):
    """Of several GPUs the model may be on another than the current one; tensors alone do not tell Triton."""
    asked, x = [], torch.ones(3)
    monkeypatch.setattr(torch.cuda, "device_of", lambda given: asked.append(given) or contextlib.nullcontext())
    assert torch.equal(values.on_its_gpu(lambda given, times: times * given)(x, times=2), 2 * x)
    assert len(asked) == 1
    assert asked[0] is x
    assert all(hasattr(launch, "__wrapped__") for launch in (read.launch, scan.launch))


def test_numbers_of_numpy_need_no_device():
    model = model_at(AWAY)
    episode = fw.Episode(model)
    same(episode.feed(np.array([3, 4])).cpu(), fw.Episode(model_at(CPU)).feed([3, 4]))
    assert episode.logits.device == AWAY
