"""Rows that share one ΔW, against a naive dense float64 loop: a column reads, and then writes in row order."""

import functools
from dataclasses import replace

import pytest
import torch
from oracle import FastLinear
from tiny import described, oracle_of, prompt, tiny

import fastweights as fw

RULES = {
    "hebbian": fw.Hebbian(rate=0.2, mu=0.1),
    "hebbian-decay-bias": fw.Hebbian(rate=0.3, mu=0.1, gate="derivative", decay=0.1, bias=True),
    "positive-clip": fw.Hebbian(rate=0.5, mu=0.0, gate="positive", clip=0.02),
    "self": fw.LocalLeastSquares(gamma=0.3, mu=0.1, decay=0.05),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow", decay=0.02, clip=0.5),
    "delta": fw.Delta(beta=0.3, target=torch.linspace(-1, 1, 52, dtype=torch.float64), mu=0.1, decay=0.05),
    "gradient": fw.GradientAscent(rate=0.3, decay=0.05),
    "gradient-mu-clip-bias": fw.GradientAscent(rate=3.0, mu=0.1, decay=0.1, clip=0.05, bias=True),
}
LOCAL = [name for name in RULES if not name.startswith("gradient")]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
BITS = {"rtol": 0, "atol": 0}
LINEARS = ["gate_proj", "up_proj"]


class Together:
    """Oracles, one per row, that hold the same dense ΔW; a written token waits until its column has been read."""

    def __init__(self, model, handles, rows, window=None):
        self.rows = [oracle_of(model, handles) for _ in range(rows)]
        self.fast = self.rows[0].fast
        for row in self.rows:
            row.fast = self.fast
        self.window, self.queue, self.read = window, [], 0
        for fast in self.fast.values():
            fast.write = functools.partial(lambda fast, h, u: self.queue.append((fast, h, u)), fast)

    def flush(self):
        for fast, h, u in self.queue:
            FastLinear.write(fast, h, u)
            if self.window:  # ΔW of the last events alone
                keep = 1 - fast.plastic.decay
                last = list(zip(fast.values, fast.keys, strict=True))[-self.window :]
                fast.dW = sum(keep**age * torch.outer(u, k) for age, (u, k) in enumerate(reversed(last)))
        self.queue.clear()

    def feed(self, ids, write=None, mask=None, rule_of_row=None):
        """[B][T] logits or None where padded; `rule_of_row(row, position)` gives that token's rule."""
        columns = []
        for t in range(ids.shape[1]):
            here = [b for b in range(len(self.rows)) if mask is None or mask[b, t]]
            for b in here:
                self.become(rule_of_row, b, self.rows[b].length - 1)
                self.rows[b].write_pending(int(ids[b, t]))
            self.flush()
            column = [None] * len(self.rows)
            for b in here:
                self.become(rule_of_row, b, self.rows[b].length)
                column[b] = self.rows[b].step(int(ids[b, t]), write is None or bool(write[b, t]))
            self.flush()
            columns.append(column)
        return list(zip(*columns, strict=True))

    def become(self, rule_of_row, b, position):
        for fast in self.fast.values() if rule_of_row else ():
            fast.plastic = rule_of_row(b, position)


def plastic(rule, dtype=torch.float64, **options):
    model = tiny(dtype)
    return model, fw.attach(model, [1, 2], rule, LINEARS, **{"rank": 4, "overflow": "grow", **options})


def agrees(episode, together, logits=None, wanted=None, mask=None, **tolerance):
    tolerance = tolerance or CLOSE
    for b, row in enumerate(wanted or ()):
        for t, theirs in enumerate(row):
            if theirs is not None:
                torch.testing.assert_close(logits[b, t].double(), theirs, **tolerance)
    for site, fast in together.fast.items():
        torch.testing.assert_close(episode.delta_weight(*site).double(), fast.dW, **tolerance)
        if fast.plastic.bias:
            torch.testing.assert_close(episode.logs[site].delta_bias(0).double(), fast.db, **tolerance)
        assert episode.event_counts[site] == [len(fast.values)]
    assert episode.lengths == [row.length for row in together.rows]


