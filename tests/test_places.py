"""Which tokens an edit means, what is refused, and that a refusal leaves everything as it was."""

import pytest
import torch
from naive import bent, twin
from tiny import naive_of, prompt, tiny

import fastweights as fw

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
IDS = [3, 14, 15, 9, 26, 5, 35, 8]
HEBB = fw.Hebbian(rate=0.3, mu=0.1, decay=0.05, bias=True)
GRADIENT = fw.GradientAscent(rate=0.3, decay=0.05)
LINEARS = ["gate_proj", "up_proj"]


# ---- which tokens are meant


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [
        (None, range(8)),
        ("all", range(8)),
        ("none", []),
        ("prompt", range(8)),
        ("generated", []),
        ("last", [7]),
        (3, [3]),
        ([0, 5], [0, 5]),
        (range(2, 5), [2, 3, 4]),
        ({1, 6}, [1, 6]),
        (torch.tensor([4, 2]), [2, 4]),
        (torch.tensor(6), [6]),
        ([], []),
        ([True, False, False, True, False, False, False, True], [0, 3, 7]),
        (torch.tensor([[True, False, False, True, False, False, False, True]]), [0, 3, 7]),
        (fw.token_ids([9, 35]), [3, 6]),
        (lambda position, token: position > 5 or token == 14, [1, 6, 7]),
        ([[2, 6]], [2, 6]),
        ([torch.tensor([2, 6])], [2, 6]),
    ],
    ids=lambda value: "function" if callable(value) else str(value),
)
def test_positions_speak_the_language_of_update(positions, chosen):
    model = tiny()
    edit = fw.ablate("mlp_out", layers=1, positions=positions)
    exact = naive_of(model).feed(IDS, twin("mlp_out", torch.zeros_like, layers=[1], positions=chosen))
    torch.testing.assert_close(fw.Episode(model).feed([IDS], edits=edit)[0], exact, **CLOSE)
    if chosen:
        torch.testing.assert_close(fw.Episode(model).probe(IDS, edits=edit).logits[0], exact, **CLOSE)
    else:
        with pytest.raises(ValueError, match="selects no token of this probe"):
            fw.Episode(model).probe(IDS, edits=edit)


@pytest.mark.parametrize(
    ("positions", "chosen"),
    [("last", [7, 8, 9, 10]), ("generated", [8, 9, 10]), ("prompt", range(8)), ([2, 9], [2, 9]), (None, range(11))],
    ids=str,
)
def test_positions_go_on_in_what_is_generated(positions, chosen):
    model = tiny()
    edit = fw.ablate("resid_post", layers=2, positions=positions, units=range(12))
    steps = list(fw.Episode(model).generate([IDS], 3, edits=edit, stop_token_ids=()))
    naive = naive_of(model)
    change = twin("resid_post", torch.zeros_like, layers=[2], units=range(12), positions=chosen)
    logits = naive.feed(IDS, change)[-1]
    for step in steps:
        torch.testing.assert_close(step.logits[0], logits, **CLOSE)
        logits = naive.feed([int(step.token_ids)], change)[0]


@pytest.mark.parametrize("positions", ["last", None, [[0, 2, 4], [1]]], ids=str)
def test_ragged_padded_rows_are_edited_as_each_row_alone(positions):
    model = tiny()
    fw.attach(model, [1, 2], HEBB, LINEARS, rank=32)
    rows = [IDS, IDS[2:5]]
    left = [IDS, [0] * 5 + IDS[2:5]]
    mask = [[1] * 8, [0] * 5 + [1] * 3]
    edits = [
        fw.Edit(site, lambda x, at: bent(x), layers=2, positions=positions)
        for site in ("z", "pattern", "resid_mid", "gate", "up.read", "gate.value")
    ]
    for options in ({}, {"attention_mask": mask}):
        episode = fw.Episode(model, 2)
        logits = episode.feed(left if options else rows, edits=edits, **options)
        decoded = episode.feed([[4], [4]], edits=[edit for edit in edits if positions == "last" or positions is None])
        for row, ids in enumerate(rows):
            own = [
                fw.Edit(
                    e.places.site.name,
                    e.change,
                    layers=2,
                    positions=positions[row] if isinstance(positions, list) else positions,
                )
                for e in edits
            ]
            alone = fw.Episode(model)
            expected = alone.feed([ids], edits=own)[0]
            ours = logits[row, -len(ids) :] if options else logits[row, : len(ids)]
            torch.testing.assert_close(ours, expected, **CLOSE)
            expected = alone.feed([[4]], edits=own if positions == "last" or positions is None else ())
            torch.testing.assert_close(decoded[row], expected[0], **CLOSE)
            torch.testing.assert_close(
                episode.delta_weight(2, "gate_proj", row), alone.delta_weight(2, "gate_proj"), **CLOSE
            )


