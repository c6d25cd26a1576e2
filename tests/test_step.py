"""The kernels of one token of each row against float64 references written here: products, attention, the plastic MLP.

Without a GPU the Triton kernels run interpreted, in a process of their own, as in test_kernels.
"""

import warnings

import pytest
import torch
import triton.language as tl  # noqa: F401  the interpreter looks for it in the module of every kernel
from interpreted import nan_filled_outputs, run_interpreted  # noqa: F401
from rule_forms import step_rule
from test_kernels import BACKENDS, DEVICE, INTERPRETED, NAN, RULES, close, factors, oracle, phi, variant

from fastweights.kernels import place, products, query, step
from fastweights.kernels.products import Frozen, Norm
from fastweights.state.slots import Slots

ON_GPU = torch.cuda.is_available() and not INTERPRETED
warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
# float16 outputs are rounded once; of several rows, h and the frozen products are rounded too
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.float64: 1e-12}
DTYPES = [torch.float32, torch.float16, torch.float64]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def stream(*shape, dtype):
    """A residual stream: float32 for half precision."""
    return random(*shape, dtype=torch.promote_types(dtype, torch.float32))


def exact_norm(x_BD, norm):
    x = x_BD.double().cpu()
    return norm.weight_D.double().cpu() * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


# ---- products


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("number", "rows"), list(enumerate([1, 1, 1, 2, 5, 17, 64])))
def test_projections_of_a_norm_and_additions_to_the_stream(backend, number, rows):
    dtype = [torch.float32, torch.float16][number % 2]
    D, outputs = [(129, (21, 6, 7)), (48, (64,)), (256, (33, 2))][number % 3]
    x, norm = stream(rows, D, dtype=dtype) * 3, Norm(1 + random(D, dtype=dtype) / 9, 1e-2)
    linears = [
        Frozen(random(O, D, dtype=dtype) / D**0.5, random(O, dtype=dtype) if n != 1 else None)
        for n, O in enumerate(outputs)
    ]
    kept, h = x.clone(), exact_norm(x, norm)
    exact = [h @ W.double().cpu().T + (0 if b is None else b.double().cpu()) for W, b in linears]
    for out in (dtype, torch.float32):
        found = products.project(x, norm, linears, out, backend)
        assert found.dtype == out
        close(found, torch.cat(exact, 1), TOLERANCE[dtype])
    assert torch.equal(x, kept)
    z, back = random(rows, outputs[0], dtype=dtype), Frozen(random(D, outputs[0], dtype=dtype), random(D, dtype=dtype))
    products.add_project_(x, z, back, backend)
    close(
        x,
        kept.double().cpu() + z.double().cpu() @ back.W_OI.double().cpu().T + back.b_O.double().cpu(),
        TOLERANCE[dtype],
    )


# ---- attention of one token


