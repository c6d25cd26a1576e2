"""The bounded event log against a dense ΔW in float64 that every event changes by an outer product."""

import json
import math
from dataclasses import replace

import other_device  # noqa: F401  it makes the device "other"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastweights.kernels import fold as in_c
from fastweights.kernels.cpu import library
from fastweights.state import EventLog
from fastweights.state.budget import Budget
from fastweights.state.compress import Folded, fold, fold_
from fastweights.state.events import Events
from fastweights.state.moments import Moment

F64, EPS = torch.float64, torch.finfo(torch.float64).eps
CPU = torch.device("cpu")
MANY = settings(derandomize=True, deadline=None, max_examples=60)
FEW = settings(MANY, max_examples=25)
KINDS = ("random", "low-rank", "repeated-key", "orthogonal", "geometric", "one-huge", "cancelling", "zero")


def log_of(overflow, rows=1, O=11, I=7, rank=4, decay=0.0, dtype=F64, archive=False, device=CPU) -> EventLog:
    return EventLog("layers.0.mlp.up_proj", rows, O, I, rank, overflow, decay, dtype, torch.device(device), archive)


def stream(kind, rows, tokens, O, I, seed=0, dtype=F64, bias=True, density=1.0) -> Events:
    """Events of one kind, and which of them are written."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=g, dtype=F64)

    U, K, s = noise(rows, tokens, O), noise(rows, tokens, I), noise(rows, tokens).abs()
    t = torch.arange(tokens)
    match kind:
        case "low-rank":  # of the block [K | s] as well
            few, some = noise(2, O), noise(2, I + 1)
            U, Ks = noise(rows, tokens, 2) @ few, noise(rows, tokens, 2) @ some
            K, s = Ks[..., :-1], Ks[..., -1]
        case "repeated-key":
            K, s = K[:, :1].expand_as(K), s[:, :1].expand_as(s)
        case "orthogonal":  # equal norms: whatever is dropped is as large as what is kept
            U, K, s = torch.eye(O, dtype=F64)[t % O].repeat(rows, 1, 1), torch.eye(I, dtype=F64)[t % I], s * 0
            K = K.repeat(rows, 1, 1)
        case "geometric":
            U = U * 0.3 ** t[:, None].double()
        case "one-huge":
            U = U * torch.where(t == 3, 1e8, 1e-8)[:, None]
        case "cancelling":  # every second event takes the one before it back, almost
            even, odd = slice(0, tokens - 1, 2), slice(1, tokens, 2)
            U[:, odd], K[:, odd], s[:, odd] = -U[:, even] * (1 - 1e-6), K[:, even].clone(), s[:, even].clone()
        case "zero":
            U = U * 0
    write = torch.rand(rows, tokens, generator=g) < density
    return Events(U.to(dtype), K.to(dtype), s.to(dtype) if bias else None, write)


def written(events: Events, row: int) -> list[tuple[Tensor, Tensor]]:
    """(u, [k | s]) of one row's written events, float64."""
    s = events.bias_BT if events.bias_BT is not None else torch.zeros_like(events.U_BTO[..., 0])
    block = torch.cat([events.K_BTI, s[..., None]], -1).double()
    return [(events.U_BTO[row, t].double(), block[row, t]) for t in events.write_BT[row].nonzero()[:, 0].tolist()]


def dense(pairs, decay, O, I) -> Tensor:
    """[ΔW | Δb] of these events, one after the other."""
    M = torch.zeros(O, I + 1, dtype=F64)
    for u, k in pairs:
        M = (1 - decay) * M + torch.outer(u, k)
    return M


def held(log: EventLog, row: int) -> Tensor:
    """[ΔW | Δb] as the log's factors have it, in float64."""
    return torch.cat([log.delta_weight(row, F64), log.delta_bias(row, F64)[:, None]], 1)


def scale(pairs) -> float:
    return sum(float(u.norm() * k.norm()) for u, k in pairs) + 1e-300


def same(a: EventLog, b: EventLog, rows=None) -> None:
    """Bit for bit all that can be seen of two logs; b may be some rows of a alone."""
    whole = rows is None
    rows = range(len(a.event_counts)) if rows is None else rows
    for i, j in enumerate(rows):
        row_a, row_b = (j, j) if len(a.event_counts) == len(b.event_counts) else (j, i)
        assert a.event_counts[row_a] == b.event_counts[row_b]
        assert a.certificate(row_a) == b.certificate(row_b)
        live_a, live_b = a.birth_BR[row_a] >= 0, b.birth_BR[row_b] >= 0
        for name in ("birth_BR", "U_BRO", "K_BRI", "bias_BR"):
            assert torch.equal(getattr(a, name)[row_a, live_a], getattr(b, name)[row_b, live_b]), name
    if whole and getattr(a, "archive", None) is not None:
        same(a.archive, b.archive)


def cuts(tokens: int, seed: int) -> list[tuple[int, int]]:
    """A random split of tokens into feeds."""
    g = torch.Generator().manual_seed(seed)
    inner = [t for t in range(1, tokens) if torch.rand((), generator=g) < 0.3]
    return list(zip([0, *inner], [*inner, tokens], strict=True))