def test_padding_is_never_touched_and_never_counted():
    model, seen = tiny(), []

    def look(x, at):
        seen.append((at.rows.tolist(), at.positions.tolist(), at.token_ids.tolist(), tuple(x.shape), at.site, at.layer))
        return torch.full_like(x, torch.nan)

    trace = fw.Episode(model, 3).probe([[1, 2, 3], [4], [5, 6]], edits=fw.Edit("act", look, layers=3, rows=[1, 2]))
    assert seen == [([1, 2], [[0, -1, -1], [0, 1, -1]], [[4, 0, 0], [5, 6, 0]], (2, 3, 52), "act", 3)]
    nan = trace.logits.isnan().any(-1)
    assert nan.tolist() == [[False] * 3, [True, False, False], [True, True, False]]


def test_rows_that_are_not_named_keep_their_bits():
    model, ids = tiny(), prompt(3, 7)
    fw.attach(model, [1], HEBB, rank=32)
    plain, episode = fw.Episode(model, 3), fw.Episode(model, 3)
    edit = fw.Edit("z", lambda x, at: bent(x), rows=1)
    torch.testing.assert_close(episode.feed(ids, edits=edit)[[0, 2]], plain.feed(ids)[[0, 2]], rtol=1e-13, atol=1e-13)
    alone = fw.Episode(model)
    torch.testing.assert_close(
        alone.feed(ids[1:2], edits=fw.Edit("z", lambda x, at: bent(x)))[0], episode_row(model, ids), **CLOSE
    )


def episode_row(model, ids):
    return fw.Episode(model, 3).feed(ids, edits=fw.Edit("z", lambda x, at: bent(x), rows=1))[1]