def ragged(rows, tokens, side="right", seed=4):
    """A padding mask and a write mask with gaps."""
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    for b in range(1, rows):
        cut = (b * 5) % tokens
        mask[b, {"right": slice(cut, None), "left": slice(0, cut), "inside": slice(1, cut)}[side]] = False
    return mask, torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < 0.7


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("rows", "side"), [(1, "right"), (3, "right"), (3, "left"), (5, "inside")])
def test_every_rule_equals_the_dense_loop_ragged_and_with_gaps(name, rows, side):
    model, fast = plastic(RULES[name])
    together, episode = Together(model, fast, rows), fw.Episode(model, rows, shared=True)
    (mask, write), ids = ragged(rows, 13, side), prompt(rows, 13)
    logits = episode.feed(ids, update=write, attention_mask=mask)
    agrees(episode, together, logits, together.feed(ids, write, mask), mask)
    more = prompt(rows, 4, seed=8)  # state is there before the prompt
    mask = torch.ones(rows, 4, dtype=torch.bool)
    mask[0, 0] = rows == 1
    agrees(episode, together, episode.feed(more, attention_mask=mask), together.feed(more, None, mask))
    for step in episode.generate(None, 3, update="all", stop_token_ids=()):
        together.feed(step.token_ids[:, None])
    agrees(episode, together)


@pytest.mark.parametrize("name", ["hebbian-decay-bias", "slow"])
@pytest.mark.parametrize(("rows", "tokens"), [(3, 67), (7, 37), (40, 5), (150, 2)])
def test_columns_that_do_not_divide_the_chunks(name, rows, tokens):
    model, fast = plastic(RULES[name])
    together, episode = Together(model, fast, rows), fw.Episode(model, rows, shared=True)
    ids = prompt(rows, tokens)
    write = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(2)) < 0.8
    with torch.no_grad():
        agrees(episode, together, episode.feed(ids, update=write), together.feed(ids, write))