# ---- evict


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rank", [1, 4, 30])
def test_evict_is_the_sum_over_the_last_rank_events(decay, dtype, rank):
    events = stream("random", 3, 25, 11, 7, dtype=dtype, density=0.8)
    log = log_of("evict", 3, rank=rank, decay=decay, dtype=dtype)
    buffers = [t.data_ptr() for t in (log.U_BRO, log.K_BRI, log.birth_BR)]
    for start, end in cuts(25, rank):
        log.write(events.part(start, end))
        for row in range(3):
            pairs = written(events.part(0, end), row)[-rank:]
            torch.testing.assert_close(held(log, row), dense(pairs, decay, 11, 7), rtol=1e-13, atol=1e-13)
            assert log.certificate(row) == (0, 0)
    assert log.used == min(rank + 1, max(log.event_counts))  # one slot more than is read
    assert [t.data_ptr() for t in (log.U_BRO, log.K_BRI, log.birth_BR)] == buffers


def test_evict_weights_move_inside_a_pass():
    log = log_of("evict", rank=4, decay=0.25)
    log.write(stream("random", 1, 6, 11, 7))  # events 2 to 5 are live
    w = log.slot_weights(torch.tensor([[6, 7, 9, 10, 11]]))[0]
    expected = [[0.75 ** (n - 1 - b) if n - b <= 4 else 0.0 for b in (5, 1, 2, 3, 4)] for n in (6, 7, 9, 10, 11)]
    torch.testing.assert_close(w, torch.tensor(expected, dtype=F64))
    assert log.birth_BR.tolist() == [[5, 1, 2, 3, 4]]


# ---- compress


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_compress_is_exact_until_its_slots_are_full(decay):
    events = stream("random", 2, 30, 11, 7, dtype=torch.float32, density=0.7)
    log, exact = (log_of(o, 2, decay=decay, dtype=torch.float32) for o in ("compress", "grow"))
    assert log.capacity == 4 + 8
    for t in range(30):
        log.write(events.part(t, t + 1))
        exact.write(events.part(t, t + 1))
        for row in range(2):
            if log.event_counts[row] < log.capacity:
                assert torch.equal(log.delta_weight(row), exact.delta_weight(row))
                assert log.certificate(row) == (0, 0)
            else:
                assert log.certificate(row)[0] > 0
    assert max(log.event_counts) > log.capacity


@MANY
@given(
    kind=st.sampled_from(KINDS),
    size=st.sampled_from([(11, 7), (5, 3), (3, 19), (16, 16)]),
    rank=st.integers(1, 9),
    decay=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, F64]),
    bias=st.booleans(),
    density=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 1000),
)
def test_the_certificate_bounds_the_true_error(kind, size, rank, decay, dtype, bias, density, seed):
    (O, I), rows, tokens = size, 2, 50
    events = stream(kind, rows, tokens, O, I, seed, dtype, bias, density)
    log = log_of("compress", rows, O, I, rank, decay, dtype)
    for start, end in cuts(tokens, seed):
        log.write(events.part(start, end))
        for row in range(rows):
            pairs = written(events.part(0, end), row)
            error, (error_2, error_F) = held(log, row) - dense(pairs, decay, O, I), log.certificate(row)
            slack = 4 * EPS * scale(pairs)  # of the float64 sums on both sides
            for part in (error, error[:, :-1], error[:, -1:]):
                assert torch.linalg.matrix_norm(part, 2) <= error_2 + slack
                assert part.norm() <= error_F + slack
            assert error_2 <= error_F
            if not bias:
                assert not log.bias_BR.any()
    assert all(log.slots.last_fold(n) for n in log.event_counts)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kind", ["random", "orthogonal", "geometric"])
def test_one_fold_is_the_best_possible(kind, dtype):
    events = stream(kind, 1, 12, 11, 7, dtype=dtype)
    log = log_of("compress", decay=0.05, dtype=dtype)
    log.write(events)
    M = dense(written(events, 0), 0.05, 11, 7)
    sigma = torch.linalg.svdvals(M)
    rounding = 8 * max(torch.finfo(dtype).eps, 100 * EPS) * float(sigma.sum())
    error_2, error_F = log.certificate(0)
    assert 0 <= error_2 - float(sigma[4]) <= rounding
    assert 0 <= error_F - float(sigma[4:].norm()) <= rounding
    torch.testing.assert_close(torch.linalg.svdvals(held(log, 0))[:4], sigma[:4], rtol=0, atol=rounding)


def test_the_certificate_fades_with_decay_exactly():
    events = stream("random", 1, 19, 11, 7)
    log = log_of("compress", decay=0.125)
    log.write(events.part(0, 12))
    error = held(log, 0) - dense(written(events.part(0, 12), 0), 0.125, 11, 7)
    at_fold = log.certificate(0)
    for t in range(12, 19):
        log.write(events.part(t, t + 1))
        fade = 0.875 ** (t - 11)
        assert log.certificate(0) == (fade * at_fold[0], fade * at_fold[1])
        now = held(log, 0) - dense(written(events.part(0, t + 1), 0), 0.125, 11, 7)
        torch.testing.assert_close(now, fade * error, rtol=0, atol=1e-13)
    log.write(events.part(0, 1))  # the second fold adds to what is left of the first
    assert log.certificate(0)[0] > 0.875**8 * at_fold[0]
    assert log.slots.last_fold(log.event_counts[0]) == 20