def test_edits_act_in_order_and_a_change_may_work_in_place():
    model = tiny()

    def add(x, at):
        x += 1
        return x

    def double(x, at):
        x.mul_(2)
        return x

    for first, second, what in ((add, double, lambda x: 2 * (x + 1)), (double, add, lambda x: 2 * x + 1)):
        for places in ({}, {"units": [0, 5]}, {"positions": [2, 3]}):
            edits = [fw.Edit("mlp_norm", first, **places), fw.Edit("mlp_norm", second, **places)]
            exact = naive_of(model).feed(IDS, twin("mlp_norm", what, **places))
            torch.testing.assert_close(fw.Episode(model).feed([IDS], edits=edits)[0], exact, **CLOSE)
            torch.testing.assert_close(fw.Episode(model).probe(IDS, edits=edits).logits[0], exact, **CLOSE)
            with fw.edited(model, edits[0]):
                torch.testing.assert_close(fw.Episode(model).feed([IDS], edits=edits[1])[0], exact, **CLOSE)
                with fw.edited(model, edits[1]):
                    torch.testing.assert_close(model(torch.tensor([IDS]))[0], exact, **CLOSE)
                    torch.testing.assert_close(fw.Episode(model).probe(IDS).logits[0], exact, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_after_the_change(dtype):
    model, kinds = tiny(dtype), []
    direction = torch.linspace(-1, 1, 24)

    def wide(x, at):
        kinds.append(x.dtype)
        return x.double() + 0.3 * direction.double()

    reference = fw.Episode(model).probe([[5, 6, 7, 8], [9, 10]], sites="mlp_out")
    pool = reference["mlp_out", 1][reference.positions >= 0].float().mean(0)
    with fw.capture(model, "mlp_out", layers=1) as plain:
        fw.Episode(model).feed([IDS])
    x = plain["mlp_out", 1]
    for edit, exact in (
        (fw.Edit("mlp_out", wide, layers=1), (x.double() + 0.3 * direction.double()).to(dtype)),
        (fw.steer("mlp_out", direction, 0.3, layers=1), (x.float() + 0.3 * direction).to(dtype)),
        (fw.ablate("mlp_out", "mean", reference, layers=1), pool.to(dtype).expand_as(x)),
    ):
        with fw.capture(model, "mlp_out", layers=1) as seen:
            logits = fw.Episode(model).feed([IDS], edits=edit)
        assert seen["mlp_out", 1].dtype == logits.dtype == dtype
        assert torch.equal(seen["mlp_out", 1], exact)
    assert kinds == [dtype]


# ---- what is refused, and what stays as it was


def facts(episode):
    """Everything that moves, as plain values and tensors."""
    tensors = [log.delta_weight(row) for log in episode.logs.values() for row in (0,)]
    tensors += [t[:, :, : episode.length].clone() for t in (*episode.cache.keys, *episode.cache.values)]
    tensors.append(torch.zeros(0) if episode.logits is None else episode.logits)
    return [episode.lengths, episode.token_ids, list(episode.event_counts.values())], tensors


def same(one, other):
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


def no_hooks(model):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def wrong_shape(x, at):
    return x[..., :-1]


def raised(x, at):
    raise KeyError("mine")


def interrupted(x, at):
    raise KeyboardInterrupt


SOURCE = fw.Episode(tiny()).probe(IDS, sites=["z", "logits"], layers=[0, 1])
LAST = fw.Episode(tiny()).probe(IDS, sites=["z"], positions="last")
SWEPT = fw.Episode(tiny()).probe(IDS, sites="z", sweep=[[]])
REFUSED = [
    (fw.Edit("act", wrong_shape, layers=2), r"change of 'act' got shape \[1, 8, 52\] and returned \[1, 8, 51\]"),
    (fw.Edit("z", lambda x, at: 3.0, layers=2), r"change of 'z' got shape \[1, 8, 4, 6\] and returned float"),
    (fw.Edit("z", lambda x, at: None), "returned NoneType"),
    (fw.Edit("pattern", wrong_shape), r"got shape \[1, 4, 8, 8\] and returned \[1, 4, 8, 7\]"),
    (fw.Edit("logits", wrong_shape), r"change of 'logits' got shape \[1, [18], 61\] and returned \[1, [18], 60\]"),
    (fw.Edit("z", raised, layers=2), "mine"),
    (fw.Edit("z", interrupted, layers=2), "^$"),
    (fw.patch("z", SOURCE), "does not hold layer 2 of 'z'"),
    (fw.patch("q", SOURCE), r"patch\(source=...\) does not hold 'q'"),
    (fw.patch("z", SWEPT), "is a trace of several moments or alternatives"),
    (fw.patch("z", LAST), r"has no position 0 in row 0: it has positions \[7\]"),
    (fw.ablate("z", "mean", SOURCE, layers=[1, 3]), "does not hold layer 3"),
    (fw.steer("z", torch.ones(7)), r"steer\('z'\): the direction has shape \[7\], expected \[6\] or \[4, 6\]"),
    (fw.steer("z", torch.ones(3, 6), layers=[0, 1]), r"has shape \[3, 6\], expected \[6\] or \[2, 6\]"),
    (fw.steer("z", torch.ones(2, 6), layers=[1, 1]), r"layers=\[1, 1\] names a layer twice"),
    (fw.patch("z", fw.Trace({"z": torch.zeros(4, 1, 8, 4, 6)})), "has no positions: expected the trace of a probe"),
    (fw.steer("logits", torch.ones(4, 61)), r"has shape \[4, 61\], expected \[61\]$"),
    (fw.steer("pattern", torch.ones(8)), "its last axis is tokens"),
    (fw.project_out("scores", torch.ones(8)), "its last axis is tokens"),
    (fw.project_out("resid_mid", torch.ones(2, 6)), "the directions have 6 numbers each, expected 24"),
    (fw.ablate("z", positions=[True] * 7), r"positions mask has shape \[7\], but this feed is \[1, 8\]"),
    (fw.ablate("z", positions=300), "position 300 does not exist"),
    ("z", "edits holds a str, expected fw.Edit"),
    (None, "edits"),
]


@pytest.mark.parametrize("verb", ["feed", "generate", "probe", "sweep", "edited"])
@pytest.mark.parametrize(("edit", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_after_a_refusal_an_episode_goes_on_with_the_same_bits(edit, message, verb):
    model = tiny()
    fw.attach(model, [1, 2], HEBB, LINEARS, rank=32)
    episode, twin_ = fw.Episode(model), fw.Episode(model)
    before = facts(episode)
    verbs = {
        "feed": lambda: episode.feed([IDS], edits=[edit]),
        "generate": lambda: next(episode.generate([IDS], 3, edits=[edit])),
        "probe": lambda: episode.probe([IDS], edits=[edit]),
        "sweep": lambda: episode.probe([IDS], sweep=[[], [edit]]),
        "edited": lambda: around(model, edit, lambda: episode.feed([IDS])),
    }
    with pytest.raises((ValueError, KeyError, KeyboardInterrupt), match=message) as refused:
        verbs[verb]()
    assert "\n" not in str(refused.value)
    assert same(facts(episode), before)
    assert no_hooks(model)
    assert not model.binding.taps
    assert torch.equal(episode.feed([IDS]), twin_.feed([IDS]))
    assert torch.equal(episode.feed([[4]]), twin_.feed([[4]]))
    assert episode.path == twin_.path == "modules"  # float64


def around(model, edit, run):
    with fw.edited(model, edit):
        run()


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("rule", ["hebbian", "gradient"])
def test_an_edit_that_fails_in_the_middle_of_a_life_leaves_it_as_it_was(rule, split):
    model = tiny()
    fw.attach(model, [1, 2], {"hebbian": HEBB, "gradient": GRADIENT}[rule], LINEARS, rank=4, overflow="compress")
    episode, twin_ = fw.Episode(model), fw.Episode(model)
    for each in (episode, twin_):
        each.feed([IDS])
    before = facts(episode)

    def late(x, at):
        if int(at.positions.max()) >= 10:
            raise KeyboardInterrupt
        return x * 0.9

    for edits in (fw.Edit("z", late, layers=3), [fw.Edit("up.read", late), fw.ablate("q")]):
        with pytest.raises(KeyboardInterrupt):
            episode.feed([IDS[:4]], edits=edits)
        assert same(facts(episode), before)
        assert no_hooks(model)
    for part in torch.tensor([IDS[:4]]).split(split, 1):
        assert torch.equal(episode.feed(part), twin_.feed(part))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fw.Edit("z", 3), "change=3"),
        (lambda: fw.ablate("z", "median"), "by='median'"),
        (lambda: fw.ablate("z", "mean"), "needs reference="),
        (lambda: fw.ablate("z", "mean", {}), "needs reference="),
        (lambda: fw.ablate("z", reference=SOURCE), "takes no reference"),
        (lambda: fw.ablate("pattern", "mean", SOURCE), "expected by='zero'"),
        (lambda: fw.patch("z", torch.zeros(3)), "got a Tensor, expected the trace of another run"),
        (lambda: fw.steer("z", torch.tensor([1.0, torch.nan])), "not finite"),
        (lambda: fw.project_out("z", torch.zeros(6)), "none of them zero"),
        (lambda: fw.steer("z", "up"), "the direction is a str: expected numbers"),
        (lambda: fw.steer("z", torch.ones(6), float("nan")), "the strength is not finite"),
        (lambda: fw.ablate("z", "resample", SOURCE, seed=1.5), r"seed=1.5\): expected a whole number"),
        (lambda: fw.project_out("z", torch.zeros(2, 3, 6)), r"shape \[2, 3, 6\]"),
        (lambda: fw.ablate("z", positions={0: 1}), "positions={0: 1}"),
        (lambda: fw.ablate("z", positions=[0, "a"]), "positions"),
    ],
)
def test_edits_that_mean_nothing_are_refused_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_patch_of_another_length_says_both_and_where_they_part():
    model = tiny()
    episode, other = fw.Episode(model), [*IDS[:3], 7, 7]
    source = fw.Episode(model).probe(IDS, sites="z")
    with pytest.raises(ValueError, match=r"has 8 tokens, but row 0 has 5 \(the tokens part at position 3\): expected"):
        episode.probe(other, edits=fw.patch("z", source))
    with pytest.raises(ValueError, match=r"has 8 tokens, but row 0 has 10 \(the tokens part at position 3\)"):
        episode.feed([[*other, 1, 2, 3, 4, 5]], edits=fw.patch("z", source))
    with pytest.raises(ValueError, match=r"has no position 9 in row 0: it has positions \[0, 1, 2, 3, 4, 5, 6, 7\]"):
        episode.probe([*other, 1, 2, 3, 4, 5], edits=fw.patch("z", source, positions=[2, 9]))
    two = fw.Episode(model).probe([IDS, IDS], sites="z")
    with pytest.raises(ValueError, match=r"has 2 rows, but row 2 is to be patched"):
        fw.Episode(model, 3).feed([IDS] * 3, edits=fw.patch("z", two))
    assert episode.length == 0
    exact = naive_of(model)
    exact.feed(IDS)

    def change(site, layer, position, x):
        return exact.stacked("z", layer)[position] if site == "z" and position == 2 else x

    patched = episode.probe(other, edits=fw.patch("z", source, positions=2)).logits[0]
    torch.testing.assert_close(patched, naive_of(model).feed(other, change), **CLOSE)