def exact_attention(qkv, position, K, V, heads, theta, oldest):
    """Token by token and head by head; K and V [KH, places, E] hold the tokens before, of which `oldest` is seen."""
    KH, _, E = K.shape
    q, k, v = (x.view(-1, E).double() for x in qkv.double().split([heads * E, KH * E, KH * E]))
    angle = position * theta

    def turned(x):
        a, b = x[:, : E // 2], x[:, E // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)

    q, k = turned(q), turned(k)
    z = torch.zeros(heads, E, dtype=torch.float64)
    for head in range(heads):
        kv = head * KH // heads
        keys = torch.cat((K[kv, oldest:position].double(), k[kv : kv + 1]))
        values = torch.cat((V[kv, oldest:position].double(), v[kv : kv + 1]))
        z[head] = (keys @ q[head] / E**0.5).softmax(0) @ values
    return z.flatten(), k, v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "E", "parts", "dtype", "window"),
    [
        (4, 2, 8, 1, torch.float32, None),
        (3, 3, 96, 4, torch.float32, None),
        (8, 1, 64, 3, torch.float16, None),
        (2, 2, 10, 2, torch.float32, None),
        (20, 1, 16, 5, torch.float16, None),
        (4, 2, 8, 3, torch.float32, 1),
        (4, 2, 8, 3, torch.float32, 32),
        (6, 2, 16, 3, torch.float16, 33),
        (4, 2, 8, 3, torch.float32, 70),
        (4, 2, 8, 3, torch.float32, 500),
    ],
)
def test_attention_of_one_token_of_each_row(backend, heads, kv_heads, E, parts, dtype, window, monkeypatch):
    """Rows at their own places, in several programs a KV head; one row is padding and stores into the last place."""
    position, end, places = [0, 1, 31, 32, 33, 100, 0], 101, 131
    B = len(position)
    monkeypatch.setattr(query, "KEYS", 32)
    monkeypatch.setattr(query, "PROGRAMS", parts * B * kv_heads)
    K, V = random(B, kv_heads, places, E, dtype=dtype), random(B, kv_heads, places, E, dtype=dtype)
    oldest = [max(0, at + 1 - (window or end)) for at in position]
    for b, (first, at) in enumerate(zip(oldest, position, strict=True)):  # nothing around a row's window is looked at
        K[b, :, :first], V[b, :, :first] = NAN if backend == "triton" else 0, NAN if backend == "triton" else 0
        K[b, :, at:], V[b, :, at:] = NAN if backend == "triton" else 0, NAN if backend == "triton" else 0
    theta = 10000.0 ** -(torch.arange(0, E, 2, dtype=torch.float64) / E)
    angle = torch.arange(places)[:, None] * theta
    stored_at = torch.tensor([*position[:-1], places - 1])
    where = query.Where(torch.tensor(position), stored_at, angle.cos().to(dtype), angle.sin().to(dtype))
    where = query.Where(*(x.to(DEVICE).contiguous() for x in where))
    arrived = torch.zeros(B, kv_heads, dtype=torch.int32, device=DEVICE)
    qkv, kept = random(B, (heads + 2 * kv_heads) * E, dtype=dtype), (K.clone(), V.clone())
    for _ in range(2):  # the second time over its own leavings
        z = query.attend_(qkv, where, K, V, heads, end, arrived, backend, window)
        assert z.dtype == dtype
        assert not arrived.any()
        for b in range(B):
            before = kept[0][b].cpu(), kept[1][b].cpu()
            exact, k, v = exact_attention(qkv[b].cpu(), position[b], *before, heads, theta, oldest[b])
            close(z[b], exact, TOLERANCE[dtype])
            close(K[b, :, stored_at[b]], k, TOLERANCE[dtype])
            close(V[b, :, stored_at[b]], v, 0)
            K[b, :, stored_at[b]], V[b, :, stored_at[b]] = kept[0][b, :, stored_at[b]], kept[1][b, :, stored_at[b]]
    for found, before in zip((K, V), kept, strict=True):
        torch.testing.assert_close(found, before, rtol=0, atol=0, equal_nan=True)