def test_the_certificate_says_something():
    """On a stream of rank 2 nothing but rounding is lost; on random ones it is near the truth after many folds."""
    log = log_of("compress", O=40, I=30, dtype=torch.float32)
    log.write(events := stream("low-rank", 1, 200, 40, 30, dtype=torch.float32))
    size = float(dense(written(events, 0), 0, 40, 30).norm())
    assert 0 < log.certificate(0)[1] < 1e-4 * size
    log = log_of("compress", O=40, I=30, rank=16, decay=0.1)
    log.write(events := stream("random", 1, 200, 40, 30))
    error = torch.linalg.matrix_norm(held(log, 0) - dense(written(events, 0), 0.1, 40, 30), 2)
    assert error <= log.certificate(0)[0] <= 2 * error


def hard(kind, S, O, I):
    U, K, b, w = torch.randn(S, O), torch.randn(S, I), torch.zeros(S), torch.ones(S, dtype=F64)
    match kind:
        case "cancelling":  # large slots, a small sum
            U = U.abs() * torch.tensor([1.0, -1.0]).repeat(S // 2)[:, None]
            K = K[:1] + 1e-6 * torch.randn(S, I)
        case "steep":
            U *= (10.0 ** torch.linspace(0, -12, S))[:, None]
        case "unbalanced":
            U *= (10.0 ** torch.linspace(10, -10, S))[:, None]
            K *= (10.0 ** torch.linspace(-10, 10, S))[:, None]
        case "repeated":
            U, K = (x[:1].expand_as(x).clone() for x in (U, K))
        case "low rank":
            U, K = (torch.randn(S, 5) @ torch.randn(5, x.shape[1]) for x in (U, K))
        case "holes":
            U[1::5], K[2::7], w[::3], b = 0, 0, 0, torch.randn(S)
        case "nothing":
            w.zero_()
    return U, K, b, w


def by_torch(U, K, b, w, keep) -> Folded:
    return fold(U, K, b, w, keep)


def by_c(U, K, b, w, keep) -> Folded:
    """The same in C, where there is C: it works in place."""
    if not hasattr(library(), "fold"):
        pytest.skip("folds in C need AVX-512 and a compiler")
    U, K, b = U.clone(), K.clone(), b.clone()
    errors = in_c.fold_(U, K, b, w, keep)
    assert errors is not None
    return Folded(U[:keep], K[:keep], b[:keep], *errors)


ways = pytest.mark.parametrize("way", [by_torch, by_c])
HARD = ["cancelling", "steep", "unbalanced", "repeated", "low rank", "holes", "nothing"]
SIZES = [(96, 576, 200, 64), (24, 48, 40, 16), (12, 11, 7, 4)]


@ways
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize(("S", "O", "I", "keep"), SIZES)
def test_the_bounds_of_a_float32_fold_hold_where_sums_are_hard(kind, S, O, I, keep, way):
    for seed in range(3):
        torch.manual_seed(seed)
        U, K, b, w = hard(kind, S, O, I)
        found = way(U, K, b, w, keep)
        M, N = (
            u.double().T @ torch.cat([k, s[:, None]], 1).double()
            for u, k, s in ((U.double() * w[:, None], K, b), (found.U_RO, found.K_RI, found.bias_R))
        )
        best, lost = torch.linalg.svdvals(M)[keep:], torch.linalg.svdvals(M - N)
        assert lost.max() <= found.error_2
        assert lost.norm() <= found.error_F
        size = (U.double() * w[:, None]).norm() * K.double().norm()  # what sums are made of
        assert found.error_F <= best.norm() + 2e-6 * size


@pytest.mark.parametrize("kind", ["random", *HARD])
@pytest.mark.parametrize(
    ("S", "O", "I", "keep"), [*SIZES, (96, 1536, 577, 64), (2, 1, 1, 1), (25, 770, 9, 10), (256, 300, 260, 9)]
)
def test_a_fold_in_c_is_that_of_torch(kind, S, O, I, keep):
    """The same bounds and the same sum, but for rounding; on any number of threads the same bits."""
    torch.manual_seed(1)
    U, K, b, w = hard(kind, S // 2 * 2, O, I)
    wanted, found = by_torch(U, K, b, w, keep), by_c(U, K, b, w, keep)
    M, N = (F.U_RO.double().T @ torch.cat([F.K_RI, F.bias_R[:, None]], 1).double() for F in (wanted, found))
    size = float((U.double() * w[:, None]).norm() * K.double().norm())
    assert found.error_2 == pytest.approx(wanted.error_2, rel=2e-3, abs=1e-12 * size)
    assert found.error_F == pytest.approx(wanted.error_F, rel=2e-3, abs=1e-12 * size)
    sigma = torch.linalg.svdvals((U.double() * w[:, None]).T @ torch.cat([K, b[:, None]], 1).double())
    if float(sigma[keep - 1]) > 1.001 * float(sigma[keep:].amax() if len(sigma) > keep else 0):  # one best sum
        assert float((M - N).norm()) <= found.error_F - float(sigma[keep:].norm()) + 1e-7 * size
    torch.testing.assert_close(torch.linalg.svdvals(N), torch.linalg.svdvals(M), rtol=0, atol=1e-6 * size + 1e-30)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            again = by_c(U, K, b, w, keep)
            assert torch.equal(again.U_RO, found.U_RO)
            assert torch.equal(again.K_RI, found.K_RI)
            assert (again.error_2, again.error_F) == (found.error_2, found.error_F)
    finally:
        torch.set_num_threads(threads)


def test_a_fold_that_c_cannot_make_changes_nothing_there():
    by_c(torch.ones(2, 2), torch.ones(2, 2), torch.zeros(2), torch.ones(2, dtype=F64), 1)
    full, b, w = torch.full((12, 40), 1e38), torch.ones(12), torch.ones(12, dtype=F64)
    U, K = full.clone(), full.clone()
    assert in_c.fold_(U, K, b, w, 1) is None
    with pytest.raises(ValueError, match=r"does not fit torch\.float32"):
        fold_(U, K, b, w, 1)
    for tensor, before in ((U, full), (K, full), (b, torch.ones(12))):
        assert torch.equal(tensor, before)
    assert in_c.fold_(U.double(), K.double(), b.double(), w, 1) is None
    many = torch.ones(in_c.MOST_SLOTS + 1, 2)
    assert in_c.fold_(many, many.clone(), many[:, 0].clone(), many[:, 0].double(), 1) is None


@ways
def test_the_bounds_hold_where_gram_matrices_round_most(way):
    """Two slots of nearly constant vectors that cancel: every Gram entry is a long sum of like terms."""
    O, I, c, d = 1536, 14336, 1.534965991973877, 1.2625155448913574
    U, K = torch.tensor([[c], [d]]).expand(2, O).clone(), torch.tensor([[d], [-c]]).expand(2, I).clone()
    K[0, :2807] = d + 10 * 2**-23
    found = way(U, K, torch.zeros(2), torch.ones(2, dtype=F64), 1)
    r = c * K[0].double() + d * K[1].double()  # M = 1 rᵀ
    A, B = torch.stack([torch.ones(O), -found.U_RO[0]], 1).double(), torch.stack([r, found.K_RI[0].double()], 1)
    lost = torch.linalg.matrix_norm(torch.linalg.qr(A).R @ torch.linalg.qr(B).R.T, 2)  # ‖M − û k̂ᵀ‖
    assert 0 < float(lost) <= found.error_2 <= found.error_F
    if way is by_torch:  # whose Gram matrices do not see r: nothing of it is kept
        assert not found.U_RO.any()
        assert float(lost) > 0.0037


@ways
@pytest.mark.parametrize(("u", "w"), [(1e-42, 1.0), (1.0, 1e-94), (1.0, 1e-170), (1e18, 1.0)])
def test_the_bounds_hold_at_the_ends_of_float32(u, w, way):
    torch.manual_seed(0)
    U, K, w = u * torch.randn(12, 20), u * torch.randn(12, 30), torch.full((12,), w, dtype=F64)
    found = way(U, K, torch.zeros(12), w, 4)
    M, N = (U.double() * w[:, None]).T @ K.double(), found.U_RO.double().T @ found.K_RI.double()
    largest = float((M - N).abs().max())  # norms of the smallest underflow even in float64
    assert 0 < largest * float(torch.linalg.matrix_norm((M - N) / largest, 2)) <= found.error_2 <= found.error_F


def test_a_fold_that_does_not_fit_float32_is_refused_by_name():
    log = log_of("compress", dtype=torch.float32)
    U, K = torch.full((1, 12, 11), 1e38), torch.full((1, 12, 7), 1e38)
    with pytest.raises(ValueError, match=r"event 12 of .* \(row 0\) fills its log, and the sum of the events, of norm"):
        log.write(Events(U, K, None, torch.ones(1, 12, dtype=torch.bool)))


def test_fold_of_a_known_sum():
    U, K = torch.eye(3, 5, dtype=F64), torch.eye(3, 4, dtype=F64)
    best = fold(U, K, torch.zeros(3, dtype=F64), torch.tensor([1.0, 4.0, 2.0], dtype=F64), keep=1)
    assert (best.U_RO.abs() - torch.tensor([[0, 2, 0, 0, 0]])).norm() < 1e-14
    assert (best.U_RO.T @ best.K_RI)[1, 1].item() == pytest.approx(4)
    assert (best.error_2, best.error_F) == (pytest.approx(2), pytest.approx(5**0.5))


# ---- one pass = token by token, a row alone = a row in a batch


@FEW
@given(
    overflow=st.sampled_from(["compress", "evict", "grow"]),
    rank=st.integers(1, 6),
    decay=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, F64]),
    density=st.sampled_from([1.0, 0.5, 0.1]),
    seed=st.integers(0, 1000),
)
def test_any_split_into_feeds_gives_the_same_bits(overflow, rank, decay, dtype, density, seed):
    rows, tokens, tolerance = 3, 45, 16 * torch.finfo(dtype).eps * 45  # weights are in the log's dtype
    events = stream("random", rows, tokens, 11, 7, seed, dtype, density=density)
    step, whole, split, blind = (log_of(overflow, rows, rank=rank, decay=decay, dtype=dtype) for _ in range(4))
    seen = []  # ΔW that each token reads, token by token
    for t in range(tokens):
        seen.append(torch.stack([step.delta_weight(row, F64) for row in range(rows)]))
        step.write(events.part(t, t + 1))
    for log, feeds in ((whole, [(0, tokens)]), (split, cuts(tokens, seed))):
        for start, end in feeds:
            segments = log.segments(events.write_BT[:, start:end])
            assert [a for a, _ in segments] == [0, *[b for _, b in segments[:-1]]]
            assert segments[-1][1] == end - start
            for a, b in segments:
                part = events.part(start + a, start + b)
                expected = torch.stack(seen[start + a : start + b])
                torch.testing.assert_close(read_in_a_pass(log, part), expected, rtol=tolerance, atol=tolerance)
                log.write(part)
        same(log, step)
    blind.write(events)  # a caller that does not ask for segments still gets the same state
    same(blind, step)
    for row in range(rows):
        alone = log_of(overflow, rank=rank, decay=decay, dtype=dtype)
        one = slice(row, row + 1)
        alone.write(Events(events.U_BTO[one], events.K_BTI[one], events.bias_BT[one], events.write_BT[one]))
        same(step, alone, [row])


