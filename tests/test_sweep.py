"""A sweep is one probe per alternative, whatever shares the batch; gradients against finite differences."""

import contextlib

import pytest
import torch
from naive import LAYERED, WHOLE, Naive, bent, both, keep, twin
from test_exam import ANSWERS, PROMPTS, tokenizer  # noqa: F401
from tiny import CONFIG, least_bytes, naive_of, prompt, tiny

import fastweights as fw

pytestmark = pytest.mark.filterwarnings("ignore:the answer .* begins with the tokens")

EXACT = {"rtol": 1e-12, "atol": 1e-12}
IDS = [3, 14, 15, 9, 26, 5]
ROWS = [IDS, [8, 7, 6]]
HEBB = fw.Hebbian(rate=0.3, mu=0.1, decay=0.05, bias=True)
LINEARS = ["up_proj", "down_proj"]
SITES = ["embedding", "resid_pre", "z", "pattern", "up.read", "resid_post", "final_norm", "logits"]


def model_and_episode(rows=1, layers=(1, 2), tokens=5):
    model = tiny()
    fw.attach(model, list(layers), HEBB, LINEARS, rank=32)
    episode = fw.Episode(model, rows)
    episode.feed(prompt(rows, tokens, seed=5))
    return model, episode


def alternatives(model):
    source = fw.Episode(model).probe([30, 31, 32, 33, 34, 35], sites=["resid_mid", "v"])
    direction = torch.linspace(-1, 2, 24, dtype=torch.float64)
    return [
        [],
        fw.ablate("embedding", units=range(7), positions=[0, 2]),
        fw.ablate("z", layers=0, heads=1),
        fw.steer("resid_pre", direction, 2.0, layers=2),
        [fw.ablate("z", layers=3, heads=2, positions="last"), fw.ablate("q", layers=1, positions=0)],
        fw.patch("resid_mid", source, layers=1, positions=[0, 1]),
        [fw.patch("v", source, layers=3, heads=0, positions=[0, 2]), fw.ablate("mlp_norm", layers=3, units=3)],
        fw.ablate("mlp_out", layers=[1, 3], rows=0),
        fw.Edit("final_norm", lambda x, at: bent(x), units=range(12)),
        fw.Edit("logits", lambda x, at: bent(x), positions=[0, 2], units=[3, 4, 5]),
        fw.ablate("down.read"),
        [fw.ablate("up.read", layers=2), fw.ablate("act", layers=0, units=5)],
        fw.Edit("pattern", lambda x, at: bent(x), layers=2, heads=3),
        [],
        fw.Edit("k_rot", lambda x, at: bent(x), layers=3),
        fw.Edit("resid_post", lambda x, at: bent(x), layers=3, positions="last"),
        [fw.ablate("embedding", positions=1), fw.ablate("logits", positions=1)],
    ]


def hooked(model, where):
    """A user's own hook, which makes the numbers others."""
    if where is None:
        return contextlib.nullcontext()
    module = {"model": model, "decoder": model.model, "block": model.model.layers[2], "norm": model.model.norm}[where]
    return Hook(module.register_forward_hook(lambda module, args, output: output * 1.5))


