"""Probes at many moments in one batch, against episodes that really stopped there."""

import pytest
import torch
from tiny import least_bytes, prompt, tiny

import fastweights as fw
from fastweights.state.moments import Moment

RULE = fw.Hebbian(rate=0.3, mu=0.1, decay=0.1, bias=True)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SITES = ["resid_pre", "resid_mid", "resid_post"]


def fed(rule=RULE, rows=1, tokens=9, layers=(1, 3), **options):
    model = tiny()
    fw.attach(model, list(layers), rule, rank=4, overflow="grow")
    episode = fw.Episode(model, rows)
    episode.feed(prompt(rows, tokens), **options)
    return model, episode


@pytest.mark.parametrize("rule", [RULE, fw.LocalLeastSquares(gamma=0.4, target="slow"), fw.GradientAscent(rate=0.3)])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("one_by_one", [True, False])
def test_every_moment_of_one_batch_equals_an_episode_stopped_there(rule, rows, one_by_one):
    model, episode = fed(rule, rows)
    question, batches = prompt(rows, 6, seed=7), []
    options = {"sites": SITES, "at": "every", "progress": lambda done, _: batches.append(done)}
    if one_by_one:
        options["max_bytes"] = least_bytes(episode, question, **options)
    trace = episode.probe(question, **options)
    assert len(batches) == (len(trace.logits) if one_by_one else 1)
    assert trace.logits.shape == (episode.events + 1, rows, 6, 61)
    assert trace.hidden_states.shape == (episode.events + 1, 5, rows, 6, 24)
    stopped = fw.Episode(model, rows)
    ids = prompt(rows, 9)
    for moment in range(episode.events + 1):
        while stopped.events < moment:
            stopped.feed(ids[:, stopped.length : stopped.length + 1])
        alone = stopped.probe(question, sites=SITES)
        torch.testing.assert_close(trace.logits[moment], alone.logits, **CLOSE)
        for site in SITES:
            torch.testing.assert_close(trace[site][moment], alone[site], **CLOSE)
        torch.testing.assert_close(trace.hidden_states[moment], alone.hidden_states, **CLOSE)


def test_some_moments_columns_and_ragged_questions():
    _, episode = fed()
    questions = [[3, 4, 5, 6, 7], [8, 9]]
    every = episode.probe(questions, sites=["resid_post"], at="every")
    some = episode.probe(questions, sites=["resid_post"], at=[7, 0, 3], positions=[1, 3])
    torch.testing.assert_close(some.logits, every.logits[[7, 0, 3]][:, :, [1, 3]], **CLOSE)
    torch.testing.assert_close(some["resid_post"], every["resid_post"][[7, 0, 3]][:, :, :, [1, 3]], **CLOSE)
    last = episode.probe(questions, at=[7, 0, 3], logits="last")
    torch.testing.assert_close(last.logits[:, 0, 0], every.logits[[7, 0, 3], 0, 4], **CLOSE)
    torch.testing.assert_close(last.logits[:, 1, 0], every.logits[[7, 0, 3], 1, 1], **CLOSE)
    torch.testing.assert_close(episode.probe([8, 9]).logits[0], every.logits[9, 1, :2], **CLOSE)


def test_the_last_logits_alone_leave_the_sites_whole():
    _, episode = fed()
    questions, sites = [[3, 4, 5, 6, 7], [8, 9]], ["resid_post", "final_norm"]
    every = episode.probe(questions, sites=sites, at="every")
    last = torch.stack([every.logits[:, 0, 4], every.logits[:, 1, 1]], 1)[:, :, None]
    for positions in (None, [0, 3]):
        trace = episode.probe(questions, sites=sites, at="every", logits="last", positions=positions)
        torch.testing.assert_close(trace.logits, last, **CLOSE)
        for site in sites:
            kept = every[site] if positions is None else every[site][..., positions, :]
            torch.testing.assert_close(trace[site], kept, **CLOSE)
    metric = episode.probe(questions, sites=sites, logits="last", metric=lambda logits: logits).metric
    torch.testing.assert_close(metric, last[-1], **CLOSE)


def dense_probe(model, episode, question, change):
    """The frozen model with `change(site, U, K, w)` added to its weights."""
    twin = tiny()
    for (layer, linear), log in episode.logs.items():
        U, K, bias = (factor[0] for factor in log.factors())
        w = change((layer, linear), 0.9 ** (8.0 - torch.arange(9, dtype=torch.float64)))
        module = getattr(twin.model.layers[layer].mlp, linear)
        module.weight.data += (U * w[:, None]).T @ K
        module.bias = torch.nn.Parameter((U * w[:, None]).T @ bias, requires_grad=False)
    return twin(question)