def read_in_a_pass(log: EventLog, part: Events) -> Tensor:
    """ΔW [T, B, O, I] that each token of one segment reads: the log's slots, and the segment's own earlier events."""
    write = part.write_BT.long()
    before = write.cumsum(1) - write
    w = log.slot_weights(log.now() + before).double()
    U, K, _ = (factor.double() for factor in log.factors())
    out = []
    for t in range(write.shape[1]):
        age = (before[:, t, None] - 1 - before[:, :t]).clamp(min=0)
        own = write[:, :t] * (1.0 - log.decay) ** age.double()
        W = torch.einsum("br,bro,bri->boi", w[:, t], U, K)
        out.append(W + torch.einsum("bs,bso,bsi->boi", own, part.U_BTO[:, :t].double(), part.K_BTI[:, :t].double()))
    return torch.stack(out)


def test_segments():
    assert log_of("grow").segments(torch.ones(1, 50)) == [(0, 50)]
    log = log_of("compress")  # folds after 12, 20, 28, … events
    assert log.segments(torch.ones(1, 30, dtype=torch.bool)) == [(0, 12), (12, 20), (20, 28), (28, 30)]
    assert log.segments(torch.ones(1, 12, dtype=torch.bool)) == [(0, 12)]
    assert log.segments(torch.zeros(1, 30, dtype=torch.bool)) == [(0, 30)]
    log = log_of("compress", 2)
    write = torch.ones(2, 20, dtype=torch.bool)
    write[1, :3] = False
    assert log.segments(write) == [(0, 12), (12, 15), (15, 20)]
    assert log_of("evict", 2).segments(write) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    write[0, 1::2] = False
    assert log_of("evict", 2).segments(write)[:2] == [(0, 7), (7, 11)]
    ones = torch.ones(1, 30, dtype=torch.bool)
    assert log_of("compress").segments(ones, rows_per_column=5) == [
        (0, 15),
        (15, 20),
        (20, 30),
    ]  # a column is never parted
    assert log_of("compress").segments(ones, rows_per_column=30) == [(0, 30)]
    assert log_of("evict").segments(ones, rows_per_column=3)[:3] == [(0, 3), (3, 6), (6, 9)]
    assert log_of("evict").segments(ones, rows_per_column=15) == [(0, 15), (15, 30)]  # more than the ring holds