class Hook(contextlib.AbstractContextManager):
    def __init__(self, handle):
        self.handle = handle

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize(
    ("rows", "at", "positions", "where", "standing", "own"),
    [
        (1, "now", None, None, False, False),
        (1, [0, 2, 5], None, None, False, True),
        (2, "every", None, None, True, False),
        (2, [0, 5], [1, 2], None, True, True),
        (2, [1, 4], "last", None, False, False),
        (1, "now", "last", "block", False, True),
        (2, [0, 3], None, "model", True, True),
        (2, [0, 3], [2, 0], "decoder", False, False),
        (1, [5], [4], "norm", True, False),
    ],
)
def test_a_sweep_equals_one_probe_for_each_alternative(rows, at, positions, where, standing, own):
    model, episode = model_and_episode(rows)
    ids = [IDS] if rows == 1 else ROWS
    edits = [fw.Edit("attn_norm", lambda x, at: bent(x), layers=[0, 2], positions=[0, 1])] if own else []
    around = fw.edited(model, fw.ablate("k", layers=1, heads=1)) if standing else contextlib.nullcontext()
    options = {"sites": SITES, "at": at, "positions": positions, "edits": edits}
    sweep = alternatives(model)
    with around, hooked(model, where):
        whole = episode.probe(ids, sweep=sweep, **options)
        small = least_bytes(episode, ids, sweep=sweep, **options)
        one_by_one = episode.probe(ids, sweep=sweep, **options, max_bytes=small)
        for number, alternative in enumerate(sweep):
            more = alternative if isinstance(alternative, list) else [alternative]
            alone = episode.probe(ids, **{**options, "edits": [*edits, *more]})
            for site in SITES:
                for trace in (whole, one_by_one):
                    axis = 0 if at == "now" else 1
                    found = trace[site].select(axis, number)
                    torch.testing.assert_close(found, alone[site], **EXACT, msg=f"{number} {site}")
    moments = [] if at == "now" else [6 if at == "every" else len(at)]
    kept = 6 if positions is None else 1 if positions == "last" else len(positions)
    assert whole.logits.shape == (*moments, len(sweep), rows, kept, 61)
    assert whole["z"].shape == (*moments, len(sweep), 4, rows, kept, 4, 6)
    assert whole["up.read"].shape == (*moments, len(sweep), 2, rows, kept, 52)
    assert whole["embedding"].shape == (*moments, len(sweep), rows, kept, 24)
    assert whole.positions.shape == (rows, kept)
    assert whole.layers["up.read"] == [1, 2]
    torch.testing.assert_close(whole["z", 3], whole["z"].select(len(moments) + 1, 3), rtol=0, atol=0)


def test_a_sweep_equals_the_naive_model_with_each_edit():
    model = tiny()
    sweep = [fw.ablate("z", layers=n, heads=h) for n in range(4) for h in range(4)]
    logits = fw.Episode(model).probe(IDS, sweep=sweep).logits
    for number, edit in enumerate(sweep):
        layer, head = edit.places.layers[0], edit.places.heads[0]

        def change(site, n, position, x, layer=layer, head=head):
            return x * (torch.arange(4) != head)[:, None] if (site, n) == ("z", layer) else x

        exact = naive_of(model).feed(IDS, change)
        torch.testing.assert_close(logits[number, 0], exact, rtol=1e-9, atol=1e-10)


def test_layers_below_the_first_that_differs_run_once():
    model, episode = model_and_episode(layers=(2,))
    calls, handles = [0] * 4, []
    for layer, block in enumerate(model.model.layers):

        def count(_module, args, layer=layer):
            calls[layer] += len(args[0])

        handles.append(block.register_forward_pre_hook(count))
    sweep = [fw.ablate("z", layers=3, heads=h) for h in range(4)]
    episode.probe(IDS, sweep=sweep)
    assert calls == [1, 1, 1, 4]
    calls[:] = [0] * 4
    episode.probe(IDS, sweep=[[], fw.ablate("z", layers=1), fw.ablate("mlp_out", layers=3)], at=[0, 5])
    assert calls == [1, 2, 4, 6]
    calls[:] = [0] * 4
    episode.probe(IDS, sweep=[[], fw.ablate("logits"), fw.ablate("final_norm")])
    assert calls == [1, 1, 1, 1]
    calls[:] = [0] * 4
    episode.probe(IDS, sweep=[fw.ablate("embedding"), []])
    assert calls == [2, 2, 2, 2]
    calls[:] = [0] * 4
    episode.probe(IDS, sweep=[fw.ablate("down.read"), []], at=[0, 3, 5])
    assert calls == [1, 1, 6, 6]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("at", ["now", [0, 5]])
