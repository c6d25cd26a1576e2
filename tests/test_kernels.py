"""The kernels against a float64 reference written here on its own: token by token, dense ΔW.

Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before the kernels are
imported: `test_triton_interpreted` runs this file once more in a process of its own. With a GPU they run on it.
"""

import itertools
import math
import os
import warnings

import pytest
import torch
import triton.language as tl  # noqa: F401  the interpreter looks for it in the module of every kernel
from interpreted import nan_filled_outputs, run_interpreted  # noqa: F401

from fastweights import rules
from fastweights.activations import IDENTITY, PHI, SILU, halves
from fastweights.kernels import cpu, gram, read, scan, values

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ["torch", "triton"] if INTERPRETED or ON_GPU else ["torch"]
SHAPES = [(1, 64, 32, 4), (2, 100, 60, 8), (3, 257, 129, 16)]  # B, O, I, R: odd, so that grids have ragged ends
RULES = ["ones", "positive", "derivative", "slow_ones", "slow_positive", "slow_derivative", "delta"]
NAN = float("nan")
TF32 = 2e-3 if ON_GPU else 1e-5  # what half precision asks of Triton's products: 10 bits there, 23 interpreted

warnings.filterwarnings("ignore", module="triton.runtime.interpreter")


def close(found, wanted, tolerance):
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert found.shape == wanted.shape
    assert torch.equal(found.isnan(), wanted.isnan())
    assert (found - wanted).nan_to_num().abs().max() <= tolerance * max(1, wanted.nan_to_num().abs().max())


# ---- the oracle


def phi(a, activation):
    match activation:
        case "silu":
            return a / (1 + torch.exp(-a))
        case "gelu":
            return a * torch.special.ndtr(a)
        case "gelu_tanh":
            return a / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a**3)))
    return a


def slope(a, activation):
    s = 1 / (1 + torch.exp(-a))
    match activation:
        case "silu":
            return s + a * s * (1 - s)
        case "gelu":
            return torch.special.ndtr(a) + a * torch.exp(-(a**2) / 2) / (2 * math.pi) ** 0.5
        case "gelu_tanh":
            tanh = torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a**3))
            return (1 + tanh + a * (1 - tanh**2) * (2 / math.pi) ** 0.5 * (1 + 0.134145 * a**2)) / 2
    return torch.ones_like(a)


def rule_value(rule, a, frozen, target, p0, activation):
    if rule == "delta":
        return target - a
    at = frozen if rule.startswith("slow") else a
    z = phi(at, activation)
    m = {"ones": 1.0, "positive": (z > 0).double(), "derivative": slope(at, activation)}[rule.split("_")[-1]]
    return p0 * m * z - (a - frozen) if rule.startswith("slow") else m * z


def oracle(h, W, bias, events, n, slots, write, rate, p0, target, rule, activation, mu, decay, clip, fast_bias):
    """One row. events: list of (birth, u, k, kb); h [T, I], target [T, O]. Returns a [T, O] and u [T, O]."""
    h, W, target = h.double().cpu(), W.double().cpu(), target.double().cpu()
    dW, db = torch.zeros_like(W), torch.zeros(len(W), dtype=torch.float64)
    for birth, u, k, kb in events:
        dW += (1 - decay) ** (n - 1 - birth) * torch.outer(u, k)
        db += (1 - decay) ** (n - 1 - birth) * kb * u
    a_TO, u_TO = [], []
    for t in range(len(h)):
        frozen = W @ h[t] + (0 if bias is None else bias.double().cpu())
        a = frozen + dW @ h[t] + db
        u = torch.zeros_like(a)
        if write[t]:
            scale = 1.0 if mu is None else 1 / (h[t] @ h[t] + mu)
            k, kb = h[t] * scale, scale if fast_bias else 0.0
            u = rate * rule_value(rule, a, frozen, target[t], p0, activation)
            if clip is not None:
                u = torch.where(u.abs() * k.norm() > clip, u.sign() * clip / k.norm(), u)
            dW = (1 - decay) * dW + torch.outer(u, k)
            db = (1 - decay) * db + kb * u
            events.append((n, u, k, kb))
            if len(events) > slots:  # the oldest leaves
                birth, old_u, old_k, old_kb = events.pop(0)
                dW -= (1 - decay) ** (n - birth) * torch.outer(old_u, old_k)
                db -= (1 - decay) ** (n - birth) * old_kb * old_u
            n += 1
        a_TO.append(a)
        u_TO.append(u)
    return torch.stack(a_TO), torch.stack(u_TO)