def test_slots_of_a_full_row():
    log = log_of("compress", O=3, I=7, rank=6)  # 6 + 8 slots, but 3 neurons have 3 singular values
    log.write(stream("random", 1, 14, 3, 7))
    assert log.used == log.slots.kept == 3
    assert log.birth_BR[0].tolist() == [13] * 3 + [-1] * 11
    assert log.certificate(0)[1] < 1e-11
    log.write(stream("random", 1, 10, 3, 7))
    assert log.used == 13


# ---- going back


@pytest.mark.parametrize("overflow", ["grow", "error", "compress", "evict"])
def test_fits_says_whether_it_can_be_taken_back(overflow):
    events = stream("random", 2, 40, 11, 7)
    for before in (0, 3, 4, 11, 12, 19, 25):
        for count in (0, 1, 2, 8):
            log = log_of(overflow, 2, rank=40 if overflow == "error" else 4)
            log.write(events.part(0, before))
            fits, copy = log.fits([count, 0]), log.clone()
            one = torch.zeros(2, count, dtype=torch.bool)
            one[0] = True
            log.write(Events(events.U_BTO[:, :count], events.K_BTI[:, :count], events.bias_BT[:, :count], one))
            if fits:
                log.roll_back([before, before])
                for row in range(2):
                    assert torch.equal(log.delta_weight(row), copy.delta_weight(row))
            else:
                with pytest.raises(ValueError, match="oldest exact moment"):
                    log.rewind([before, before])