def test_generated_tokens_that_a_patch_does_not_reach_are_left_alone():
    model = tiny()
    source = fw.Episode(model).probe(IDS, sites="resid_post", layers=2)
    for positions in (None, "last"):
        edit = fw.patch("resid_post", source, layers=2, positions=positions)
        plain = list(fw.Episode(model).generate([IDS], 3, stop_token_ids=()))
        patched = list(fw.Episode(model).generate([IDS], 3, edits=edit, stop_token_ids=()))
        for one, other in zip(plain, patched, strict=True):
            torch.testing.assert_close(one.logits, other.logits, **CLOSE)


def test_what_generate_refuses_is_refused_before_the_first_step_is_asked_for():
    model = tiny()
    episode = fw.Episode(model, 2)
    source = fw.Episode(model).probe(IDS[:3], sites="z")
    for edit, message in (
        (fw.ablate("z", rows=2), "row 2 does not exist"),
        (fw.ablate("z", positions=[[0], [1], [2]]), "lists for 3 rows"),
        (fw.patch("z", source), "has 3 tokens, but row 0 has 8"),
        (fw.ablate("z", positions=[True]), "positions mask has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            episode.generate([IDS, IDS], 3, edits=edit)
    episode.feed([IDS, IDS])
    with pytest.raises(ValueError, match="row 2 does not exist"):
        episode.generate(None, 3, edits=fw.ablate("z", rows=2))


def test_what_a_change_returns_stays_the_callers():
    """A tensor of the caller's own, or one row that stands for all, is never written into."""
    model, ids = tiny(), [IDS, IDS]
    constant = torch.linspace(-1, 1, 24, dtype=torch.float64).expand(2, 8, 24).clone()
    kept, episode = constant.clone(), fw.Episode(model, 2)
    reference = fw.Episode(model).probe(IDS, sites="resid_post")

    def whole(x, at):
        return constant

    for first, what in (
        (fw.Edit("resid_post", whole, layers=1), lambda x: kept[0, 0]),
        (fw.Edit("resid_post", lambda x, at: constant[:1, :1].expand_as(x), layers=1), lambda x: kept[0, 0]),
        (fw.ablate("resid_post", "mean", reference, layers=1), lambda x: reference["resid_post", 1][0].mean(0)),
    ):
        second = fw.Edit("resid_post", lambda x, at: x.mul_(2), layers=1, rows=0)
        third = fw.Edit("resid_post", lambda x, at: x.add_(1), layers=1, rows=1, positions=[2])
        exact = [
            naive_of(model).feed(IDS, twin("resid_post", lambda x, what=what: 2 * what(x), layers=[1])),
            naive_of(model).feed(
                IDS,
                lambda s, n, p, x, what=what: what(x) + (p == 2) if (s, n) == ("resid_post", 1) else x,
            ),
        ]
        edits = [first, second, third]
        torch.testing.assert_close(episode.probe(ids, edits=edits).logits, torch.stack(exact), **CLOSE)
        torch.testing.assert_close(fw.Episode(model, 2).feed(ids, edits=edits), torch.stack(exact), **CLOSE)
        episode.probe(ids, edits=edits, sites="resid_post", gradient=True, metric=torch.sum)
        assert torch.equal(constant, kept)
        assert not constant.requires_grad
        if first.change is whole:
            continue  # it speaks of two rows, and a sweep has more
        swept = episode.probe(ids, edits=first, sweep=[[], second, third], sites="resid_post").logits
        torch.testing.assert_close(swept[1, 0], exact[0], **CLOSE)
        torch.testing.assert_close(swept[2, 1], exact[1], **CLOSE)
        torch.testing.assert_close(swept[1, 1], swept[0, 0], **CLOSE)


def test_what_a_change_is_told_is_a_copy():
    model, ids = tiny(), torch.tensor([IDS, IDS])

    def scribble(x, at):
        for told in (at.token_ids, at.positions, at.rows):
            told.fill_(0)
        return x / 2

    episode = fw.Episode(model, 2)
    edits = [fw.Edit("z", scribble, layers=1), fw.Edit("z", lambda x, at: x + at.positions[..., None, None], layers=2)]
    exact = naive_of(model).feed(
        IDS, lambda s, n, p, x: x / 2 if (s, n) == ("z", 1) else x + p if (s, n) == ("z", 2) else x
    )
    with fw.edited(model, *edits) as done:
        torch.testing.assert_close(episode.feed(ids)[1], exact, **CLOSE)
    assert ids.tolist() == episode.token_ids == [IDS, IDS]
    assert done[0] == {0: list(range(8)), 1: list(range(8))}