def test_float32_stays_near_the_dense_loop():
    model, fast = plastic(RULES["hebbian-decay-bias"], torch.float32)
    together, episode = Together(model, fast, 3), fw.Episode(model, 3, shared=True)
    ids = prompt(3, 30)
    logits = torch.cat([episode.feed(part) for part in ids.split([27, 1, 1, 1], dim=1)], dim=1)
    agrees(episode, together, logits, together.feed(ids), rtol=1e-3, atol=1e-4)
    steps = [episode.feed(ids[:, t : t + 1], update="none") for t in range(3)]
    wanted = together.feed(ids[:, :3], torch.zeros(3, 3))
    agrees(episode, together, torch.cat(steps, 1), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("splits", [[1] * 20, [7, 13], [19, 1]])
def test_a_prompt_split_between_columns_gives_the_same(name, splits):
    model, _ = plastic(RULES[name])
    whole, parts = fw.Episode(model, 3, shared=True), fw.Episode(model, 3, shared=True)
    (mask, write), ids = ragged(3, 20, "left"), prompt(3, 20)
    logits = whole.feed(ids, update=write, attention_mask=mask)
    pieces = zip(*(x.split(splits, dim=1) for x in (ids, write, mask)), strict=True)
    split = []
    for i, w, m in pieces:
        if not m[0].any():
            continue
        split.append(parts.feed(i, update=w, attention_mask=m))
    torch.testing.assert_close(torch.cat(split, 1)[mask], logits[mask], **CLOSE)
    for site in whole.logs:
        torch.testing.assert_close(parts.delta_weight(*site), whole.delta_weight(*site), **CLOSE)
    assert parts.event_counts == whole.event_counts


def test_a_prompt_is_one_pass_over_the_model():
    model, _ = plastic(RULES["hebbian"])
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    fw.Episode(model, 4, shared=True).feed(prompt(4, 50))
    assert len(calls) == 1


def test_a_row_sees_what_another_wrote_and_not_in_the_same_column():
    model, _ = plastic(RULES["hebbian"])
    ids = prompt(2, 2)
    episode, frozen = fw.Episode(model, 2, shared=True), fw.Episode(model, 2)
    only_row_0 = torch.tensor([[True, True], [False, False]])
    logits, without = episode.feed(ids, update=only_row_0), frozen.feed(ids, update="none")
    torch.testing.assert_close(logits[:, 0], without[:, 0], **CLOSE)
    assert float((logits[1, 1] - without[1, 1]).norm()) > 1e-3


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_shared_by_one_row_is_an_episode_of_one_to_the_bit(name, dtype):
    model, _ = plastic(RULES[name], dtype, overflow="compress")
    out = []
    for shared in (False, True):
        episode = fw.Episode(model, shared=shared)
        out.append((episode.feed(prompt(1, 30)), *(episode.delta_weight(*site) for site in episode.logs)))
    assert all(torch.equal(a, b) for a, b in zip(*out, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [fw.Hebbian(rate=0.0), fw.Hebbian(rate=[0.0] * 3), fw.GradientAscent(rate=0.0)])
def test_rate_zero_is_bit_identical_to_the_frozen_model(rule, dtype):
    model, _ = plastic(rule, dtype)
    ids = prompt(3, 17)
    logits = fw.Episode(model, 3, shared=True).feed(ids)
    fw.detach(model)
    assert torch.equal(logits, fw.Episode(model, 3).feed(ids))


@pytest.mark.parametrize("make", [fw.Hebbian, fw.GradientAscent])
def test_a_rate_per_row_weighs_what_that_row_writes(make):
    rates, ids = [0.4, 0.0, -0.2], prompt(3, 9)
    model, fast = plastic(make(rates, mu=0.1, decay=0.1))
    one = described(make(0.4, mu=0.1, decay=0.1))
    together, episode = Together(model, fast, 3), fw.Episode(model, 3, shared=True)
    wanted = together.feed(ids, rule_of_row=lambda b, position: replace(one, rate=rates[b]))
    agrees(episode, together, episode.feed(ids), wanted)


def test_a_target_per_row_and_position():
    target_BPO = torch.randn(3, 20, 52, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    model, fast = plastic(fw.Delta(beta=0.3, target=target_BPO, mu=0.1))
    one = described(fw.Delta(beta=0.3, target=target_BPO[0, 0], mu=0.1))
    together, episode = Together(model, fast, 3), fw.Episode(model, 3, shared=True)
    (mask, write), ids = ragged(3, 13, "left"), prompt(3, 13)
    wanted = together.feed(ids, write, mask, lambda b, position: replace(one, target=target_BPO[b, position]))
    agrees(episode, together, episode.feed(ids, update=write, attention_mask=mask), wanted)


def test_both_kinds_of_rules_in_one_model():
    model = tiny()
    handles = [
        fw.attach(model, [0], fw.Hebbian(rate=0.2, decay=0.1), ["up_proj"], overflow="grow"),
        fw.attach(model, [0, 2], fw.GradientAscent(rate=0.3, decay=0.1), ["down_proj"], overflow="grow"),
        fw.attach(model, [3], fw.LocalLeastSquares(gamma=0.4, target="slow"), overflow="grow"),
    ]
    together, episode = Together(model, handles, 3), fw.Episode(model, 3, shared=True)
    for seed, side in enumerate(("right", "left", "inside")):
        (mask, write), ids = ragged(3, 7, side, seed), prompt(3, 7, seed)
        logits = episode.feed(ids, update=write, attention_mask=mask)
        agrees(episode, together, logits, together.feed(ids, write, mask))


def test_a_gradient_event_waits_for_its_own_row_and_is_written_before_that_column():
    model, fast = plastic(RULES["gradient"])
    together, episode = Together(model, fast, 3), fw.Episode(model, 3, shared=True)
    feeds = [
        (prompt(3, 4), [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], None),
        (prompt(3, 3, seed=2), [[0, 1, 1], [0, 0, 0], [1, 0, 1]], torch.zeros(3, 3, dtype=torch.bool)),  # late rows
        (prompt(3, 2, seed=3), [[1, 1], [1, 1], [0, 1]], None),
    ]
    for ids, mask, write in feeds:
        mask = torch.tensor(mask)
        logits = episode.feed(ids, update="all" if write is None else "none", attention_mask=mask)
        agrees(episode, together, logits, together.feed(ids, write, mask))


# ---- overflow


@pytest.mark.parametrize("name", ["hebbian", "slow", "delta", "gradient"])
@pytest.mark.parametrize("overflow", ["compress", "evict", "error"])
def test_every_policy_is_exact_below_its_capacity(name, overflow):
    model, fast = plastic(RULES[name], overflow=overflow, rank=40)
    together, episode = Together(model, fast, 3), fw.Episode(model, 3, shared=True)
    mask, ids = ragged(3, 15)[0], prompt(3, 15)
    agrees(episode, together, episode.feed(ids, "all", mask), together.feed(ids, None, mask))
    assert 27 <= episode.events <= 30


@pytest.mark.parametrize("name", ["hebbian", "slow", "self", "gradient"])
@pytest.mark.parametrize(("rows", "rank"), [(3, 7), (3, 1), (5, 4), (4, 12)])
def test_evict_reads_exactly_the_last_events(name, rows, rank):
    model, fast = plastic(RULES[name], overflow="evict", rank=rank)
    together, episode = Together(model, fast, rows, window=rank), fw.Episode(model, rows, shared=True)
    for seed, tokens in enumerate((1, 11, 6)):
        (mask, write), ids = ragged(rows, tokens, "left", seed), prompt(rows, tokens, seed)
        logits = episode.feed(ids, write, mask)
        agrees(episode, together, logits, together.feed(ids, write, mask))


@pytest.mark.parametrize("name", ["hebbian", "hebbian-decay-bias", "slow", "gradient"])
@pytest.mark.parametrize(("rows", "rank"), [(3, 4), (5, 2), (20, 3)])
def test_compress_bounds_its_error_and_folds_alike_in_one_pass_and_in_steps(name, rows, rank):
    model, _ = plastic(RULES[name], overflow="compress", rank=rank, archive=True)
    whole, steps = fw.Episode(model, rows, shared=True), fw.Episode(model, rows, shared=True)
    (mask, write), ids = ragged(rows, 17), prompt(rows, 17)
    write |= torch.arange(17) % 3 == 0
    logits = whole.feed(ids, write, mask)
    columns = [steps.feed(ids[:, t : t + 1], write[:, t : t + 1], mask[:, t : t + 1]) for t in range(17)]
    torch.testing.assert_close(torch.cat(columns, 1)[mask], logits[mask], rtol=1e-7, atol=1e-8)
    for site, log in whole.logs.items():
        torch.testing.assert_close(steps.delta_weight(*site), whole.delta_weight(*site), rtol=1e-7, atol=1e-8)
        lost = log.archive.delta_weight(0) - log.delta_weight(0)
        error_2, error_F = log.certificate(0)
        assert 0 < float(torch.linalg.matrix_norm(lost, 2)) <= error_2 * (1 + 1e-9)
        assert float(lost.norm()) <= error_F * (1 + 1e-9)
        assert log.slots.last_fold(log.event_counts[0]) > 0


def test_error_refuses_what_does_not_fit_the_one_state_and_changes_nothing():
    model, _ = plastic(RULES["hebbian"], overflow="error", rank=7)
    episode = fw.Episode(model, 3, shared=True)
    episode.feed(prompt(3, 2))
    before = episode.snapshot()
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.gate_proj: 9 events do not fit its rank of 7 \(6 are written\)"
    ):
        episode.feed(prompt(3, 1))
    assert episode.event_counts == {site: [6] for site in episode.logs}
    assert all(torch.equal(episode.delta_weight(*s), log.delta_weight(0)) for s, log in before.logs.items())
    episode.feed([[5], [6], [7]], update=torch.tensor([[False], [True], [False]]))
    assert episode.events == 7


@pytest.mark.parametrize("overflow", ["compress", "evict", "grow"])
@pytest.mark.parametrize("name", ["hebbian", "gradient"])
def test_a_feed_that_fails_leaves_everything_as_it_was(name, overflow):
    model, _ = plastic(RULES[name], overflow=overflow)
    episode, twin = fw.Episode(model, 3, shared=True), fw.Episode(model, 3, shared=True)
    for one in (episode, twin):
        one.feed(prompt(3, 5))
    kept = model.model.embed_tokens.weight[7].clone()
    model.model.embed_tokens.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="non-finite factor"):
        episode.feed([[5] * 9, [5] * 6 + [7] * 3, [6] * 9])
    model.model.embed_tokens.weight.data[7] = kept
    torch.testing.assert_close(episode.feed(prompt(3, 6, seed=3)), twin.feed(prompt(3, 6, seed=3)), **BITS)
    assert episode.event_counts == twin.event_counts


# ---- moments, copies, files


@pytest.mark.parametrize("name", LOCAL)
def test_a_probe_asks_the_one_state_at_every_event(name):
    model, fast = plastic(RULES[name])
    together, episode = Together(model, fast, 3), fw.Episode(model, 3, shared=True)
    question, ids = prompt(1, 5, seed=9), prompt(3, 4)
    moments = [together.rows[0].frozen_probe(question[0].tolist())[0]]
    for t in range(4):
        episode.feed(ids[:, t : t + 1])
        together.feed(ids[:, t : t + 1])
        moments.append(together.rows[0].frozen_probe(question[0].tolist())[0])
    every = episode.probe(question, at="every").logits
    assert every.shape == (13, 3, 5, 61)
    for column, theirs in enumerate(moments):  # an event of each row per column
        for row in range(3):
            torch.testing.assert_close(every[3 * column, row], theirs, **CLOSE)
    torch.testing.assert_close(episode.probe(question).logits, every[-1], **CLOSE)
    many = prompt(7, 5, seed=9)
    assert episode.probe(many).logits.shape == (7, 5, 61)
    torch.testing.assert_close(episode.probe(many, at=[12]).logits[0], episode.probe(many).logits, **CLOSE)
    torch.testing.assert_close(episode.probe(many).logits[0], episode.probe(many[:1]).logits[2], **CLOSE)


@pytest.mark.parametrize("name", ["hebbian-decay-bias", "slow", "gradient"])
@pytest.mark.parametrize("overflow", ["grow", "compress", "evict"])
def test_snapshot_restore_fork_and_file_go_on_with_the_same_bits(name, overflow, tmp_path):
    model, _ = plastic(RULES[name], overflow=overflow)
    episode = fw.Episode(model, 3, shared=True)
    episode.feed(prompt(3, 6))
    snapshot, fork = episode.snapshot(), episode.fork()
    episode.save(tmp_path / "e")
    loaded = fw.Episode.load(model, tmp_path / "e")
    assert loaded.shared
    assert loaded.event_counts == fork.event_counts == episode.event_counts
    assert loaded.lengths == fork.lengths == episode.lengths
    assert "batch_size=3, shared=True, length=6" in repr(episode)

    def go_on(episode):
        logits = [step.logits for step in episode.generate(None, 5, update="all", stop_token_ids=())]
        return torch.stack(logits), [episode.delta_weight(*site) for site in episode.logs]

    first = go_on(episode)
    episode.restore(snapshot)
    for other, tolerance in ((episode, BITS), (fork, BITS), (loaded, CLOSE)):
        logits, deltas = go_on(other)
        torch.testing.assert_close(logits, first[0], **tolerance)
        torch.testing.assert_close(deltas, first[1], **tolerance)


@pytest.mark.parametrize("name", ["hebbian", "gradient"])
def test_a_fork_of_rows_keeps_the_one_state(name):
    model, fast = plastic(RULES[name])
    together, episode = Together(model, fast, 3), fw.Episode(model, 3, shared=True)
    ids = prompt(3, 5)
    episode.feed(ids)
    together.feed(ids)
    fork = episode.fork(rows=[2, 0, 2, 2])
    rows = [together.rows[b].fork() for b in (2, 0, 2, 2)]
    for row in rows:
        row.fast = together.fast
    together.rows = rows
    more = prompt(4, 3, seed=6)
    agrees(fork, together, fork.feed(more), together.feed(more))
    assert (episode.batch_size, episode.lengths) == (3, [5, 5, 5])


def test_rules_of_both_kinds_wait_again_in_files_and_forks(tmp_path):
    model = tiny()
    fw.attach(model, [1], fw.Hebbian(rate=0.2, decay=0.1), overflow="grow")
    fw.attach(model, [2], fw.GradientAscent(rate=0.3), overflow="grow")
    episode, more = fw.Episode(model, 3, shared=True), prompt(3, 2, seed=6)
    episode.feed(prompt(3, 5))
    episode.save(tmp_path / "e")
    others = [fw.Episode.load(model, tmp_path / "e"), episode.fork(rows=[0, 1, 2])]
    logits = episode.feed(more)
    for other in others:
        torch.testing.assert_close(other.feed(more), logits, **CLOSE)
        for site in episode.logs:
            torch.testing.assert_close(other.delta_weight(*site), episode.delta_weight(*site), **CLOSE)


def test_a_gradient_event_that_cannot_be_differentiated_again_is_refused_not_guessed(tmp_path):
    model, _ = plastic(RULES["gradient"])
    episode = fw.Episode(model, 2, shared=True)
    episode.feed([[3, 4, 5], [6, 7]])  # row 1 waits since column 1, and row 0 has written since
    with pytest.raises(ValueError, match=r"no longer holds the weights .* another row's event since"):
        episode.save(tmp_path / "e")
    episode = fw.Episode(model, 2, shared=True)
    episode.feed([[3, 4, 5], [6, 7, 8]])
    episode.undo(1)
    episode.feed([[9], [0]], update="none", attention_mask=[[1], [0]])  # the count is as it was, the weights are not
    with pytest.raises(ValueError, match="feed the next token first"):
        episode.fork(rows=[1])


@pytest.mark.parametrize("name", LOCAL)
def test_undo_is_never_having_written(name):
    model, _ = plastic(RULES[name])
    episode, twin = fw.Episode(model, 3, shared=True), fw.Episode(model, 3, shared=True)
    ids = prompt(3, 5)
    episode.feed(ids)
    episode.undo(4)  # the last column, and row 2 of the one before
    twin.feed(ids[:, :4], update=torch.tensor([[True] * 4, [True] * 4, [True] * 3 + [False]]))
    for site in episode.logs:
        torch.testing.assert_close(episode.delta_weight(*site), twin.delta_weight(*site), **CLOSE)
    assert episode.events == 11
    with pytest.raises(ValueError, match=r"undo\(12\): layers.1.mlp.gate_proj has 11 events in row 0"):
        episode.undo(12)


def test_a_state_of_the_other_kind_is_refused():
    model, _ = plastic(RULES["hebbian"])
    shared, apart = fw.Episode(model, 2, shared=True), fw.Episode(model, 2)
    with pytest.raises(ValueError, match="snapshot with shared=False, but this episode has shared=True"):
        shared.restore(apart.snapshot())
    with pytest.raises(ValueError, match="snapshot with shared=True, but this episode has shared=False"):
        apart.restore(shared.snapshot())


def test_rows_that_ended_write_no_more():
    model, fast = plastic(RULES["hebbian"])
    episode, together = fw.Episode(model, 3, shared=True), Together(model, fast, 3)
    ids = prompt(3, 4)
    episode.feed(ids)
    together.feed(ids)
    first = int(episode.logits[1].argmax())
    ended = torch.zeros(3, dtype=torch.bool)
    for step in episode.generate(None, 4, update="generated", stop_token_ids=[first]):
        together.feed(step.token_ids[:, None], mask=~ended[:, None])
        ended = torch.tensor(step.ended)
    assert ended[1]
    agrees(episode, together)


def test_a_budget_is_refused_for_rows_that_share():
    model = tiny()
    fw.attach(model, [1], fw.Hebbian(rate=0.1), budget=0.1)
    with pytest.raises(ValueError, match=r"layers.1.mlp.gate_proj has a budget, .* expected shared=False"):
        fw.Episode(model, 2, shared=True)
    fw.Episode(model, 1, shared=True)