def test_keys_are_shared_so_that_programs_are_many_and_none_is_idle(monkeypatch):
    for end in (1, 63, 64, 256, 1024, 8192, 131072):
        for pairs in (1, 8, 64, 512):
            per = query.keys_per_program(end, pairs)
            parts = -(-end // per)
            assert per % query.KEYS == 0
            assert (parts - 1) * per < end <= parts * per
            assert parts == 1 or parts * pairs <= query.PROGRAMS
    assert query.keys_per_program(256, 8) == 64
    assert query.keys_per_program(8192, 8) == 256


# ---- the plastic MLP


def plastic(W, bias, log, w, slot, event, write, rate, known, gamma=None, target=None, bad=None):
    bad = torch.zeros_like(slot, dtype=torch.int32) if bad is None else bad
    inputs = step.StepInputs(event, slot, w, write, rate, rate if gamma is None else gamma, target, bad)
    return step.StepLinear(Frozen(W, bias), step.Plastic(step.Factors(*log), inputs, known))


def step_case(backend, dtype, B, T, O, I, R, rule, number, write, tolerance, which="down"):
    """T tokens at down, or at gate and up of which those in `which` are plastic; a ring of R slots for each."""
    decay, clip, mu, fast_bias, _ = variant(number)
    work = torch.promote_types(dtype, torch.float32)
    names = ["down"] if which == "down" else ["gate", "up"]
    phis = {"gate": "silu", "up": "identity", "down": "identity"}
    W = {name: random(O, I, dtype=dtype) for name in names}
    bias = {name: random(O, dtype=dtype) if name != "up" else None for name in names}
    target = {name: random(B, T, O, dtype=dtype) for name in names}
    rate = {name: torch.rand(B, device=DEVICE, dtype=work) * 0.5 for name in names}
    p0 = {name: torch.tensor(0.2 + n, device=DEVICE, dtype=work) for n, name in enumerate(names)}
    norm, x = Norm(1 + random(I, dtype=dtype) / 9, 1e-2), stream(B, T, I if which != "down" else O, dtype=dtype)
    h = random(B, T, I, dtype=dtype) / I**0.5 + 0.1 if which == "down" else exact_norm(x, norm)
    logs = {}
    for name in names:
        U = torch.full((B, R, O), NAN, dtype=work, device=DEVICE)
        K = torch.full((B, R, I), NAN, dtype=work, device=DEVICE)
        keys = torch.full((B, R), NAN, dtype=work, device=DEVICE) if fast_bias else None
        logs[name] = [U, K, keys, torch.full((B, R), -1, device=DEVICE)]
    n, out = torch.zeros(B, dtype=torch.int64, device=DEVICE), []
    for t in range(T):
        linears = []
        for name in names:
            age = n[:, None] - 1 - logs[name][3]
            w = torch.where(logs[name][3] >= 0, (1 - decay) ** age.to(work), 0)
            known = step_rule(rule, phis[name], mu, clip)
            turn = (w, n % R, n, write[:, t].contiguous().to(DEVICE), rate[name], known, p0[name], target[name][:, t])
            linear = plastic(W[name], bias[name], logs[name], *turn)
            linears.append(linear if name in which else linear._replace(plastic=None))
        x_BD = x[:, t].contiguous()
        if which == "down":
            after = x_BD.clone()
            step.down_(after, h[:, t].contiguous(), linears[0], backend)
            out.append(after - x_BD)
        else:
            out.append(step.gate_up(x_BD, norm, *linears, backend))
            assert out[-1].dtype == dtype
        n += write[:, t].to(DEVICE)
    out = torch.stack(out, 1)
    for b in range(B):
        a = {}
        for name in names:
            events, options = [], (mu, decay, clip, fast_bias)
            rest = (float(rate[name][b]), float(p0[name]), target[name][b], rule, phis[name], *options)
            writes = write[b] if name in which else torch.zeros_like(write[b])
            a[name], _ = oracle(h[b], W[name], bias[name], events, 0, R, writes, *rest)
            U, K, keys, birth = logs[name]
            for born, u, k, s in events:
                slot = born % R
                assert birth[b, slot] == born
                close(U[b, slot], u, tolerance)
                close(K[b, slot], k, tolerance)
                if fast_bias:
                    close(keys[b, slot], torch.as_tensor(s), tolerance)
            unwritten = birth[b] < 0
            assert unwritten.sum() == R - len(events)
            assert U[b, unwritten].isnan().all()
            assert K[b, unwritten].isnan().all()
        close(out[b], a["down"] if which == "down" else phi(a["gate"], "silu") * a["up"], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["down", "gate, up"])
@pytest.mark.parametrize(("number", "rule"), list(enumerate(RULES)))
def test_reading_and_writing_by_every_rule(backend, rule, number, which):
    B, O, I, R = [(1, 5, 32, 2), (2, 17, 60, 8), (3, 9, 129, 16), (5, 37, 20, 3)][number % 4]
    T = 4 if R < 4 else 2  # the small ones go around their ring
    dtype = [torch.float32, torch.float16][number % 2]
    step_case(backend, dtype, B, T, O, I, R, rule, number, torch.rand(B, T) > 0.25, TOLERANCE[dtype], which)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["gate", "up", "neither"])
@pytest.mark.parametrize("B", [1, 3])
def test_gate_or_up_may_be_frozen(backend, which, B):
    step_case(backend, torch.float32, B, 3, 9, 40, 2, "derivative", 1, torch.ones(B, 3, dtype=torch.bool), 2e-5, which)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("B", "O", "I", "R"), [(1, 64, 300, 4), (2, 100, 60, 40), (3, 257, 129, 16)])
@pytest.mark.parametrize("which", ["down", "gate, up"])
def test_ragged_grids(backend, B, O, I, R, which):
    write = torch.ones(B, 2, dtype=torch.bool)
    step_case(backend, torch.float32, B, 2, O, I, R, "derivative", B, write, 2e-5, which)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["down", "gate, up"])