@pytest.mark.parametrize(("overflow", "oldest"), [("compress", 20), ("evict", 25)])
def test_what_is_lost_is_refused_and_named(overflow, oldest):
    log = log_of(overflow)
    log.write(stream("random", 1, 25, 11, 7))
    copy = log.clone()
    assert log.oldest_exact_moment(0) == oldest
    with pytest.raises(
        ValueError, match=f"up_proj: row 0 cannot go back to event 19, its oldest exact moment is {oldest}"
    ):
        log.rewind([19])
    with pytest.raises(ValueError, match=f"after event 19 is not kept, expected a moment from {oldest} "):
        log.weights_at([oldest, 19])
    with pytest.raises(ValueError, match=r"rewind\(\[26\]\), expected 1 counts up to \[25\]"):
        log.rewind([26])
    with pytest.raises(ValueError, match="after event 26 is not kept"):
        log.weights_at([26])
    same(log, copy)


@MANY
@given(
    policy=st.sampled_from(
        [("grow", False), ("compress", True), ("evict", True), ("compress", False), ("evict", False)]
    ),
    rank=st.integers(1, 5),
    decay=st.sampled_from([0.0, 0.1]),
    moves=st.lists(
        st.tuples(st.sampled_from(["write", "write", "undo", "fork", "save"]), st.integers(0, 20)),
        min_size=5,
        max_size=12,
    ),
    seed=st.integers(0, 100),
)
def test_undone_is_never_written(policy, rank, decay, moves, seed):
    """Random lives: the log is, bit for bit, one into which only what was not undone was ever written."""
    (overflow, archive), rows = policy, 2
    log = log_of(overflow, rows, rank=rank, decay=decay, dtype=torch.float32, archive=archive)
    past = [stream("random", rows, 0, 11, 7, dtype=torch.float32)]
    kept = []  # per event and row: what is written and not undone
    for number, (move, amount) in enumerate(moves):
        if move == "write":
            past.append(stream("random", rows, amount, 11, 7, seed + number, torch.float32, density=0.8))
            log.write(past[-1])
            kept += [(row, past[-1], t) for t in range(amount) for row in range(rows) if past[-1].write_BT[row, t]]
        elif move == "undo":
            wanted = [max(0, n - amount // (row + 1)) for row, n in enumerate(log.event_counts)]
            if any(n < log.oldest_exact_moment(row) for row, n in enumerate(wanted)):
                copy = log.clone()
                with pytest.raises(ValueError, match="oldest exact moment"):
                    log.rewind(wanted)
                same(log, copy)
                continue
            log.rewind(wanted)
            for row, n in enumerate(wanted):
                mine = [entry for entry in kept if entry[0] == row]
                kept = [entry for entry in kept if entry[0] != row] + mine[:n]
        elif move == "fork":
            parent, log = log, log.clone()
            parent.write(stream("random", rows, 3, 11, 7, 999, torch.float32))
        else:
            tensors, meta = log.state_dict()
            log = log_of(overflow, rows, rank=rank, decay=decay, dtype=torch.float32, archive=archive)
            log.load_state_dict(tensors, json.loads(json.dumps(meta)))
    fresh = log_of(overflow, rows, rank=rank, decay=decay, dtype=torch.float32, archive=archive)
    for row, events, t in kept:
        only = torch.zeros(rows, 1, dtype=torch.bool)
        only[row] = True
        one = events.part(t, t + 1)
        fresh.write(Events(one.U_BTO, one.K_BTI, one.bias_BT, only))
    same(log, fresh)


@pytest.mark.parametrize("overflow", ["compress", "evict"])
def test_an_archive_takes_back_any_number_of_events(overflow):
    events = stream("random", 2, 45, 11, 7, dtype=torch.float32, density=0.8)
    full, steps = (log_of(overflow, 2, decay=0.1, dtype=torch.float32, archive=True) for _ in range(2))
    full.write(events)
    for t in range(45):
        for events_B in (
            steps.event_counts,
            [steps.event_counts[0], full.event_counts[1]],
        ):  # both rows go back, or one alone
            log = full.clone()
            log.rewind(events_B)
            assert log.event_counts == log.archive.event_counts == events_B
            same(log, steps, [0]) if events_B[1] != steps.event_counts[1] else same(log, steps)
            if overflow == "compress" and events_B[0] < log.capacity:
                assert log.certificate(0) == (0, 0)
        steps.write(events.part(t, t + 1))
    same(full, steps)


def test_a_fork_and_its_parent_share_nothing():
    log = log_of("compress", archive=True)
    log.write(stream("random", 1, 11, 11, 7))
    copy, before = log.clone(), log.clone()
    copy.write(stream("random", 1, 30, 11, 7, seed=1))
    same(log, before)
    assert log.archive.event_counts == [11]
    assert copy.archive.event_counts == [41]


# ---- any moment


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize(
    ("overflow", "archive"), [("grow", False), ("error", False), ("compress", True), ("evict", True)]
)
def test_any_moment_is_exact_where_every_event_is_kept(overflow, archive, decay):
    events = stream("random", 2, 40, 11, 7, density=0.8)
    rank = 40 if overflow == "error" else 4
    log = log_of(overflow, 2, rank=rank, decay=decay, archive=archive)
    log.write(events)
    U, K, bias, birth = log.moment_factors()
    for row in range(2):
        assert log.oldest_exact_moment(row) == log.oldest_event(row) == 0
        moments = list(range(log.event_counts[row] + 1))
        w = log.weights_at(moments, row)
        assert w.shape == (len(moments), birth.shape[1])
        pairs = written(events, row)
        for n in moments:
            window = pairs[max(0, n - rank) : n] if overflow == "evict" else pairs[:n]
            M = (U[row] * w[n, :, None]).T @ torch.cat([K[row], bias[row, :, None]], 1)
            torch.testing.assert_close(M, dense(window, decay, 11, 7), rtol=1e-12, atol=1e-12)
        norms = [float(u.norm() * k[:-1].norm()) for u, k in pairs]
        assert log.event_norms(row).tolist() == pytest.approx(norms)


def test_moments_since_the_last_fold_are_as_the_log_held_them():
    events = stream("random", 1, 26, 11, 7)
    log, step = log_of("compress", decay=0.1), log_of("compress", decay=0.1)
    log.write(events)
    step.write(events.part(0, 20))
    U, K, _, _ = log.moment_factors()
    for n in range(20, 27):
        W = (U[0] * log.weights_at([n])[0, :, None]).T @ K[0]
        torch.testing.assert_close(W, step.delta_weight(0), rtol=1e-13, atol=1e-13)
        step.write(events.part(n, min(n + 1, 26)))
    norms = log.event_norms(0)
    assert log.oldest_event(0) == 20
    assert norms[:20].isnan().all()
    assert norms[20:].tolist() == pytest.approx([float(u.norm() * k[:-1].norm()) for u, k in written(events, 0)[20:]])
    ring = log_of("evict")
    ring.write(events)
    assert ring.oldest_event(0) == 22
    assert ring.event_norms(0).isnan().tolist() == [True] * 22 + [False] * 4


# ---- reports


def test_effective_rank_of_a_known_spectrum():
    log = log_of("grow", O=9, I=9, decay=0.5)
    assert log.effective_rank(0) == 0
    Q = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(0), dtype=F64)).Q
    U = Q[:3] * torch.tensor([4.0, 2.0, 1.0], dtype=F64)[:, None]  # decay makes them equal
    log.write(Events(U[None], torch.eye(9, dtype=F64)[None, :3], None, torch.ones(1, 3, dtype=torch.bool)))
    assert log.effective_rank(0) == pytest.approx(3)
    log.write(Events(Q[None, 3:4] * 2, torch.eye(9, dtype=F64)[None, 3:4], None, torch.ones(1, 1, dtype=torch.bool)))
    p = [0.5 / 3.5] * 3 + [2 / 3.5]  # the first three are now 1/2 each: rescaled, 2 / 3.5 is the newest
    assert log.effective_rank(0) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert log.delta_norm(0) == pytest.approx(float(log.delta_weight(0).norm()))


