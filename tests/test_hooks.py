"""Hooks of one's own, on any module, run on every path; what they change is what is computed and written."""

import pytest
import torch
from tiny import prompt, tiny

import fastweights as fw
from fastweights.engine.cuda import Cuda


def counted(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


WHOLE = {"the model": lambda model: model, "its decoder": lambda model: model.model}


@pytest.mark.parametrize("where", WHOLE)
@pytest.mark.parametrize(
    "rule", [None, fw.Hebbian(rate=0.1), fw.GradientAscent(rate=0.1)], ids=["frozen", "one", "cols"]
)
def test_a_hook_on_the_whole_runs_once_a_pass(where, rule):
    model, ids = tiny(torch.float32), prompt(1, 4)
    if rule is not None:
        fw.attach(model, [1], rule)
    episode = fw.Episode(model)
    exact = [episode.feed(ids), *(episode.feed(ids[:, t]) for t in range(4))]
    episode, calls = fw.Episode(model), counted(WHOLE[where](model))
    found = [episode.feed(ids), *(episode.feed(ids[:, t]) for t in range(4))]
    assert len(calls) == (8 if isinstance(rule, fw.GradientAscent) else 5)  # a gradient rule reads column by column
    assert episode.path == "modules"
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", WHOLE)
def test_a_hook_on_the_whole_runs_where_a_gpu_would_take_the_fused_step(where):
    """On a CPU, by the same path."""
    model, ids = tiny(), prompt(1, 4)
    fw.attach(model, [1], fw.Hebbian(rate=0.1), backend="torch")
    episode = fw.Episode(model)
    episode.engine.paths[0] = Cuda(model, episode.engine.linears, episode.state, lambda run: run, "torch")
    episode.feed(ids[:, 0])
    assert episode.path == "cuda"
    calls = counted(WHOLE[where](model))
    for t in range(4):
        episode.feed(ids[:, t])
        assert episode.path == "modules"
    assert (len(calls), episode.engine.paths[0].recordings) == (4, 0)


@pytest.mark.parametrize("where", WHOLE)
def test_a_hook_on_the_whole_runs_once_a_batch_of_a_probe_and_may_change_it(where):
    model, ids = tiny(), prompt(1, 4)
    fw.attach(model, [2], fw.Hebbian(rate=0.1))
    episode = fw.Episode(model)
    episode.feed(ids)
    exact = episode.probe(ids, sites=["resid_post"], at="every", logits="last")
    module, calls = WHOLE[where](model), counted(WHOLE[where](model))
    found = episode.probe(ids, sites=["resid_post"], at="every", logits="last")
    torch.testing.assert_close(found.logits, exact.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.hidden_states, exact.hidden_states, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1
    module.register_forward_hook(lambda _module, _args, output: output * 0)
    assert not episode.probe(ids).logits.any()


def edited(linear):
    """Doubles the input of a linear, in place, before it is read."""

    def double(_module, args):
        args[0].mul_(2)

    linear.register_forward_pre_hook(double)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("linears", [["up_proj"], ["gate_proj", "up_proj"]])
def test_the_key_of_an_event_is_the_input_as_a_hook_has_edited_it(linears, tokens):
    model, ids = tiny(), prompt(1, tokens)
    fw.attach(model, [1], fw.Hebbian(rate=0.1), linears=linears)
    mlp, seen = model.model.layers[1].mlp, []
    edited(mlp.up_proj)
    mlp.up_proj.register_forward_hook(lambda _module, args, _output: seen.append(args[0].clone()))
    episode = fw.Episode(model)
    episode.feed(ids)
    h = seen[0][0]
    keys = episode.logs[1, "up_proj"].factors()[1][0]
    torch.testing.assert_close(keys, h / (h.square().sum(-1, keepdim=True) + 1e-6), rtol=1e-12, atol=1e-12)


def test_a_hook_that_looks_at_the_episode_during_a_pass_sees_it_whole_again_after_a_failure():
    model, ids = tiny(), prompt(1, 5)
    fw.attach(model, [1], fw.Hebbian(rate=0.1))
    episode, seen = fw.Episode(model), []
    episode.feed(ids)

    def look(*_):
        seen.append((episode.length, episode.events))
        raise RuntimeError("a hook of one's own")

    handle = model.model.layers[2].register_forward_hook(look)
    with pytest.raises(RuntimeError, match="a hook of one's own"):
        episode.feed(ids)
    handle.remove()
    assert seen == [(5, 10)]
    assert (episode.length, episode.events) == (5, 5)


def test_a_hook_that_would_change_its_own_episode_is_refused_and_nothing_is_half_done():
    model, ids = tiny(), prompt(1, 5)
    fw.attach(model, [1], fw.Hebbian(rate=0.1))
    episode = fw.Episode(model)
    handle = model.model.layers[2].register_forward_hook(lambda *_: episode.feed(ids) and None)
    with pytest.raises(ValueError, match="this episode is in the middle of a call"):
        episode.feed(ids)
    handle.remove()
    assert (episode.length, episode.events) == (0, 0)
    episode.feed(ids)
    assert (episode.length, episode.events) == (5, 5)