@pytest.mark.parametrize(
    ("moment", "change"),
    [
        (Moment(), lambda site, w: w),
        (Moment(without=[1, 5]), lambda site, w: w * torch.tensor([0, 1, 1, 1, 0, 1, 1, 1, 1])),
        (Moment(scale={9: -2.0}), lambda site, w: w * torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, -2])),
        (Moment(layers=[3]), lambda site, w: w * (site[0] == 3)),
        (Moment(linears=["up_proj", "down_proj"]), lambda site, w: w * (site[1] != "gate_proj")),
        (Moment(minus=4), lambda site, w: w - (torch.arange(9) < 4) * 0.9 ** (3.0 - torch.arange(9).double())),
        (Moment(6), lambda site, w: (torch.arange(9) < 6) * 0.9 ** (5.0 - torch.arange(9).double())),
    ],
)
def test_left_out_scaled_partial_and_subtracted_moments_equal_dense_weights(moment, change):
    model, episode = fed()
    question = prompt(1, 6, seed=7)
    logits = episode.probe(question, at=[0, moment]).logits[1]
    torch.testing.assert_close(logits, dense_probe(model, episode, question, change), **CLOSE)


def test_layers_below_the_first_plastic_one_run_once():
    model, episode = fed(layers=(2,))
    calls = [0] * 4
    handles = []
    for layer, block in enumerate(model.model.layers):

        def count(_module, args, layer=layer):
            calls[layer] += len(args[0])

        handles.append(block.register_forward_pre_hook(count))
    episode.probe(prompt(1, 5), at="every")
    for handle in handles:
        handle.remove()
    assert calls == [1, 1, 10, 10]


def test_a_model_without_plastic_linears_has_one_moment():
    model = tiny()
    episode = fw.Episode(model)
    trace = episode.probe(prompt(1, 5), sites=["resid_post"], at="every")
    assert torch.equal(trace.logits[0], model(prompt(1, 5)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "then"}, "at='then'"),
        ({"at": []}, "expected 'now', 'every', or a list"),
        ({"at": [10]}, "names event 10, but this episode has events 0 to 9"),
        ({"at": [-1]}, "names event -1"),
        ({"at": [1.5]}, "names event 1.5: expected a whole number"),
        ({"at": [Moment(without=[12])]}, "names event 12"),
        ({"at": [Moment(scale={0: 2.0})]}, "events are numbered from 1"),
        ({"positions": [5]}, "expected columns from 0 to 4"),
        ({"positions": []}, "expected columns from 0 to 4"),
        ({"sites": ["zz"]}, "site 'zz' does not exist"),
    ],
)
def test_probes_refuse_what_does_not_exist(arguments, message):
    _, episode = fed()
    with pytest.raises(ValueError, match=message):
        episode.probe(prompt(1, 5), **arguments)


@pytest.mark.parametrize("layers", [[1], [3], [0, 3]])
def test_kept_columns_are_those_of_the_whole_probe(layers):
    """The last block runs for them alone, and for all of them while a hook looks on."""
    model, ids = tiny(), prompt(1, 9)
    fw.attach(model, layers, fw.Hebbian(rate=0.2))
    episode = fw.Episode(model)
    episode.feed(prompt(1, 6, seed=4))
    sites, at, seen = ["resid_pre", "resid_mid", "resid_post"], [0, 3, 6], []
    whole = episode.probe(ids, sites=sites, at=at)
    for hooked in (False, True):
        if hooked:
            model.model.layers[-1].mlp.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
        some = episode.probe(ids, sites=sites, at=at, positions=[2, 7, 8])
        torch.testing.assert_close(some.logits, whole.logits[..., [2, 7, 8], :], rtol=1e-12, atol=1e-12)
        for site in sites:
            torch.testing.assert_close(some[site], whole[site][..., [2, 7, 8], :], rtol=1e-12, atol=1e-12)
    assert seen == [9]


@pytest.mark.parametrize(
    ("moment", "message"),
    [(fw.Moment(layers=[0]), "names layer 0, but plastic are"), (fw.Moment(linears=["up"]), "names linear 'up', but")],
)
def test_a_moment_of_layers_that_are_not_plastic_is_refused(moment, message):
    model = tiny()
    fw.attach(model, [1], fw.Hebbian())
    episode = fw.Episode(model)
    episode.feed(prompt(1, 4))
    with pytest.raises(ValueError, match=message):
        episode.probe(prompt(1, 3), at=[moment])


def test_one_moment_and_moments_in_a_tensor_are_taken():
    model, ids = tiny(), prompt(1, 5)
    fw.attach(model, [1], fw.Hebbian(rate=0.2))
    episode = fw.Episode(model)
    episode.feed(ids)
    exact = episode.probe(ids, at=[2, 3]).logits
    assert torch.equal(episode.probe(ids, at=torch.tensor([2, 3])).logits, exact)
    for at in (3, torch.tensor(3), fw.Moment(3)):
        torch.testing.assert_close(episode.probe(ids, at=at).logits, exact[1:])