def test_bytes():
    log = log_of("compress", rows=2, O=11, I=7, rank=4, dtype=torch.float32)
    assert log.bytes == 2 * 12 * ((11 + 7 + 1) * 4 + 8)
    kept = log_of("compress", rows=2, archive=True)
    kept.write(stream("random", 2, 100, 11, 7))
    assert kept.bytes == 2 * 12 * (19 * 8 + 8) + kept.archive.bytes
    assert kept.archive.bytes >= 2 * 100 * (19 * 8 + 8)
    assert log_of("grow", archive=True).archive is None


# ---- saving and refusing


@pytest.mark.parametrize(
    ("overflow", "archive"), [("grow", False), ("compress", False), ("compress", True), ("evict", True)]
)
def test_saved_and_loaded_is_bit_for_bit(overflow, archive):
    events = stream("random", 2, 60, 11, 7, dtype=torch.float32, density=0.7)
    log, other = (log_of(overflow, 2, decay=0.1, dtype=torch.float32, archive=archive) for _ in range(2))
    other.write(stream("random", 2, 33, 11, 7, seed=5, dtype=torch.float32))
    log.write(events.part(0, 31))
    tensors, meta = log.state_dict()
    assert all(t.is_contiguous() for t in tensors.values())
    log_at_save = log.clone()
    log.write(events.part(31, 60))
    other.load_state_dict(tensors, json.loads(json.dumps(meta)))
    same(other, log_at_save)
    other.write(events.part(31, 60))
    same(other, log)


def test_a_saved_log_of_something_else_is_refused():
    log = log_of("compress", archive=True)
    log.write(stream("random", 1, 31, 11, 7))
    tensors, meta = log.state_dict()
    copy = log.clone()
    for change, text in [
        ({"name": "layers.1.mlp.up_proj"}, "the saved log has name 'layers.1.mlp.up_proj', expected 'layers.0.mlp"),
        ({"rank": 8}, "has rank 8, expected 4"),
        ({"dtype": "float32"}, "has dtype 'float32', expected 'float64'"),
        ({"archive": {**meta["archive"], "in_features": 3}}, "has in_features 3, expected 7"),
        ({"events": [30]}, r"the saved U is .*\[1, 7, 11\].*, expected .*\[1, 6, 11\]"),
    ]:
        with pytest.raises(ValueError, match=text):
            log.load_state_dict(tensors, {**meta, **change})
    with pytest.raises(ValueError, match="the saved K is missing"):
        log.load_state_dict({k: t for k, t in tensors.items() if k != "K"}, meta)
    with pytest.raises(ValueError, match=r"the saved U is .*float32.*, expected .*float64"):
        log.load_state_dict({**tensors, "U": tensors["U"].float()}, meta)
    with pytest.raises(ValueError, match="has archive True, expected False"):
        log_of("compress").load_state_dict(tensors, meta)
    same(log, copy)