def test_a_metric_is_called_for_each_moment_and_alternative(at):
    model, episode = model_and_episode(2)
    sweep, shapes = alternatives(model), []

    def metric(logits):
        shapes.append(tuple(logits.shape))
        return logits[:, -1, 3] - logits[:, -1, 4]

    trace = episode.probe(ROWS, at=at, sweep=sweep, metric=metric, positions=[0, 2])
    assert "logits" not in trace.sites
    count = 1 if at == "now" else 2
    assert shapes == [(2, 2, 61)] * (count * (len(sweep) - 1))  # both alternatives without an edit are one
    whole = episode.probe(ROWS, at=at, sweep=sweep).logits
    torch.testing.assert_close(trace.metric, whole[..., 2, 3] - whole[..., 2, 4], **EXACT)
    asked = episode.probe(ROWS, at=at, sweep=sweep, metric=metric, logits="all")
    torch.testing.assert_close(asked.logits, whole, **EXACT)
    torch.testing.assert_close(asked.metric, whole[..., 5, 3] - whole[..., 5, 4], **EXACT)
    number = episode.probe(IDS, metric=lambda logits: 2.5)
    assert number.metric.shape == ()
    assert float(number.metric) == 2.5
    named = episode.probe(ROWS, at=at, sweep=sweep, metric=metric, sites="logits", positions=[0, 2])
    torch.testing.assert_close(named["logits"], whole[..., [0, 2], :], **EXACT)


@pytest.mark.parametrize("at", ["now", [0, 5]])
def test_the_scores_of_an_exam_are_those_of_each_alternative(tokenizer, at):  # noqa: F811
    model, episode = model_and_episode()
    exam = fw.Exam(tokenizer, PROMPTS, ANSWERS)
    sweep = [a for a in alternatives(model) if not isinstance(a, fw.Edit) or a.places.site.name != "logits"]
    trace = episode.probe(exam, at=at, sweep=sweep, sites=["resid_post"], positions=[0, 2])
    lead = (len(sweep),) if at == "now" else (2, len(sweep))
    assert trace.scores.logprob.shape == (*lead, 2, 3)
    assert trace.scores.rank.shape == (*lead, 2, 3)
    assert trace.scores.difference.shape == (*lead, 2)
    assert "logits" not in trace.sites
    for number, alternative in enumerate(sweep):
        alone = episode.probe(exam, at=at, edits=alternative, logits="all").logits
        scores, axis = exam.score(alone), len(lead) - 1
        torch.testing.assert_close(trace.scores.logprob.select(axis, number), scores.logprob, **EXACT)
        assert torch.equal(trace.scores.rank.select(axis, number), scores.rank)
    kept = episode.probe(exam, at=at, sweep=sweep, sites=["final_norm", "logits"])
    torch.testing.assert_close(kept.scores.logprob, trace.scores.logprob, **EXACT)
    whole = episode.probe(exam, at=at, sweep=sweep, logits="all").logits
    torch.testing.assert_close(kept["logits"], whole, **EXACT)


def test_the_last_tokens_of_an_exam_are_all_that_choose_a_token_of_an_answer(tokenizer):  # noqa: F811
    """So an edit there is the one that is made while the answer is being written."""
    model = tiny()
    exam, episode, seen = fw.Exam(tokenizer, PROMPTS, ANSWERS), fw.Episode(model), []

    def look(x, at):
        seen.append(at.positions.tolist())
        return bent(x)

    edit = fw.Edit("resid_mid", look, layers=[1, 3], positions="last")
    columns = [range(start, len(row)) for start, row in zip(exam.starts, exam.rows, strict=True)]
    assert max(map(len, columns)) > 1
    with fw.edited(model, edit) as done:
        trace = episode.probe(exam)
    assert done[0] == {row: list(each) for row, each in enumerate(columns)}
    torch.testing.assert_close(episode.probe(exam, edits=edit).scores.logprob, trace.scores.logprob, **EXACT)
    swept = episode.probe(exam, sweep=[[], edit]).scores
    torch.testing.assert_close(swept.logprob[1], trace.scores.logprob, **EXACT)
    assert not torch.allclose(swept.logprob[0], swept.logprob[1])
    # the same, written token by token: the prompt, and then what is generated
    for number, (prompt_ids, answers) in enumerate(zip(exam.prompt_ids, exam.answer_ids, strict=True)):
        for which, answer in enumerate(answers):
            twin = fw.Episode(model)
            logits, total = twin.feed([prompt_ids], edits=edit)[0, -1], 0.0
            for token in answer:
                total += float(logits.log_softmax(-1)[token])
                logits = twin.feed([[token]], edits=edit)[0, -1]
            assert float(trace.scores.logprob[number, which]) == pytest.approx(total, abs=1e-10)
    # prompts by themselves keep their one last token
    with fw.edited(model, edit) as done:
        episode.probe(exam.rows)
    assert done[0] == {row: [len(ids) - 1] for row, ids in enumerate(exam.rows)}