@pytest.mark.parametrize(("number", "rule"), list(enumerate(RULES * 3)))
def test_options(dtype, rule, number, which):
    number += number // len(RULES)
    step_case("torch", dtype, 2, 12, 10, 12, 5, rule, number, torch.rand(2, 12) > 0.25, TOLERANCE[dtype], which)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_writes_nothing_changes_nothing(backend):
    step_case(backend, torch.float32, 2, 2, 10, 12, 3, "ones", 1, torch.zeros(2, 2, dtype=torch.bool), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_drift(backend, dtype):
    """The factors are float32, so after hundreds of events the error is still that of one product's rounding."""
    T, R, O = (512, 512, 5) if backend == "torch" or ON_GPU else (24, 4, 3)  # the interpreter is slow
    # bfloat16 has 8 bits: 2⁻⁸ for the product and 2⁻⁸ for the output
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
    step_case(backend, dtype, 1, T, O, 16, R, "slow_derivative", 2, torch.rand(1, T) > 0.1, tolerance)


def test_what_does_not_fit_is_refused():
    h, W, x = random(2, 6), random(5, 6), random(2, 5)
    U, K, _ = factors(2, 3, 6, 5)
    birth, w = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    slot, write = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.ones(2, dtype=torch.bool, device=DEVICE)
    rate, log = torch.tensor(0.1, device=DEVICE), (U, K, None, birth)
    known = step_rule("ones", "identity", 0.0)
    with pytest.raises(ValueError, match=r"got w for \[rows, slots\] \[2, 2\], expected \[2, 3\]"):
        step.down_(x, h, plastic(W, None, log, w[:, :2], slot, slot, write, rate, known))
    with pytest.raises(ValueError, match=r"write of torch.int64, expected bool"):
        step.down_(x, h, plastic(W, None, log, w, slot, slot, slot, rate, known))
    with pytest.raises(ValueError, match=r"got bad of torch.int64 \[2\], expected torch.int32 \[2\]"):
        step.down_(x, h, plastic(W, None, log, w, slot, slot, write, rate, known, bad=slot))
    linear = plastic(W, None, log, w, slot, slot, write, rate, step_rule("delta", "identity", 0.0))
    with pytest.raises(ValueError, match=r"by rule 'delta' needs a target, got None"):
        step.down_(x, h, linear, "triton")
    with pytest.raises(ValueError, match=r"backend 'numpy', expected \"torch\" or \"triton\""):
        step.down_(x, h, linear, "numpy")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_rows_whose_event_is_not_finite_are_noted(backend, gated):
    """Rows: fine, NaN input, infinite value alone (a large rate), NaN but not written, NaN but no such slot."""
    B, O, I, R = 5, 7, 6, 3
    h = random(B, I) / I**0.5 + 0.1
    W, birth, w = (
        random(O, I) * 100,
        torch.zeros(B, R, dtype=torch.int64, device=DEVICE),
        torch.ones(B, R, device=DEVICE),
    )
    h[[1, 3, 4], 2] = NAN
    rate = torch.tensor([0.1, 0.1, 3e38, 0.1, 0.1], device=DEVICE)
    slot, write = torch.tensor([0, 1, 2, 1, R], device=DEVICE), torch.tensor([True, True, True, False, True]).to(DEVICE)
    linears, bads = [], [torch.zeros(B, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    for bad, phi_name in zip(bads, ("silu" if gated else "identity", "identity"), strict=True):
        U, K, keys = factors(B, R, I, O)
        known = step_rule("ones", phi_name, 0.1)
        linears.append(plastic(W, None, (U, K, keys, birth.clone()), w, slot, slot, write, rate, known, bad=bad))
    if gated:
        step.gate_up(h, Norm(torch.ones(I, device=DEVICE), 1e-6), *linears, backend)
        assert bads[1].tolist() == [0, 1, 1, 0, 0]
        with pytest.raises(ValueError, match="expected keys of its own for each linear"):
            step.gate_up(h, Norm(torch.ones(I, device=DEVICE), 1e-6), linears[0], linears[0], backend)
    else:
        step.down_(random(B, O), h, linears[0], backend)
    assert bads[0].tolist() == [0, 1, 1, 0, 0]
    assert linears[0].plastic.factors.K_BRI[2].isfinite().all()


# ---- where events go


@pytest.mark.parametrize("overflow", ["grow", "evict", "compress"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
@pytest.mark.skipif("triton" not in BACKENDS, reason="test_the_step_interpreted runs it")
def test_triton_places_events_as_the_log_does(overflow, decay):
    from fastweights.engine.cuda import _turns
    from fastweights.state import EventLog

    log = EventLog("x", 3, 2, 2, 4, overflow, decay, torch.float32, torch.device(DEVICE))
    assert isinstance(log.slots, Slots)
    for n in range(40 if overflow != "grow" else 4):
        event = torch.tensor([n, max(0, n - 1), n], device=DEVICE)
        slot, w = torch.full_like(event, -7), torch.full((3, log.capacity), NAN, device=DEVICE)
        place.launch_place(event, log.birth_BR, _turns(log), slot, w)
        assert torch.equal(slot, log.slots.slot(event))
        torch.testing.assert_close(w, log.slot_weights(event[:, None], log.capacity)[:, 0], rtol=1e-6, atol=1e-40)
        log.birth_BR[torch.arange(3), slot] = event


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason="the Triton kernels run in this very process")
def test_the_step_interpreted():
    run_interpreted(__file__, "-k", "triton")