def test_a_snapshot_of_a_log_without_an_archive_is_refused_where_there_is_one():
    log, plain = log_of("compress", archive=True), log_of("compress")
    with pytest.raises(ValueError, match="the snapshot's log has archive False, expected True"):
        log.check_form(plain.form(), "snapshot's")


def test_the_keys_of_a_saved_log_are_those_of_files_that_exist():
    name, budget = "layers.0.mlp.up_proj", Budget(1, "scale", 2.0)
    log = EventLog(name, 1, 11, 7, 3, "compress", 0.1, F64, CPU, archive=True, budget=budget)
    tensors, meta = log.state_dict()
    own = {"U", "K", "bias", "birth", "norm"}
    assert tensors.keys() == own | {f"archive.{key}" for key in own}
    form = {"name", "rows", "out_features", "in_features", "rank", "overflow", "decay", "dtype", "budget"}
    assert meta.keys() == form | {"events", "errors", "scaled", "archive"}
    assert meta["archive"].keys() == form | {"events", "errors", "scaled"}
    assert log_of("grow").state_dict()[1].keys() == form | {"events", "errors"}


@pytest.mark.parametrize("device", ["cpu", "other", *["cuda"] * torch.cuda.is_available()])
@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("overflow", ["compress", "evict"])
def test_counts_masks_events_and_copies_may_lie_on_another_device(overflow, archive, device):
    log, here = (log_of(overflow, 2, decay=0.1, archive=archive, device=d) for d in (device, CPU))
    events = stream("random", 2, 30, 11, 7)

    def same_numbers(there: EventLog) -> None:
        assert there.event_counts == here.event_counts
        assert all(type(n) is int for n in there.event_counts)
        for row in range(2):
            torch.testing.assert_close(there.delta_weight(row).cpu(), here.delta_weight(row), rtol=0, atol=1e-9)
            torch.testing.assert_close(there.event_norms(row), here.event_norms(row), equal_nan=True)

    log.write(replace(events, U_BTO=events.U_BTO.to(device)))  # its mask and keys are on the CPU
    here.write(events)
    same_numbers(log)
    assert log.segments(events.write_BT.to(device)) == here.segments(events.write_BT)
    seen_by_next = torch.tensor([[31], [31]])
    torch.testing.assert_close(log.slot_weights(seen_by_next).cpu(), here.slot_weights(seen_by_next))
    torch.testing.assert_close(log.weights_at(torch.tensor([30])).cpu(), here.weights_at([30]))
    moment = Moment(without=[30], scale={29: 0.5}).slot_weights(log, (0, "up_proj"), 1)
    torch.testing.assert_close(
        moment.cpu(), Moment(without=[30], scale={29: 0.5}).slot_weights(here, (0, "up_proj"), 1)
    )

    back = torch.tensor([29, 30], device=device) if overflow == "compress" or archive else torch.tensor([30, 30])
    log.rewind(back)
    here.rewind(back.tolist())
    same_numbers(log)
    log.roll_back(back)
    same_numbers(log)
    log.count_written(torch.tensor([0, 0], device=device))
    same_numbers(log)
    same_numbers(log.rows(torch.tensor([0, 1], device=device)))
    for move in (
        lambda new: new.copy_from(here),
        lambda new: new.load_state_dict(*here.state_dict()),
        lambda new: new.load_state_dict(*log.state_dict()),
    ):
        fresh = log_of(overflow, 2, decay=0.1, archive=archive, device=device)
        move(fresh)
        same_numbers(fresh)


def test_refusals_change_nothing():
    with pytest.raises(
        ValueError, match=r"up_proj: factors in torch\.bfloat16 would stop moving, expected torch.float32"
    ):
        log_of("grow", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="overflow='forget', expected one of 'compress', 'evict'"):
        log_of("forget")
    log = log_of("compress", archive=True)
    log.write(events := stream("random", 1, 11, 11, 7))
    copy = log.clone()
    events.K_BTI[0, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"event 15 of .*up_proj \(row 0\) has a non-finite factor"):
        log.write(events)
    same(log, copy)
    events.K_BTI[0, 3, 2], events.bias_BT[0, 4] = 0, float("inf")
    with pytest.raises(ValueError, match=r"event 16 of .*up_proj \(row 0\) has a non-finite factor"):
        log.write(events)
    same(log, copy)
    full = log_of("error")
    full.write(stream("random", 1, 3, 11, 7))
    with pytest.raises(ValueError, match="5 events do not fit its rank of 4"):
        full.write(stream("random", 1, 2, 11, 7))
    assert full.event_counts == [3]