# ---- gradients


def finite_difference(model, ids, site, layer, direction, metric, first=keep, fast=None, step=1e-5):
    """Of the metric of the naive model, when `site` of that layer moves along `direction` [T, …] after an edit."""

    def at(size):
        def change(name, n, position, x):
            if (name, n) != (site, layer):
                return x
            own = direction[:, position, : x.shape[1]] if site in ("scores", "pattern") else direction[position]
            return x + size * own

        return metric(Naive(model.state_dict(), CONFIG, fast=fast).feed(ids, both(first, change)))

    return float(at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize("site", [*LAYERED, *WHOLE])
def test_gradients_equal_finite_differences_at_every_site(site):
    model = tiny()
    weights = torch.randn(6, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def metric(logits):
        return (logits[..., :, :] * weights).sum((-1, -2)) + logits[..., -1, 3].sin()

    trace = fw.Episode(model).probe(IDS, sites=[site, "resid_post"], gradient=True, metric=metric)
    assert trace.gradients[site].shape == trace[site].shape
    generator = torch.Generator().manual_seed(4)
    for layer in (0, 3) if site in LAYERED else (None,):
        gradient = trace.at(site, layer, trace.gradients)[0]
        direction = torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        if site in ("scores", "pattern"):
            direction = direction.tril()
        exact = finite_difference(model, IDS, site, layer, direction, metric)
        assert float((gradient * direction).sum()) == pytest.approx(exact, rel=2e-6, abs=1e-8), layer
    everything = [*LAYERED, *WHOLE]
    together = fw.Episode(model).probe(IDS, sites=everything, gradient=True, metric=metric)
    torch.testing.assert_close(together.gradients[site], trace.gradients[site], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("site", [*LAYERED, *WHOLE])
def test_gradients_after_an_edit_of_the_same_site_equal_finite_differences(site):
    model, places = tiny(), {} if site in WHOLE else {"layers": [1]}
    layer = None if site in WHOLE else 1

    def metric(logits):
        return logits[..., -1, 3] - logits[..., 2, 7].square()

    edits = [fw.Edit(site, lambda x, at: bent(x), positions=[1, 3, 5], **places), fw.ablate("act", layers=2, units=4)]
    change = both(twin(site, positions=[1, 3, 5], **places), twin("act", torch.zeros_like, layers=[2], units=[4]))
    trace = fw.Episode(model).probe(IDS, sites=[site, "z"], gradient=True, metric=metric, edits=edits)
    gradient = trace.at(site, layer, trace.gradients)[0]
    direction = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    direction = direction.tril() if site in ("scores", "pattern") else direction
    exact = finite_difference(model, IDS, site, layer, direction, metric, change)
    assert float((gradient * direction).sum()) == pytest.approx(exact, rel=2e-6, abs=1e-8)


@pytest.mark.parametrize("site", ["up.read", "down.read"])
def test_gradients_of_what_a_linear_reads_equal_finite_differences(site):
    model, episode = model_and_episode()
    naive = naive_of(model, HEBB, linears=LINEARS)
    naive.feed(prompt(1, 5, seed=5)[0].tolist(), write=True)

    def metric(logits):
        return logits[..., -1, 3] - logits[..., 2, 7].square()

    columns = [2, 5]  # the metric sees these alone
    trace = episode.probe(
        IDS, sites=site, gradient=True, metric=lambda x: x[..., 1, 3] - x[..., 0, 7].square(), positions=columns
    )
    for layer in (1, 2):
        gradient = trace.at(site, layer, trace.gradients)[0]
        assert gradient.shape[0] == 2
        direction = torch.zeros(6, gradient.shape[1], dtype=torch.float64)
        direction[columns] = torch.randn(
            gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
        )
        exact = finite_difference(model, IDS, site, layer, direction, metric, fast=naive.fast)
        assert float((gradient * direction[columns]).sum()) == pytest.approx(exact, rel=2e-6, abs=1e-8)


def test_gradients_of_many_lanes_are_those_of_each_alone(tokenizer):  # noqa: F811
    model, episode = model_and_episode()
    exam = fw.Exam(tokenizer, PROMPTS, ANSWERS)
    sweep, sites = alternatives(model), ["z", "resid_mid", "up.read", "embedding", "final_norm", "gate", "result"]
    sweep = [a for a in sweep if not isinstance(a, fw.Edit) or a.places.site.name != "logits"]
    options = {"sites": sites, "gradient": True, "positions": [0, 2, 3]}
    whole = episode.probe(exam, at=[0, 4], sweep=sweep, **options)
    small = least_bytes(episode, exam, at=[0, 4], sweep=sweep, **options)
    parts = episode.probe(exam, at=[0, 4], sweep=sweep, **options, max_bytes=small)
    for number, alternative in enumerate(sweep):
        alone = episode.probe(exam, at=[4], edits=alternative, **options)
        for site in sites:
            for trace in (whole, parts):
                assert trace.gradients[site].shape == trace[site].shape
                found, exact = trace.gradients[site][1, number], alone.gradients[site][0]
                torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12, msg=f"{number} {site}")
                torch.testing.assert_close(trace[site][1, number], alone[site][0], rtol=1e-10, atol=1e-12)
    assert not whole["z"].requires_grad
    assert not model.lm_head.weight.requires_grad


def test_the_gradient_of_an_exam_is_that_of_its_differences(tokenizer):  # noqa: F811
    model = tiny()
    exam = fw.Exam(tokenizer, ["the sky is", "the grass is"], [" blue", " red", " green"])
    episode = fw.Episode(model)
    ours = episode.probe(exam, sites="mlp_out", gradient=True)
    theirs = episode.probe(
        exam.rows, sites="mlp_out", gradient=True, metric=lambda logits: exam.score(logits).difference
    )
    torch.testing.assert_close(ours.gradients["mlp_out"], theirs.gradients["mlp_out"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.scores.difference, theirs.metric, **EXACT)


def test_attribution_patching_approximates_activation_patching_for_a_small_difference():
    model = tiny()
    with torch.no_grad():  # two tokens that are nearly the same
        model.model.embed_tokens.weight[41] = model.model.embed_tokens.weight[40] + 1e-4 * torch.randn(24).double()
    clean, corrupt = [3, 40, 15, 9, 26, 5], [3, 41, 15, 9, 26, 5]
    episode = fw.Episode(model)

    def metric(logits):
        return logits[:, -1, 7] - logits[:, -1, 8]

    a = episode.probe(clean, sites="z")
    b = episode.probe(corrupt, sites="z", gradient=True, metric=metric)
    approximate = ((a["z"] - b["z"]) * b.gradients["z"]).sum((-1, 2))  # [L, B, H]
    assert approximate.shape == (4, 1, 4)
    sweep = [fw.patch("z", a, layers=n, heads=h) for n in range(4) for h in range(4)]
    exact = episode.probe(corrupt, sweep=sweep, metric=metric).metric.reshape(4, 4) - b.metric
    torch.testing.assert_close(approximate[:, 0], exact, rtol=2e-2, atol=1e-8)
    assert float(exact.abs().max()) > 1e-6


# ---- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweep": []}, "expected a list of alternatives"),
        ({"sweep": fw.ablate("z")}, "expected a list of alternatives"),
        ({"sweep": "z"}, "expected a list of alternatives"),
        ({"sweep": [None]}, "expected fw.Edit"),
        ({"sweep": [[fw.ablate("z"), 3]]}, "edits holds a int, expected fw.Edit"),
        ({"sweep": [[], fw.ablate("z", positions="generated")]}, "selects no token of this probe"),
        ({"edits": fw.ablate("z", positions=fw.token_ids([60]))}, r"Edit\('z', Zero\(\), positions=.*selects no token"),
        ({"metric": 3}, "metric=3: expected a function"),
        ({"gradient": True, "sites": "z"}, "needs a metric or an exam"),
        ({"gradient": True, "metric": torch.sum}, "needs sites="),
        ({"gradient": True, "sites": "z", "metric": lambda x: 3.0}, "the metric does not depend on the logits"),
        ({"positions": "first"}, "positions='first'"),
        ({"positions": [6]}, r"positions=\[6\]\): expected columns from 0 to 5"),
        ({"positions": [True] * 6}, r"positions=\[True.*expected columns from 0 to 5, or 'last'"),
        ({"positions": [1.5]}, r"positions=\[1.5\]\): expected columns from 0 to 5"),
        ({"positions": ["a"]}, "expected columns from 0 to 5"),
        ({"layers": 2}, r"layers=2\): none of the sites \[\] lies in layers"),
        ({"layers": 2, "sites": "logits"}, r"none of the sites \['logits'\] lies in layers"),
        ({"layers": 9, "sites": "z"}, "layer 9 does not exist: this model has layers 0 to 3"),
        ({"metric": lambda logits: None}, "metric returned a NoneType: expected a number or a tensor"),
        (
            {"metric": lambda x: x.flatten()[: 1 + bool(x.any())], "sweep": [[], fw.ablate("logits")]},
            r"metric returned shapes \[1\] and \[2\]: expected always the same",
        ),
        ({"sites": "down.read", "layers": 3}, "down_proj of layer 3 is not plastic; plastic are layers"),
    ],
)
def test_a_probe_refuses_in_one_sentence_and_changes_nothing(options, message):
    model, episode = model_and_episode()
    before = episode.probe(IDS).logits
    with pytest.raises(ValueError, match=message) as refused:
        episode.probe(IDS, **options)
    assert "\n" not in str(refused.value)
    assert torch.equal(episode.probe(IDS).logits, before)
    assert not model.binding.taps


def test_a_gradient_is_refused_where_torch_takes_none():
    episode = fw.Episode(tiny())
    with torch.inference_mode():
        with pytest.raises(ValueError, match="inference_mode"):
            episode.probe(IDS, sites="z", gradient=True, metric=torch.sum)
        episode.probe(IDS, sites="resid_mid", edits=fw.Edit("resid_mid", lambda x, at: bent(x)), sweep=[[]])
    with torch.no_grad():
        assert episode.probe(IDS, sites="z", gradient=True, metric=torch.sum).gradients["z"].any()


def test_more_than_max_bytes_is_refused_with_the_bytes():
    _, episode = model_and_episode()
    sweep = [fw.ablate("z", layers=n) for n in range(4)]
    with pytest.raises(
        ValueError, match=r"this probe needs \d+ bytes, \d+ of them for what it keeps, but max_bytes=5000"
    ):
        episode.probe(IDS, sweep=sweep, sites=["resid_post"], max_bytes=5000)
    exact = episode.probe(IDS, sweep=sweep).logits
    enough = least_bytes(episode, IDS, sweep=sweep)
    done = []
    found = episode.probe(IDS, sweep=sweep, max_bytes=enough, progress=lambda n, of: done.append((n, of)))
    torch.testing.assert_close(found.logits, exact, **EXACT)
    assert done == [(n, 4) for n in (1, 2, 3, 4)]


def test_an_exam_and_a_metric_or_a_mask_are_not_taken_together(tokenizer):  # noqa: F811
    exam, episode = fw.Exam(tokenizer, PROMPTS, ANSWERS), fw.Episode(tiny())
    with pytest.raises(ValueError, match="got an exam and a metric: expected one"):
        episode.probe(exam, metric=torch.sum)
    with pytest.raises(ValueError, match="got an exam and an attention_mask"):
        episode.probe(exam, attention_mask=[[1]])
    with pytest.raises(ValueError, match=r"but this episode has batch 3"):
        fw.Episode(tiny(), 3).probe(exam)