def variant(number):
    """Rule options that together, over consecutive numbers, meet each other."""
    decay = [0.0, 0.1, 0.01][number % 3]
    clip = [None, 0.05][number // 2 % 2]
    mu = [1e-6, 0.5, None][number // 3 % 3]
    return decay, clip, mu, [False, True][number % 2], list(values.ACTIVATIONS)[number // 2 % 4]


def inputs(B, T, I, O, dtype):
    h = (torch.randn(B, T, I) / I**0.5 + 0.1).to(DEVICE, dtype)
    W = torch.randn(O, I).to(DEVICE, dtype)
    return h, W, torch.randn(O).to(DEVICE, dtype), torch.randn(B, T, O).to(DEVICE, dtype)


# ---- read


def factors(B, R, I, O, dtype=torch.float32, batch=None):
    batch = batch or B
    U, K, kb = torch.randn(batch, R, O), torch.randn(batch, R, I) / I**0.5, torch.rand(batch, R)
    return U.to(DEVICE, dtype), K.to(DEVICE, dtype), kb.to(DEVICE, dtype)


def dense_read(x, U, K, kb, w):
    x, U, K, kb, w = (v.double().cpu() for v in (x, U, K, kb, w))
    y = torch.zeros(*x.shape[:2], U.shape[2], dtype=torch.float64)
    for b, t in itertools.product(range(x.shape[0]), range(x.shape[1])):
        f = b if len(U) > 1 else 0
        for r in range(U.shape[1]):
            weight = w[b, r] if w.dim() == 2 else w[b, t, r]
            if weight != 0:
                y[b, t] += weight * (x[b, t] @ K[f, r] + kb[f, r]) * U[f, r]
    return y


READS = [(backend, dtype) for backend in BACKENDS for dtype in (torch.float32, torch.float16)]
READS.append(("torch", torch.float64))  # Triton computes in float32


@pytest.mark.parametrize(("backend", "dtype"), READS)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("B", "O", "I", "R"), SHAPES)
def test_read(backend, dtype, B, O, I, R, shared, per_token):
    T = 1 if R == 4 else 5
    x = torch.randn(B, T, I).to(DEVICE, dtype)
    U, K, kb = factors(B, R, I, O, torch.float64 if dtype == torch.float64 else torch.float32, 1 if shared else B)
    w = torch.rand(B, T, R) if per_token else torch.rand(B, R)
    w = (w * (torch.rand_like(w) > 0.3)).to(DEVICE)
    w[..., -1] = 0
    U[:, -1], K[:, -1], kb[:, -1] = NAN, NAN, NAN  # a dead slot may hold anything
    tolerance = 1e-13 if dtype == torch.float64 else TF32 if backend == "triton" and dtype == torch.float16 else 1e-5
    found = read.read(x, U, K, kb, w, backend)
    assert found.dtype == U.dtype
    close(found, dense_read(x, U, K, kb, w), tolerance)
    close(read.read(x, U, K, None, w, backend), dense_read(x, U, K, torch.zeros_like(kb), w), tolerance)
    if shared:  # as a view of stride 0
        expanded = (f.expand(B, *f.shape[1:]) for f in (U, K, kb))
        close(read.read(x, *expanded, w, backend), dense_read(x, U, K, kb, w), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_read_gives_nan_only_to_who_reads_it(backend, bad):
    x, (U, K, kb) = torch.randn(2, 3, 20, device=DEVICE), factors(1, 4, 20, 30)
    w = torch.rand(2, 3, 4, device=DEVICE) + 0.1
    w[0, :, 1] = 0
    w[1, 1:, 1] = 0
    U[0, 1, 7] = bad
    y = read.read(x, U, K, kb, w, backend)
    wanted = torch.zeros(2, 3, 30, dtype=torch.bool)
    wanted[1, 0, 7] = True
    assert torch.equal((~y.isfinite()).cpu(), wanted)
    clean = dense_read(x, U.nan_to_num(0, 0, 0), K, kb, w)
    close(y.cpu()[~wanted], clean[~wanted], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_without_slots_and_of_part_of_a_buffer(backend):
    x, (U, K, kb) = torch.randn(2, 3, 20, device=DEVICE), factors(2, 9, 20, 30)
    w = torch.rand(2, 9, device=DEVICE)
    assert torch.equal(read.read(x, U[:, :0], K[:, :0], kb[:, :0], w[:, :0], backend).cpu(), torch.zeros(2, 3, 30))
    part = [f[:, :5] for f in (U, K, kb, w)]
    close(read.read(x, *part, backend), dense_read(x, *part), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_beyond_two_billion_elements(backend):
    torch.use_deterministic_algorithms(False)  # or 8 GB would be filled; so only a few pages are touched
    stride = 2**31 + 64
    U = torch.empty(stride + 400, device=DEVICE).as_strided((2, 4, 30), (stride, 30, 1))
    small = torch.randn(2, 4, 30)
    U.copy_(small)
    x, (_, K, kb) = torch.randn(2, 3, 20, device=DEVICE), factors(2, 4, 20, 30)
    w = torch.rand(2, 4, device=DEVICE)
    close(read.read(x, U, K, kb, w, backend), dense_read(x, small, K, kb, w), 1e-5)


def test_read_names_a_backend_that_does_not_exist():
    with pytest.raises(ValueError, match="backend 'cuda', expected"):
        read.read(torch.ones(1, 1, 2), *factors(1, 2, 2, 2), torch.ones(1, 2), "cuda")


def test_read_operator():
    x, (U, K, kb) = torch.randn(2, 3, 20, device=DEVICE), factors(2, 4, 20, 30)
    w = torch.rand(2, 4, device=DEVICE)
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.fastweights.read.default, (x.requires_grad_(), U, K, kb, w))
    found = torch.autograd.grad(torch.ops.fastweights.read(x, U, K, kb, w).square().sum(), x)[0]
    wanted = torch.autograd.grad(read.reference(x, U, K, kb, w).square().sum(), x)[0]
    close(found, wanted, 1e-5)


# ---- scan


def both_forms(rule, activation="identity", rate=1.0, gamma=1.0, clip=None, norm=None, frozen=None, target=None):
    """A rule as a torch function, and as kernels know it."""

    def value(a, t0, t1):
        part = slice(t0, t1)
        numbers = (torch.as_tensor(x, dtype=a.dtype, device=a.device) for x in (rate, gamma))
        at = target if target is None or target.dim() < 2 else target[..., part, :]
        norm_BT = torch.zeros(()) if norm is None else norm[:, part]
        frozen_BTO = None if frozen is None else frozen[:, part]
        return rules.twin_event(rule, PHI[activation], clip, a, frozen_BTO, norm_BT, *numbers, at)

    return value, scan.Known(rule, activation, rate, gamma, clip, norm, frozen, target)


def scan_case(backend, dtype, B, T, O, I, R, rule, number, write, tolerance):
    decay, clip, mu, fast_bias, activation = variant(number)
    rate, p0 = 0.3, 0.2
    h, W, bias, target = inputs(B, T, I, O, dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    U0, K0, kb0 = factors(B, R, I, O, work)
    kb0 = kb0 if fast_bias else torch.zeros_like(kb0)
    births = range(R)
    rows = [
        oracle(
            h[b],
            W,
            bias[:O],
            [(j, U0[b, j].double().cpu(), K0[b, j].double().cpu(), float(kb0[b, j])) for j in births],
            R,
            10**6,
            write[b],
            rate,
            p0,
            target[b],
            rule,
            activation,
            mu,
            decay,
            clip,
            fast_bias,
        )
        for b in range(B)
    ]
    square = h.to(work).square().sum(-1)
    scale = torch.ones_like(square) if mu is None else 1 / (square + mu)
    write = write.to(DEVICE)
    n = R + write.long().cumsum(1) - write.long()
    w = (1 - decay) ** (n[..., None] - 1 - torch.arange(R, device=DEVICE)).to(work)
    frozen = h.to(work) @ W.to(work).T + bias.to(work)
    a = frozen + read.read(h, U0, K0, kb0 if fast_bias else None, w, backend)
    k = h.to(work) * scale[..., None]
    gram = scan.Gram(h, scale, fast_bias, write, decay)
    value, known = both_forms(rule, activation, rate, p0, clip, k.norm(dim=-1), frozen, target.to(work))
    if backend == "torch":  # as a function that no kernel knows: in sweeps, where C would do the rules that it knows
        for found, one in zip(scan.scan(a, gram, value), (0, 1), strict=True):
            close(found, torch.stack([r[one] for r in rows]), tolerance)
    a, u = scan.scan(a, gram, value, known, backend)
    close(a, torch.stack([r[0] for r in rows]), tolerance)
    close(u, torch.stack([r[1] for r in rows]), tolerance)
    return a, u


TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "O", "I", "R"), SHAPES)
@pytest.mark.parametrize(("number", "rule"), list(enumerate(RULES)))
def test_scan(backend, rule, number, B, O, I, R):
    T = {1: 21, 2: 5, 3: 16}[B]
    if B == 3:
        O = 33
    write = torch.rand(B, T) > 0.3
    scan_case(backend, torch.float32, B, T, O, I, R, rule, number + B, write, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize(("number", "rule"), list(enumerate(RULES * 3)))
def test_scan_options(dtype, rule, number):
    number += number // len(RULES)
    scan_case("torch", dtype, 2, 41, 10, 12, 4, rule, number, torch.rand(2, 41) > 0.3, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 128, 150])
def test_scan_lengths(backend, T):
    write = torch.rand(2, T) > 0.3
    write[1, T // 2 :] = False  # a shorter row of a padded batch
    scan_case(backend, torch.float32, 2, T, 6, 12, 2, "derivative", 1, write, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_that_writes_nothing_is_the_identity(backend):
    write = torch.zeros(2, 20, dtype=torch.bool)
    _, u = scan_case(backend, torch.float32, 2, 20, 6, 12, 2, "slow_ones", 1, write, 2e-5)
    assert torch.equal(u, torch.zeros_like(u))


@pytest.mark.parametrize("activation", values.ACTIVATIONS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("T", "O", "clip"), [(300, 100, None), (129, 48, 0.05), (9, 49, 0.05)])
def test_scan_in_c_is_one_token_after_the_other(T, O, clip, rule, activation, blocks):
    h, scale, k = keys(2, T, 12, device="cpu")
    target = torch.randn(T, O, dtype=torch.float64)
    start, frozen, write = torch.randn(2, T, O), torch.randn(2, T, O).double(), torch.rand(2, T) > 0.1

    def by(dtype):
        options = (
            rule,
            activation,
            (0.02, 0.05),
            0.7,
            clip,
            k.norm(dim=-1).to(dtype),
            frozen.to(dtype),
            target.to(dtype),
        )
        return scan.Gram(h.to(dtype), scale.to(dtype), False, write, 0.01), *both_forms(*options)

    gram, value, _ = by(torch.float64)
    wanted = scan.scan_sequential(start.double(), gram, value)
    found = scan.scan(start, *by(torch.float32))
    assert len(blocks) == 2 * -(-T // scan.OUTER) * (hasattr(cpu.library(), "scan_block"))
    for f, w in zip(found, wanted, strict=True):
        close(f, w, 2e-6)


def phi_by(backend, a_O, rule, activation):
    """m ⊙ z of each neuron, by the first of two tokens of a scan: nothing was written before it."""
    h, write = torch.zeros(1, 2, 4, device=DEVICE), torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    start_BTO = a_O.float().to(DEVICE).expand(1, 2, -1)
    gram = scan.Gram(h, h[..., 0] + 1, False, write)
    return scan.scan(start_BTO, gram, *both_forms(rule, activation), backend)[1][0, 0].double().cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", values.ACTIVATIONS)
def test_an_activation_of_kernels_is_torchs_to_rounding(activation, backend, blocks):
    count, exact = 4001 if backend == "torch" else 161, PHI[activation]  # the interpreter is slow
    a = torch.cat((torch.linspace(-20, 20, count), torch.tensor([1e-3, -1e-3, 1e-30, 90.0, -90.0]))).double()
    unit = torch.finfo(torch.float32).eps * a.abs().clamp(min=1)
    error = (phi_by(backend, a, "ones", activation) - exact(a)).abs() / unit
    assert error.max() <= 4  # torch's own gelu: 3
    error = (phi_by(backend, a, "derivative", activation) - exact.derivative(a) * exact(a)).abs() / unit
    assert error.max() <= 10
    found = phi_by(backend, a, "positive", activation)
    assert ((found - exact(a).clamp(min=0)).abs() / unit).max() <= 4
    if backend == "torch" and not blocks:
        return  # no C here; torch's gelu of float32 overflows early, and of inf is NaN
    ends = torch.tensor([0.0, -0.0, 1e20, -1e20, 3e38, -3e38, math.inf, -math.inf, NAN], dtype=torch.float64)
    found, wanted = phi_by(backend, ends, "ones", activation), exact(ends)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-20, equal_nan=True)
    found = phi_by(backend, ends[:6], "derivative", activation)
    torch.testing.assert_close(found, wanted[:6] * exact.derivative(ends[:6]), rtol=1e-6, atol=1e-5, equal_nan=True)


def test_scan_by_an_activation_that_no_kernel_knows_runs_on_torch(blocks):
    h, scale, _ = keys(2, 40, 12, torch.float32, "cpu")
    gram = scan.Gram(h, scale, False, torch.ones(2, 40, dtype=torch.bool))
    start, fused = torch.randn(2, 40, 50), halves(SILU, IDENTITY)

    def value(a, t0, t1):
        return 0.1 * fused(a)

    found = scan.scan(start, gram, value, scan.Known("ones", fused.name, 0.1))
    assert not blocks
    for f, w in zip(found, scan.scan_sequential(start, gram, value), strict=True):
        close(f, w, 2e-6)
    with pytest.raises(ValueError, match=r"no kernel knows the activation 'silu\|identity'"):
        values.kernel_of("ones", fused.name)


def test_scan_takes_what_broadcasts_and_a_rule_that_was_replaced(blocks, monkeypatch):
    h, scale, k = keys(2, 20, 12, torch.float32, "cpu")
    gram = scan.Gram(h, scale, False, torch.ones(2, 20, dtype=torch.bool))
    start, options = torch.randn(2, 20, 50), ("slow_ones", "silu", 0.3, 0.2, 0.05)
    for frozen in (torch.randn(2, 20, 1), torch.randn(1, 20, 50), torch.randn(2, 1, 50)):
        forms = both_forms(*options, k.norm(dim=-1)[:1], frozen)
        value, _ = both_forms(*options, k.norm(dim=-1)[:1], frozen.expand(2, 20, 50))
        wanted = scan.scan_sequential(start, gram, value)
        for found, exact in zip(scan.scan(start, gram, *forms), wanted, strict=True):
            close(found, exact, 2e-6)
    blocks.clear()
    monkeypatch.setitem(values.KERNELS, "ones", values.Kernel(None))
    two = scan.scan(start, gram, lambda a, t0, t1: a * 0 + 2, scan.Known("ones"))[1]
    assert torch.equal(two, torch.full_like(start, 2.0))
    assert not blocks


@pytest.fixture
def blocks(monkeypatch):
    """Blocks that C has solved."""
    made = []
    real = scan.ScanArguments
    monkeypatch.setattr(scan, "ScanArguments", lambda *args: made.append(args) or real(*args))
    return made


def keys(B, T, I, dtype=torch.float64, device=DEVICE):
    """h, scale and k = scale · h."""
    h = torch.randn(B, T, I, dtype=dtype, device=device)
    scale = 1 / h.square().sum(-1)
    return h, scale, h * scale[..., None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_padding_holds_anything(backend):
    h, scale, _ = keys(2, 20, 12, torch.float32)
    a = torch.randn(2, 20, 6, device=DEVICE)
    write = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    write[1, 9:] = False
    forms = both_forms("ones", "silu", 0.3)
    wanted = scan.scan(a, scan.Gram(h, scale, False, write), *forms, backend)
    h[1, 9:], scale[1, 9:], a[1, 9:] = NAN, NAN, NAN
    found = scan.scan(a, scan.Gram(h, scale, False, write), *forms, backend)
    for f, w in zip(found, wanted, strict=True):
        close(f[0], w[0], 0)
        close(f[1, :9], w[1, :9], 0)
    assert not found[1][1, 9:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_nan_goes_forward_in_its_own_neuron_only(backend):
    h, scale, _ = keys(1, 40, 12, torch.float32)
    a = torch.randn(1, 40, 6, device=DEVICE)
    gram = scan.Gram(h, scale, False, torch.ones(1, 40, dtype=torch.bool, device=DEVICE))
    forms = both_forms("ones", "silu", 0.3)
    clean = scan.scan(a, gram, *forms, backend)
    a[0, 21, 3] = NAN
    wanted = torch.zeros(1, 40, 6, dtype=torch.bool)
    wanted[0, 21:, 3] = True
    for found, before in zip(scan.scan(a, gram, *forms, backend), clean, strict=True):
        assert torch.equal(found.isnan().cpu(), wanted)
        close(found.cpu()[~wanted], before.cpu()[~wanted], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "value",
    [
        lambda a, t0, t1: 0.9 * a.sign(),  # jumps
        lambda a, t0, t1: 0.5 * (a > 0.3) * a,
        lambda a, t0, t1: 3.0 * a,  # grows by a factor of up to 4 a token
        lambda a, t0, t1: 1.0 - a,  # sweeps grow before they are exact
        lambda a, t0, t1: 1.9 * (0.5 - a),
    ],
)
@pytest.mark.parametrize("repeated", [False, True])
def test_scan_sweeps_are_exact_for_any_rule(value, repeated, dtype):
    h, scale, _ = keys(2, 150, 24)
    if repeated:  # every token has nearly the same key
        h = h[:, :1] + 1e-3 * h
        scale = 1 / h.square().sum(-1)
    gram = scan.Gram(h.to(dtype), scale.to(dtype), False, torch.rand(2, 150) > 0.2)
    a = torch.randn(2, 150, 5, dtype=torch.float64, device=DEVICE).to(dtype)
    found, wanted = scan.scan_chunked(a, gram, value), scan.scan_sequential(a, gram, value)
    for f, w in zip(found, wanted, strict=True):
        # a sign near 0 may differ where rounding does; it must be the same in at least nearly every neuron
        scale = w.abs().cummax(1).values.clamp(min=1)
        wrong = ((f - w).abs() / scale).amax(1) > (1e-4 if dtype == torch.float32 else 1e-11)
        assert wrong.sum() <= (1 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("height", [128, 256, 512])
def test_gram_is_what_it_says_kept_or_not_and_at_any_height(height, width, monkeypatch):
    h, scale, k = keys(2, 300, 8)
    write = torch.rand(2, 300) > 0.3
    wanted = torch.zeros(2, 300, 300, dtype=torch.float64)
    for b in range(2):
        seen = [int(write[b, : t - t % width].sum()) for t in range(300)]
        for t in range(300):
            for s in range(t - t % width):
                if write[b, s]:
                    events = seen[t] - int(write[b, : s + 1].sum())
                    wanted[b, t, s] = 0.9 ** max(0, events) * scale[b, s]
    wanted *= h.cpu() @ h.cpu().mT + 1
    for keep in (gram.KEEP, 0):
        monkeypatch.setattr(gram, "KEEP", keep)
        one = gram.Gram(h, scale, True, write, 0.1, width)
        one.height = height
        for t0, t1 in ((0, 128), (128, 256), (256, 300), (128, 256)):
            close(one.rows(t0, t1), wanted[:, t0:t1, :t1], 1e-13)
        again = [one.rows(128, 256) for _ in range(2)]
        assert (again[0].data_ptr() == again[1].data_ptr()) == (keep > 0 or height > 128)
    plain = gram.Gram(h[:1], scale[:1], False, torch.ones(1, 300, dtype=torch.bool))
    close(plain.rows(128, 256), (h[:1, 128:256] @ k[:1, :256].mT).tril(127), 1e-13)


@pytest.mark.skipif(not ON_GPU, reason="on a CPU it is a product of float32")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gram_of_half_precision_has_its_numbers_as_they_are(dtype):
    h = torch.randn(2, 300, 128, device=DEVICE).to(dtype)
    scale, write = 1 / h.float().square().sum(-1), torch.rand(2, 300) > 0.3
    half, exact = (gram.Gram(x, scale.to(y), True, write) for x, y in ((h, torch.float32), (h.double(), torch.float64)))
    assert half.h.dtype == dtype
    close(half.rows(128, 256), exact.rows(128, 256), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 130, 300])
def test_scan_of_every_option_is_one_token_after_the_other(T, backend):
    """Rates per row, clip, frozen values, gaps, decay, bias; half precision goes in and comes out as it is."""
    h, scale, k = keys(2, T, 24)
    write, rate, O = torch.rand(2, T) > 0.2, (0.05, 0.3), 36 if T < 100 else 20  # the interpreter is slow
    start, frozen = (torch.randn(2, T, O, dtype=torch.float64, device=DEVICE) for _ in range(2))

    def by(dtype, rule, given=None):
        given = dtype if given is None else given
        options = (rule, "silu", rate, 0.7, 0.2, k.norm(dim=-1).to(dtype), frozen.to(given), frozen.flip(1).to(dtype))
        value, known = both_forms(*options)
        gram = scan.Gram(h.half().to(dtype), scale.to(dtype), True, write, 0.05)
        return start.half().to(given), gram, value, known

    cases = [("slow_derivative", torch.float32), ("delta", torch.float32), ("ones", torch.float16)]
    for rule, given in cases if T < 100 else cases[::2]:
        a64, gram, value, _ = by(torch.float64, rule)
        wanted = scan.scan_sequential(a64, gram, value)
        given = given if backend == "triton" else torch.float32
        a, u = scan.scan(*by(torch.float32, rule, given), backend)
        assert (a.dtype, u.dtype) == (given, torch.float32)
        assert u.is_contiguous()
        close(a, wanted[0], 1e-3 if given == torch.float16 else 2e-6)
        close(u, wanted[1], 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 6, 50])
def test_scan_of_rows_that_share_their_weights(columns, backend):
    """Three tokens side by side do not see each other."""
    T = 3 * columns
    h, scale, k = keys(1, T, 24)
    write, start = torch.rand(1, T) > 0.2, torch.randn(1, T, 36, dtype=torch.float64, device=DEVICE)
    target = torch.randn(1, T, 36, dtype=torch.float64, device=DEVICE)

    def by(dtype):
        forms = both_forms("delta", "identity", 0.2, 1.0, 0.3, k.norm(dim=-1).to(dtype), None, target.to(dtype))
        return start.to(dtype), scan.Gram(h.to(dtype), scale.to(dtype), True, write, 0.05, 3), *forms

    wanted = scan.scan_sequential(*by(torch.float64)[:3])
    for found, exact in zip(scan.scan(*by(torch.float32), backend), wanted, strict=True):
        close(found, exact, 2e-6)


def test_triton_refuses_float64():
    h, scale, _ = keys(1, 4, 3)
    gram = scan.Gram(h, scale, False, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="computes in float32, but got float64"):
        scan.scan(torch.ones(1, 4, 2, device=DEVICE), gram, *both_forms("ones"), "triton")
    with pytest.raises(ValueError, match="computes in float32, but got float64"):
        read.read(h, *factors(1, 2, 3, 2, torch.float64), torch.ones(1, 2, device=DEVICE), "triton")


def test_scan_of_a_rule_without_twin_says_so():
    h, scale, _ = keys(1, 4, 3)
    gram = scan.Gram(h, scale, False, torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no Triton twin"):
        scan.scan(torch.ones(1, 4, 2), gram, lambda a, t0, t1: a, backend="triton")
    with pytest.raises(ValueError, match=r"rule 'mine' has no Triton twin; there are ones"):
        values.kernel_of("mine", "silu")
    with pytest.raises(ValueError, match=r"knows the activation 'relu'; there are identity, silu, gelu, gelu_tanh"):
        values.kernel_of("ones", "relu")


@pytest.mark.parametrize("backend", BACKENDS)
# one is enough for the slow interpreter: both are cast to float32 at once
@pytest.mark.parametrize("dtype", [torch.bfloat16] if INTERPRETED else [torch.float16, torch.bfloat16])
def test_scan_drift_over_512_tokens(backend, dtype):
    """Half-precision weights and inputs; what is computed from them stays in float32, so nothing drifts."""
    write = torch.rand(1, 512) > 0.1
    tolerance = max(1e-4, TF32) if backend == "triton" else 1e-4
    scan_case(backend, dtype, 1, 512, 3, 16, 2, "slow_derivative", 1, write, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_of_ones_own(backend, monkeypatch):
    monkeypatch.setitem(values.KERNELS, "square", values.Kernel(_square_triton))
    h, scale, _ = keys(1, 20, 12, torch.float32)
    gram = scan.Gram(h, scale, False, torch.ones(1, 20, dtype=torch.bool))
    a = torch.randn(1, 20, 6, device=DEVICE)

    def value(a, t0, t1):
        return 0.1 * (0.7 - a * a)

    known = scan.Known("square", "silu", 0.1, 0.7)
    for found, wanted in zip(
        scan.scan(a, gram, value, known, backend), scan.scan_sequential(a, gram, value), strict=True
    ):
        close(found, wanted, 1e-6)


@values.jit
def _square_triton(a, frozen_a, target, gamma, PHI):
    return gamma - a * a


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="the Triton kernels run in this very process")
def test_triton_interpreted():
    run_interpreted(__file__, "-k", "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sweep_has_settled_when_no_neuron_changes_and_never_with_nan_or_infinity(dtype):
    old = torch.randn(1, 32, 131, dtype=dtype)
    new, tolerance = old.clone(), 1e-6
    assert scan._settled(new, old, tolerance)
    for o in (0, 63, 64, 130):
        largest = float(old[0, :, o].abs().max())
        for change, settled in ((0.9e-6 * largest, True), (1.1e-6 * largest, False)):
            new = old.clone()
            new[0, 31, o] += change
            exact = float((new[0, 31, o] - old[0, 31, o]).abs()) <= tolerance * float(new[0, :, o].abs().max())
            assert scan._settled(new, old, tolerance) == exact
            assert dtype == torch.float32 or exact == settled
        for bad in (float("nan"), float("inf")):
            new = old.clone()
            new[0, 5, o] = bad
            assert not scan._settled(new, old, tolerance)
    zero = torch.zeros(1, 4, 8, dtype=dtype)
    assert scan._settled(zero, zero, 0.0)
