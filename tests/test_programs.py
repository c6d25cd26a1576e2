"""Random programs over an episode: after every step it equals one naive oracle per row.

A program is a list of operations: feed, generate, snapshot, restore, fork, undo, probe, save and load, reset. The
oracle keeps a dense ΔW and its whole past; a bounded log is said densely as well, as the sum over the last events
("evict") or as a truncated SVD at the events where a fold is due ("compress").
"""

import math
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import LINEARS, FastLinear
from tiny import CONFIG, least_bytes, oracle_of, prompt, tiny

import fastweights as fw

LAYERS = 3
MODEL = tiny(num_hidden_layers=LAYERS)
WIDTH = {"gate_proj": 52, "up_proj": 52, "down_proj": 24}
TOLERANCE = 1e-9  # of the largest number in a tensor, or of 1

program_settings = settings(deadline=None, derandomize=True, database=None, print_blob=False)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the oracle's side


class Remembered(FastLinear):
    """The oracle's linear with the past of its ΔW, and with the policy of a bounded log."""

    def __init__(self, plain, linear):
        super().__init__(plain.W, plain.b, plain.plastic, plain.has_silu)
        self.overflow, self.rank, self.archive = linear.overflow, linear.rank, linear.archive
        self.scales = []  # the bias key of every event
        # of W, and ‖ΔW‖ after every event before it was scaled
        self.share, self.lengths = None if linear.budget is None else linear.budget.share, []
        self.held = [(self.dW, self.db)]  # as it was read after 0, 1, … events
        self.folds = [0]  # event counts at which it was folded

    @property
    def count(self):
        return len(self.values)

    def write(self, h, u):
        super().write(h, u)
        self.scales = [*self.scales, 1.0 if self.plastic.mu is None else 1 / (float(h @ h) + self.plastic.mu)]
        if self.overflow == "evict":
            self.lengths = [*self.lengths, 0.0]
            self.dW, self.db = self.total(self.count)
            self.lengths = self.lengths[:-1]
        self.lengths = [*self.lengths, float(self.dW.norm())]
        self.dW, self.db = self.factor(self.count) * self.dW, self.factor(self.count) * self.db
        if self.overflow == "compress":
            self.fold()
        self.held = [*self.held, (self.dW, self.db)]

    def fold(self):
        block, kept = max(8, self.rank // 2), min(self.rank, len(self.W), self.W.shape[1] + 1)
        due = self.rank + block if len(self.folds) == 1 else self.folds[-1] + self.rank + block - kept
        if self.count != due:
            return
        U, S, Vh = torch.linalg.svd(torch.cat([self.dW, self.db[:, None]], dim=1), full_matrices=False)
        # two singular values that agree make the best approximation arbitrary
        assume(float(S[kept - 1] - S[kept]) > 1e-5 * float(S[0]) or float(S[kept - 1]) < 1e-13 * float(S[0]))
        best = (U[:, :kept] * S[:kept]) @ Vh[:kept]
        self.dW, self.db = best[:, :-1], best[:, -1]
        self.folds = [*self.folds, due]

    def factor(self, n):
        """What the budget scaled ΔW by after event n."""
        length, limit = self.lengths[n - 1], (self.share or 0) * float(self.W.norm())
        return 1.0 if self.share is None or length <= limit else limit / length

    def event(self, j, n):
        """What event j (from 1) is after n events: (ΔW, Δb)."""
        weight = (1 - self.plastic.decay) ** (n - j) * math.prod(self.factor(m) for m in range(j, n + 1))
        bias = weight * self.scales[j - 1] * self.values[j - 1] if self.plastic.bias else torch.zeros_like(self.db)
        return weight * torch.outer(self.values[j - 1], self.keys[j - 1]), bias

    def total(self, n):
        """The sum of the first n events, or of the last `rank` of them."""
        first = max(0, n - self.rank) if self.overflow == "evict" else 0
        parts = [self.event(j, n) for j in range(first + 1, n + 1)]
        dW, db = (sum(part) for part in zip(*parts, strict=True)) if parts else (0, 0)
        return dW + torch.zeros_like(self.W), db + torch.zeros_like(self.b)

    def moment(self, n, without=None):
        """(ΔW, Δb) as a probe sees it after n events; an archive knows nothing of folds."""
        dW, db = self.held[n] if self.overflow == "compress" and not self.archive else self.total(n)
        gone = self.overflow == "evict" and without is not None and without <= n - self.rank
        if without is not None and without <= n and not gone:
            lost = self.event(without, n)
            dW, db = dW - lost[0], db - lost[1]
        return dW, db

    def oldest_moment(self):
        if self.archive or self.overflow in ("grow", "error"):
            return 0
        return (self.count if self.count > self.rank else 0) if self.overflow == "evict" else self.folds[-1]

    def oldest_event(self):
        if self.archive or self.overflow in ("grow", "error"):
            return 0
        return max(0, self.count - self.rank) if self.overflow == "evict" else self.folds[-1]

    def undo(self, events):
        n = self.count - events
        self.held, self.folds = self.held[: n + 1], [fold for fold in self.folds if fold <= n]
        self.keys, self.values, self.scales = self.keys[:n], self.values[:n], self.scales[:n]
        self.lengths = self.lengths[:n]
        self.dW, self.db = self.held[-1]


def oracle_row(handles):
    row = oracle_of(MODEL, handles, {**CONFIG, "num_hidden_layers": LAYERS})
    linears = {site: linear for handle in handles for site, linear in handle.linears.items()}
    row.fast = {site: Remembered(plain, linears[site]) for site, plain in row.fast.items()}
    row.logits = None  # of the last token
    row.undone = False  # since the last token
    return row


def close(ours, theirs):
    theirs = theirs.to(ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE * (1 + float(theirs.abs().max())))


# ---- the program


def random(seed):
    return torch.Generator().manual_seed(seed)


def draw_tokens(seed, rows, width, repeated):
    """Ids [B, T]; `repeated`: of three tokens only, so that keys come back."""
    low, high = (20, 23) if repeated else (0, CONFIG["vocab_size"])
    return torch.randint(low, high, (rows, width), generator=random(seed))


def draw_mask(seed, kind, rows, width):
    """Bool [B, T] with at least one token; a row may be all padding."""
    mask = torch.ones(rows, width, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(rows, width, generator=random(seed)) < 0.6
    else:
        for row, cut in enumerate(torch.randint(0, width + 1, (rows,), generator=random(seed)).tolist()):
            if kind == "left":
                mask[row, :cut] = False
            elif kind == "right":
                mask[row, cut:] = False
            elif kind == "inside":
                mask[row, cut // 2 : cut] = False
    if not mask.any():
        mask[seed % rows, 0] = True
    return mask


def draw_update(kind, seed, rows, width, length):
    """(what `update=` is given, what it means: (row, column or None if generated, position, token) → bool)."""
    if kind == "positions":
        upto = length + width + 4
        chosen = (torch.rand(upto, generator=random(seed)) < 0.5).nonzero()[:, 0].tolist()
        return chosen, lambda b, t, position, token: position in chosen
    if kind == "mask":
        mask = torch.rand(rows, width, generator=random(seed)) < 0.6
        return mask, lambda b, t, position, token: t is not None and bool(mask[b, t])
    if kind == "callable":
        return (lambda position, token: (position + token) % 3 > 0), lambda b, t, p, token: (p + token) % 3 > 0
    if kind == "token_ids":
        return fw.token_ids(range(15, 45)), lambda b, t, position, token: 15 <= token < 45
    means = {"all": (True, True), "none": (False, False), "prompt": (True, False), "generated": (False, True)}[kind]
    return kind, lambda b, t, position, token: means[t is None]


class Machine:
    """The episode, its oracles, and what was put aside on the way."""

    def __init__(self, handles, rows):
        self.fresh = oracle_row(handles)
        self.episode, self.rows = fw.Episode(MODEL, rows), [self.fresh.fork() for _ in range(rows)]
        self.snapshots, self.others = [], []

    def run(self, program):
        for name, arguments in program:
            getattr(self, name)(**arguments)
            check(self.episode, self.rows)
        for episode, rows in self.others:  # a fork and its parent never change each other
            check(episode, rows)
        for snapshot, rows in self.snapshots:
            episode = fw.Episode(MODEL, len(rows))
            episode.restore(snapshot)
            check(episode, rows)

    def copies(self):
        return [row.fork() for row in self.rows]

    def step(self, b, token, write):
        row = self.rows[b]
        row.logits, row.undone = row.step(token, write), False
        return row.logits

    def refused(self, ids, real, writes):
        """Whether these tokens do not fit "error": an event that waits counts, that of the last token does not."""
        for b, row in enumerate(self.rows):
            columns = real[b].nonzero()[:, 0].tolist()
            written = [bool(writes[b, t]) for t in columns]
            waiting = row.pending is not None and bool(columns)
            for fast in row.fast.values():
                local = fast.plastic.kind != "gradient-ascent"
                more = sum(written) if local else waiting + sum(written[:-1])
                if fast.overflow == "error" and fast.count + more > fast.rank:
                    return True
        return False

    # ---- operations

    def feed(self, seed, width, mask, update, repeated=False, last=False, generate=False):
        rows = len(self.rows)
        ids, real = draw_tokens(seed, rows, width, repeated), draw_mask(seed, mask, rows, width)
        given, means = draw_update(update, seed, rows, width, self.episode.length)
        position = torch.tensor([row.length for row in self.rows])[:, None] + real.cumsum(1) - 1
        writes = torch.tensor(
            [[means(b, t, int(position[b, t]), int(ids[b, t])) for t in range(width)] for b in range(rows)]
        )
        input_ids, attention_mask = ids, real.int()
        if mask == "right" and seed % 2 and update != "mask" and real.any(1).all():  # ragged lists say the same
            input_ids, attention_mask = [ids[b, real[b]].tolist() for b in range(rows)], None
            real, writes = real[:, : max(map(len, input_ids))], writes[:, : max(map(len, input_ids))]
        if self.refused(ids, real, writes):
            with pytest.raises(ValueError, match="do not fit its rank of"):
                self.episode.feed(input_ids, given, attention_mask)
            return
        logits = self.episode.feed(input_ids, given, attention_mask, "last" if last else "all")
        for b in range(rows):
            columns = real[b].nonzero()[:, 0].tolist()
            for t in columns:
                expected = self.step(b, int(ids[b, t]), bool(writes[b, t]))
                if not last or t == columns[-1]:
                    close(logits[b, 0 if last else t], expected)

    def generate(self, seed, new, update, stop, width=0):
        rows = len(self.rows)
        _, means = draw_update(update, seed, rows, width or 1, self.episode.length)
        prompt, real = None, torch.zeros(rows, 0, dtype=torch.bool)
        if width or any(row.logits is None for row in self.rows):
            prompt = draw_tokens(seed, rows, width or 1, False)
            real = torch.ones_like(prompt, dtype=torch.bool)
        given, means = draw_update(update, seed, rows, real.shape[1], self.episode.length)
        stops = set(range(0, 61, 4)) if stop else set()
        steps = self.episode.generate(prompt, new, update=given, stop_token_ids=tuple(stops))
        lengths = [row.length for row in self.rows]
        if prompt is not None:
            places = [(b, t) for b in range(rows) for t in range(real.shape[1])]
            writes = torch.zeros_like(real)
            for b, t in places:
                writes[b, t] = means(b, t, lengths[b] + t, int(prompt[b, t]))
            if self.refused(prompt, real, writes):
                with pytest.raises(ValueError, match="do not fit its rank of"):
                    next(steps) if new else list(steps)
                return
            for b, t in places:
                self.step(b, int(prompt[b, t]), bool(writes[b, t]))
        ended, chosen = [False] * rows, [0] * rows
        for _ in range(new):
            if all(ended):
                break
            expected = [row.logits for row in self.rows]
            chosen = [c if e else int(x.argmax()) for c, e, x in zip(chosen, ended, expected, strict=True)]
            real = ~torch.tensor(ended)[:, None]
            writes = torch.tensor([[means(b, None, self.rows[b].length, chosen[b])] for b in range(rows)]) & real
            if self.refused(torch.tensor(chosen)[:, None], real, writes):
                with pytest.raises(ValueError, match="do not fit its rank of"):
                    next(steps)
                return
            step = next(steps)
            for b in range(rows):
                close(step.logits[b], expected[b])
                if not ended[b]:
                    self.step(b, chosen[b], bool(writes[b, 0]))
            assert step.token_ids.tolist() == chosen
            ended = [e or c in stops for c, e in zip(chosen, ended, strict=True)]
            assert step.ended == ended
        assert not list(steps)

    def snapshot(self):
        self.snapshots.append((self.episode.snapshot(), self.copies()))

    def restore(self, which):
        fitting = [pair for pair in self.snapshots if len(pair[1]) == len(self.rows)]
        if fitting:
            snapshot, rows = fitting[which % len(fitting)]
            self.episode.restore(snapshot)
            self.rows = [row.fork() for row in rows]

    def fork(self, rows, stay):
        chosen = None if rows is None else [row % len(self.rows) for row in rows]
        if chosen is not None and self.cannot_wait_again():
            return
        child = self.episode.fork(chosen)
        copies = [self.rows[row].fork() for row in (range(len(self.rows)) if chosen is None else chosen)]
        self.go_on(child, copies, stay)

    def reload(self, stay):
        if self.cannot_wait_again():
            return
        with tempfile.TemporaryDirectory() as folder:
            self.episode.save(Path(folder) / "episode")
            child = fw.Episode.load(MODEL, Path(folder) / "episode")
        self.go_on(child, self.copies(), stay)

    def go_on(self, child, rows, stay):
        """In the new episode, or in the one it came from."""
        if not stay:
            child, rows, self.episode, self.rows = self.episode, self.rows, child, rows
        self.others = [*self.others[-2:], (child, rows)]

    def cannot_wait_again(self):
        """Whether save and fork(rows) may refuse: the weights that a waiting event was read with are gone."""
        waiting = [row for row in self.rows if row.pending is not None]
        forgets = [fast.overflow in ("compress", "evict") and not fast.archive for fast in self.fresh.fast.values()]
        return bool(waiting) and (any(forgets) or any(row.undone for row in waiting))

    def undo(self, events):
        counts = [fast.count for row in self.rows for fast in row.fast.values()]
        events = events % (min(counts) + 2)  # sometimes one too many
        behind = any(fast.count - events < fast.oldest_moment() for row in self.rows for fast in row.fast.values())
        if events > min(counts) or behind:
            with pytest.raises(ValueError, match=rf"undo\({events}\): layers"):
                self.episode.undo(events)
            return
        self.episode.undo(events)
        for row in self.rows:
            row.undone = row.undone or events > 0
            for fast in row.fast.values():
                fast.undo(events)

    def reset(self, now):
        if now:
            self.episode.reset()
            self.rows = [self.fresh.fork() for _ in self.rows]

    def probe(self, seed, at, lengths, small):
        latest, every = self.episode.events, range(self.episode.events + 1)
        questions = [draw_tokens(seed + n, 1, length, False)[0].tolist() for n, length in enumerate(lengths)]
        if len(questions) > 1 and len(self.rows) > 1:
            questions = (questions * 2)[: len(self.rows)]
            questions += questions[: len(self.rows) - len(questions)]
        wanted = [(int(n), None) for n in torch.randint(0, latest + 1, (3,), generator=random(seed))]
        given = {"now": "now", "every": "every", "list": [n for n, _ in wanted]}.get(at)
        if at == "without":
            wanted = [(latest, n) for n, _ in wanted if n]
            given = [fw.Moment(without=[n]) for _, n in wanted]
            if not wanted:
                return
        named = {"now": [], "every": [(n, None) for n in every]}.get(at, wanted)
        options = {"at": given, "sites": ["resid_post"]}
        if any(self.forgotten(*moment) for moment in named):
            with pytest.raises(ValueError, match=r"is not kept, expected a moment from|but the oldest that"):
                self.episode.probe(questions, **options)
            return
        if small:
            options["max_bytes"] = least_bytes(self.episode, questions, **options)
        trace = self.episode.probe(questions, **options)
        if at == "now":
            self.compare(questions, None, trace.logits, trace["resid_post"])
        elif at == "every":
            assert len(trace.logits) == latest + 1
            wanted = [(n, None) for n, _ in wanted]
        for n, without in wanted if at != "now" else ():
            index = n if at == "every" else wanted.index((n, without))
            self.compare(questions, (n, without), trace.logits[index], trace["resid_post"][index])

    def forgotten(self, n, without):
        for row in self.rows:
            for fast in row.fast.values():
                if min(n, fast.count) < fast.oldest_moment():
                    return True
                if without is not None and without <= fast.oldest_event():
                    return True
        return False

    def compare(self, questions, moment, logits, resid_post):
        rows = self.rows if len(self.rows) > 1 else self.rows * len(questions)
        for b, row in enumerate(rows):
            twin, question = row.fork(), questions[b % len(questions)]
            for fast in twin.fast.values() if moment else ():
                fast.dW, fast.db = fast.moment(min(moment[0], fast.count), moment[1])
            expected, hidden_TLD = twin.frozen_probe(question)
            close(logits[b, : len(question)], expected)
            close(resid_post[:, b, : len(question)], hidden_TLD[:, 1:].transpose(0, 1))


def check(episode, rows):
    """Everything that moves, against the oracles."""
    assert episode.lengths == [row.length for row in rows]
    assert episode.event_counts == {site: [row.fast[site].count for row in rows] for site in episode.logs}
    for b, row in enumerate(rows):
        for site, fast in row.fast.items():
            close(episode.delta_weight(*site, b), fast.dW)
            close(episode.logs[site].delta_bias(b), fast.db)
            if episode.logs[site].archive is not None:
                check_archive(episode.logs[site], b)
        for layer in range(LAYERS if row.length else 0):
            for buffers, kept in ((episode.cache.keys, row.cache_k), (episode.cache.values, row.cache_v)):
                close(buffers[layer][b, :, : row.length].transpose(0, 1), torch.stack(kept[layer]))


def check_archive(log, row):
    """ΔW against the log's own archived events: the sum of the last ones, or within the certificate."""
    U, K, bias, birth = (factor[row] for factor in log.moment_factors())
    age = log.event_counts[row] - 1 - birth
    live = (birth >= 0) & (age < (log.rank if log.overflow == "evict" else 10**9))
    w = torch.where(live, log.weights_at([log.event_counts[row]], row)[0].double(), 0.0)
    if not log.scaled[row]:
        torch.testing.assert_close(w, torch.where(live, (1 - log.decay) ** age.double(), 0.0), rtol=1e-14, atol=0)
    exact = (U * w[:, None]).T @ torch.cat([K, bias[:, None]], dim=1)
    lost = exact - torch.cat([log.delta_weight(row), log.delta_bias(row)[:, None]], dim=1)
    error_2, error_F = log.certificate(row)
    rounding = 1e-13 * float((U * w[:, None]).norm() * K.norm())
    assert float(torch.linalg.matrix_norm(lost, 2)) <= error_2 + rounding
    assert float(lost.norm()) <= error_F + rounding
    if log.overflow == "evict":
        assert (error_2, error_F) == (0, 0)


# ---- what is drawn

seeds = st.integers(0, 999)
UPDATES = ("all", "none", "prompt", "generated", "positions", "mask", "callable", "token_ids")
common = {
    "mu": st.sampled_from([0.1, 1e-6, 0.0]),
    "decay": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "clip": st.sampled_from([None, 0.3, 0.02]),
    "bias": st.booleans(),
}
gates = st.sampled_from(["ones", "positive", "derivative"])
rules = st.one_of(
    st.builds(fw.Hebbian, rate=st.sampled_from([0.2, 0.05, -0.1, 0.0]), gate=gates, **common),
    st.builds(fw.LocalLeastSquares, gamma=st.just(0.3), gate=gates, target=st.sampled_from(["self", "slow"]), **common),
    st.tuples(st.just(fw.Delta), st.fixed_dictionaries({"beta": st.sampled_from([0.5, 0.1]), **common}), seeds),
    st.builds(fw.GradientAscent, rate=st.sampled_from([0.1, 0.02]), **{**common, "mu": st.sampled_from([None, 0.1])}),
)


def attachments(policies):
    """For each linear: its layers, rule, rank and policy, or nothing; often the same for all."""
    one = st.fixed_dictionaries(
        {
            "layers": st.sampled_from([[1], [0, 2], [1, 2], [0]]),
            "rule": rules,
            "rank": st.integers(1, 6),
            "overflow": st.sampled_from(policies),
            "archive": st.booleans(),
            "budget": st.sampled_from([None, None, 0.1, 0.02]),
        }
    )
    names = st.lists(st.sampled_from(LINEARS), min_size=1, max_size=3, unique=True)
    same = st.builds(lambda names, options: dict.fromkeys(names, options), names, one)
    return same | st.dictionaries(st.sampled_from(LINEARS), one, min_size=1, max_size=3)


def programs(width):
    """A feed and 2 to 9 operations."""
    updates = st.sampled_from(UPDATES)
    feed = {
        "seed": seeds,
        "width": st.integers(1, width),
        "mask": st.sampled_from(["all", "left", "right", "inside", "random"]),
        "update": st.sampled_from(["all", "all", "all", *UPDATES]),
        "repeated": st.booleans(),
        "last": st.booleans(),
    }
    operations = {
        "feed": feed,
        "generate": {
            "seed": seeds,
            "new": st.integers(0, 4),
            "update": updates,
            "stop": st.booleans(),
            "width": st.integers(0, 2),
        },
        "snapshot": {},
        "restore": {"which": st.integers(0, 5)},
        "fork": {
            "rows": st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=3),
            "stay": st.booleans(),
        },
        "undo": {"events": st.integers(0, 12)},
        "probe": {
            "seed": seeds,
            "at": st.sampled_from(["now", "list", "every", "without"]),
            "lengths": st.lists(st.integers(1, 3), min_size=1, max_size=2),
            "small": st.booleans(),
        },
        "reload": {"stay": st.booleans()},
        "reset": {"now": st.sampled_from([False, False, True])},
    }
    steps = {name: st.tuples(st.just(name), st.fixed_dictionaries(arguments)) for name, arguments in operations.items()}
    often = [steps[name] for name in ("feed", "feed", "feed", "generate", "undo", "probe")]
    rest = st.lists(st.one_of(*often, *steps.values()), min_size=2, max_size=9)
    return st.builds(lambda first, rest: [first, *rest], steps["feed"], rest)


def run(plan, rows, program):
    handles = []
    try:
        for name, options in plan.items():
            rule = options["rule"]
            if isinstance(rule, tuple):
                made, arguments, seed = rule
                rule = made(target=torch.randn(WIDTH[name], generator=random(seed), dtype=torch.float64), **arguments)
            handles.append(fw.attach(MODEL, linears=name, **{**options, "rule": rule}))
        Machine(handles, rows).run(program)
    finally:
        fw.detach(MODEL)


@settings(program_settings, max_examples=300)
@given(attachments(["grow", "grow", "error"]), st.integers(1, 3), programs(width=6))
def test_any_program_on_a_full_log_equals_the_oracle_and_refuses_exactly_what_does_not_fit(plan, rows, program):
    run(plan, rows, program)


@settings(program_settings, max_examples=200)
@given(attachments(["evict", "compress"]), st.integers(1, 2), programs(width=12))
def test_any_program_on_a_bounded_log_equals_the_oracle_with_its_window_or_folds(plan, rows, program):
    run(plan, rows, program)


def waiting_twins(plan, tokens, undo, folder, way):
    """An episode with a gradient event that waits, and a copy of it made in the way named."""
    model = tiny()
    for layer, rule, overflow in plan:
        fw.attach(model, layer, rule, rank=4, overflow=overflow)
    episode = fw.Episode(model)
    episode.feed(prompt(1, tokens))
    episode.undo(undo)
    if way == "load":
        episode.save(folder / "episode")
        return episode, fw.Episode.load(model, folder / "episode")
    return episode, episode.fork([0])


GRADIENT = fw.GradientAscent(rate=0.1)


@pytest.mark.parametrize("way", ["load", "fork"])
def test_an_event_that_waits_through_an_undo_is_refused_by_save_and_fork_into_rows(way, tmp_path):
    with pytest.raises(ValueError, match=r"a gradient event of row 0 waits for its next token, .* feed the next token"):
        waiting_twins([([1, 2], GRADIENT, "grow")], 7, 3, tmp_path, way)


@pytest.mark.parametrize("way", ["load", "fork"])
@pytest.mark.parametrize("overflow", ["evict", "compress"])
def test_an_event_that_waits_beside_a_log_that_forgot_is_refused_by_save_and_fork_into_rows(overflow, way, tmp_path):
    plan = [([1], fw.Hebbian(rate=0.1), overflow), ([2], GRADIENT, "grow")]
    with pytest.raises(ValueError, match="a gradient event of row 0 waits for its next token"):
        waiting_twins(plan, 12, 0, tmp_path, way)  # 12: the event that folds, or one past the window


@pytest.mark.parametrize("logits", ["all", "last"])
def test_what_a_caller_does_to_returned_logits_changes_neither_episode_nor_snapshot(logits):
    model = tiny()
    fw.attach(model, 1, fw.Hebbian(rate=0.1), overflow="grow")
    episode = fw.Episode(model)
    returned = episode.feed(prompt(1, 5), logits=logits)
    snapshot, best = episode.snapshot(), int(returned[0, -1].argmax())
    returned.neg_()
    assert int(next(episode.generate(None, 1)).token_ids) == best
    episode.restore(snapshot)
    assert int(next(episode.generate(None, 1)).token_ids) == best
