"""step: one token at one plastic linear, for a batch of rows, in place and fused.

    a = W h + b + Σ_j w_j (k_j·h + kb_j) u_j                    read, before this token's own write
    k = h / (‖h‖² + mu),   u = rate · value(a), clipped         write, into slot `slot` where `write`

and the pair gate_proj, up_proj with SiLU·up behind it: out = silu(a_gate) ⊙ a_up, whose logs have slots, weights and
rule in common. Two launches each. Whatever changes between tokens (weights, slots, rates, the mask) is a tensor, so a
captured graph stays good. A slot outside 0:R writes nothing. `bad` [B] becomes 1 where what was written is not
finite, so that nobody has to look, and wait for the device, after every linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .read import reference as read_reference
from .values import FUSED, clipped, clipped_triton, jit, per_row, require_triton, tl, triton, twin

GEMV_ROWS = 4  # more rows than this: the frozen product by torch's GEMM, the rest fused behind it


def _keys(h_BI: Tensor, mu: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """k, the bias key 1 / (‖h‖² + mu), and ‖k‖; mu None: k = h."""
    square_B = h_BI.square().sum(-1)
    scale_B = torch.ones_like(square_B) if mu is None else 1 / (square_B + mu)
    return h_BI * scale_B[:, None], scale_B, square_B.sqrt() * scale_B


def _put(slot_B: Tensor, write_B: Tensor, *changes: tuple[Tensor | None, Tensor]) -> None:
    """buffer[b, slot[b]] = new[b] in every row that is written, for (buffer [B, R, ...], new [B, ...])."""
    R = next(buffer.shape[1] for buffer, _ in changes if buffer is not None)
    if slot_B.is_cpu and not torch.compiler.is_compiling():
        rows = zip(slot_B.tolist(), write_B.tolist(), strict=True)
        for b, slot in [(b, slot) for b, (slot, write) in enumerate(rows) if write and 0 <= slot < R]:
            for buffer, new in changes:
                if buffer is not None:
                    buffer[b, slot] = new[b]
        return
    # without looking at the mask from Python: that would wait for the device
    write_B = write_B & (slot_B >= 0) & (slot_B < R)
    row, slot_B = torch.arange(len(slot_B), device=slot_B.device), slot_B.clamp(0, R - 1)
    for buffer, new in changes:
        if buffer is not None:
            old = buffer[row, slot_B]
            mask = write_B.view(-1, *[1] * (old.dim() - 1))
            buffer[row, slot_B] = torch.where(mask, new.to(buffer.dtype), old)


def _note(bad_B: Tensor, slot_B: Tensor, write_B: Tensor, R: int, *written: Tensor) -> None:
    """bad[b] = 1 in every row that has written something not finite."""
    bad = ~torch.stack([x.isfinite().flatten(1).all(1) for x in written]).all(0)
    bad_B.masked_fill_(bad & write_B & (slot_B >= 0) & (slot_B < R), 1)


def _linear(h, weight, bias, U, K, kb, w, rate, p0, target, norm, rule, phi, clip):
    """a of one linear in the factors' dtype, and the value of its event."""
    frozen = F.linear(h, weight, bias).to(U.dtype)
    a = frozen + read_reference(h[:, None], U, K, kb, w)[:, 0]
    rate, p0 = (per_row(x, len(h), a)[:, None] for x in (rate, p0))
    return a, clipped(rate * twin(rule).torch(a, frozen, target, p0, phi), clip, norm[:, None])


def reference(
    h, weight, bias, U, K, kb, birth, w, slot, event, write, rate, p0, target, bad, rule, activation, mu, clip
):  # fmt: skip
    k, scale, norm = _keys(h.to(K.dtype), mu)
    a, u = _linear(h, weight, bias, U, K, kb, w, rate, p0, target, norm, rule, activation, clip)
    _put(slot, write, (U, u), (K, k), (kb, scale), (birth, event))
    _note(bad, slot, write, K.shape[1], u, k)
    return a.to(h.dtype)


def reference_gated(
    h, weight, weight_up, bias, bias_up, U, U_up, K, K_up, kb, kb_up, birth, birth_up, w, slot, event, write, rate,
    rate_up, p0, p0_up, target, target_up, bad, bad_up, rule, mu, clip,
):  # fmt: skip
    turn = (w, slot, event, write)
    gate = reference(h, weight, bias, U, K, kb, birth, *turn, rate, p0, target, bad, rule, "silu", mu, clip)
    up = reference(
        h, weight_up, bias_up, U_up, K_up, kb_up, birth_up, *turn, rate_up, p0_up, target_up, bad_up, rule, "identity",
        mu, clip,
    )  # fmt: skip
    return F.silu(gate) * up


# ---- Triton


@jit
def _coefficients(
    h_ptr, K_ptr, K2_ptr, kb_ptr, kb2_ptr, birth_ptr, birth2_ptr, w_ptr, slot_ptr, event_ptr, write_ptr, c_ptr,
    norm_ptr, bad_ptr, bad2_ptr, I, R, K_sb, K2_sb, kb_sb, kb2_sb, birth_sb, birth2_sb, w_sb, mu,
    PAIR: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """c [B, R] = w ⊙ (K h + kb) and norm [B] = ‖k‖; then this token's key into its slot. Of a PAIR, c is [2, B, R].

    One program per slot: who overwrites a slot is who read it before.
    """
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64)
    if PAIR:
        up = tl.program_id(2) == 1
        K_ptr, kb_ptr = tl.where(up, K2_ptr, K_ptr), tl.where(up, kb2_ptr, kb_ptr)
        birth_ptr, bad_ptr = tl.where(up, birth2_ptr, birth_ptr), tl.where(up, bad2_ptr, bad_ptr)
        K_sb, kb_sb, birth_sb = (
            tl.where(up, K2_sb, K_sb),
            tl.where(up, kb2_sb, kb_sb),
            tl.where(up, birth2_sb, birth_sb),
        )
        c_ptr += tl.program_id(2) * tl.num_programs(1).to(tl.int64) * R
    w = tl.load(w_ptr + b * w_sb + r)
    K_row = K_ptr + b * K_sb + r * I
    live = tl.where(w != 0, I, 0)  # a dead slot may hold anything
    dot = tl.full([BI], 0.0, tl.float32)
    square = tl.full([BI], 0.0, tl.float32)
    for i0 in range(0, I, BI):
        i = i0 + tl.arange(0, BI)
        h = tl.load(h_ptr + b * I + i, mask=i < I, other=0.0).to(tl.float32)
        K = tl.load(K_row + i, mask=i < live, other=0.0)
        dot += h * K
        square += h * h
    c = tl.sum(dot, 0)
    norm2 = tl.sum(square, 0)
    if BIAS:
        c += tl.load(kb_ptr + b * kb_sb + r, mask=w != 0, other=0.0)
    tl.store(c_ptr + b * R + r, tl.where(w != 0, c * w, 0.0))
    scale = norm2 * 0 + 1
    if NORMALISE:
        scale = 1 / (norm2 + mu)
    if r == 0:
        tl.store(norm_ptr + b, tl.sqrt(norm2) * scale)
    if (tl.load(write_ptr + b) != 0) & (tl.load(slot_ptr + b) == r):
        tl.debug_barrier()  # every thread has read its part of the old key
        for i0 in range(0, I, BI):
            i = i0 + tl.arange(0, BI)
            h = tl.load(h_ptr + b * I + i, mask=i < I, other=0.0).to(tl.float32)
            tl.store(K_row + i, h * scale, mask=i < I)
            tl.store(bad_ptr + b + i * 0, 1, mask=(i < I) & ~(tl.abs(h * scale) < float("inf")))
        if BIAS:
            tl.store(kb_ptr + b * kb_sb + r, scale)
        tl.store(birth_ptr + b * birth_sb + r, tl.load(event_ptr + b))


@jit
def _neurons(
    b, n, h_ptr, W_ptr, bias_ptr, frozen_ptr, U_ptr, c_ptr, w_ptr, norm_ptr, slot_ptr, write_ptr, rate_ptr,
    p0_ptr, target_ptr, bad_ptr, O, I, R, U_sb, w_sb, rate_sb, p0_sb, target_sb, clip,
    RULE: tl.constexpr, PHI: tl.constexpr, GEMV: tl.constexpr, HAS_BIAS: tl.constexpr, TARGET: tl.constexpr,
    CLIP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """a of neurons n [BN] of row b, float32; writes their values."""
    alive = n < O
    if GEMV:
        acc = tl.full([BN, BK], 0.0, tl.float32)
        for k0 in range(0, I, BK):
            k = k0 + tl.arange(0, BK)
            inside = k < I
            W = tl.load(W_ptr + n[:, None] * I + k[None, :], mask=alive[:, None] & inside[None, :], other=0.0)
            h = tl.load(h_ptr + b * I + k, mask=inside, other=0.0)
            acc += W.to(tl.float32) * h.to(tl.float32)[None, :]
        frozen = tl.sum(acc, 1)
        if HAS_BIAS:
            frozen += tl.load(bias_ptr + n, mask=alive, other=0.0).to(tl.float32)
    else:
        frozen = tl.load(frozen_ptr + b * O + n, mask=alive, other=0.0).to(tl.float32)
    fast = tl.full([BR, BN], 0.0, tl.float32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR).to(tl.int64)
        w = tl.load(w_ptr + b * w_sb + r, mask=r < R, other=0.0)
        c = tl.load(c_ptr + b * R + r, mask=r < R, other=0.0)
        # the mask keeps out what dead slots hold: 0 · NaN is NaN
        U = tl.load(U_ptr + b * U_sb + r[:, None] * O + n[None, :], mask=(w != 0)[:, None] & alive[None, :], other=0.0)
        fast += c[:, None] * U
    a = frozen + tl.sum(fast, 0)
    target = a
    if TARGET:
        target = tl.load(target_ptr + b * target_sb + n, mask=alive, other=0.0).to(tl.float32)
    u = tl.load(rate_ptr + b * rate_sb) * RULE(a, frozen, target, tl.load(p0_ptr + b * p0_sb), PHI)
    if CLIP:
        u = clipped_triton(u, clip, tl.load(norm_ptr + b))
    slot = tl.load(slot_ptr + b)
    end = tl.where((tl.load(write_ptr + b) != 0) & (slot >= 0) & (slot < R), O, 0)
    tl.debug_barrier()  # the slot may be one that was just read
    tl.store(U_ptr + b * U_sb + slot * O + n, u, mask=n < end)
    tl.store(bad_ptr + b + n * 0, 1, mask=(n < end) & ~(tl.abs(u) < float("inf")))
    return a


@jit
def _single(
    h_ptr, W_ptr, bias_ptr, frozen_ptr, U_ptr, c_ptr, w_ptr, norm_ptr, slot_ptr, write_ptr, rate_ptr, p0_ptr,
    target_ptr, bad_ptr, out_ptr, rows, O, I, R, U_sb, w_sb, rate_sb, p0_sb, target_sb, clip,
    RULE: tl.constexpr, PHI: tl.constexpr, GEMV: tl.constexpr, HAS_BIAS: tl.constexpr, TARGET: tl.constexpr,
    CLIP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows
    for b in range(first, first + rows):  # W stays in the L1 cache from row to row
        a = _neurons(
            b, n, h_ptr, W_ptr, bias_ptr, frozen_ptr, U_ptr, c_ptr, w_ptr, norm_ptr, slot_ptr, write_ptr,
            rate_ptr, p0_ptr, target_ptr, bad_ptr, O, I, R, U_sb, w_sb, rate_sb, p0_sb, target_sb, clip,
            RULE, PHI, GEMV, HAS_BIAS, TARGET, CLIP, BN, BK, BR,
        )  # fmt: skip
        tl.store(out_ptr + b * O + n, a.to(out_ptr.dtype.element_ty), mask=n < O)


@jit
def _gated(
    h_ptr, W_ptr, W2_ptr, bias_ptr, bias2_ptr, frozen_ptr, frozen2_ptr, U_ptr, U2_ptr, c_ptr, c2_ptr, w_ptr, norm_ptr,
    slot_ptr, write_ptr, rate_ptr, rate2_ptr, p0_ptr, p02_ptr, target_ptr, target2_ptr, bad_ptr, bad2_ptr, out_ptr,
    rows, O, I, R, U_sb, U2_sb, w_sb, rate_sb, rate2_sb, p0_sb, p02_sb, target_sb, target2_sb, clip,
    RULE: tl.constexpr, GEMV: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BIAS2: tl.constexpr, TARGET: tl.constexpr,
    CLIP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows
    for b in range(first, first + rows):
        gate = _neurons(
            b, n, h_ptr, W_ptr, bias_ptr, frozen_ptr, U_ptr, c_ptr, w_ptr, norm_ptr, slot_ptr, write_ptr,
            rate_ptr, p0_ptr, target_ptr, bad_ptr, O, I, R, U_sb, w_sb, rate_sb, p0_sb, target_sb, clip,
            RULE, "silu", GEMV, HAS_BIAS, TARGET, CLIP, BN, BK, BR,
        )  # fmt: skip
        up = _neurons(
            b, n, h_ptr, W2_ptr, bias2_ptr, frozen2_ptr, U2_ptr, c2_ptr, w_ptr, norm_ptr, slot_ptr, write_ptr,
            rate2_ptr, p02_ptr, target2_ptr, bad2_ptr, O, I, R, U2_sb, w_sb, rate2_sb, p02_sb, target2_sb, clip,
            RULE, "identity", GEMV, HAS_BIAS2, TARGET, CLIP, BN, BK, BR,
        )  # fmt: skip
        # each linear's output has the model's dtype, as when the two run one by one
        gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
        gate = (gate / (1 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + b * O + n, (gate * up).to(out_ptr.dtype.element_ty), mask=n < O)


def _launch_coefficients(h, w, slot, event, write, mu, logs):
    """c [len(logs), B, R] and norm [B]; logs: one or two of (U, K, kb, birth, bad)."""
    (U, K, kb, birth, bad), (U2, K2, kb2, birth2, bad2) = logs[0], logs[-1]
    require_triton(h, U, K, U2, K2)
    (B, I), R = h.shape, K.shape[1]
    c = torch.empty(len(logs), B, R, dtype=torch.float32, device=h.device)
    norm = torch.empty(B, dtype=torch.float32, device=h.device)
    kb, kb2 = (birth, birth2) if kb is None or kb2 is None else (kb, kb2)
    _coefficients[(R, B, len(logs))](
        h, K, K2, kb, kb2, birth, birth2, w, slot, event, write, c, norm, bad, bad2,
        I, R, K.stride(0), K2.stride(0), kb.stride(0), kb2.stride(0), birth.stride(0), birth2.stride(0), w.stride(0),
        float(mu or 0), PAIR=len(logs) == 2, NORMALISE=mu is not None, BIAS=logs[0][2] is not None,
        BI=min(1024, triton.next_power_of_2(I)), num_warps=4, **FUSED,
    )  # fmt: skip
    return c, norm


def _shape(B: int, O: int, I: int) -> tuple[bool, tuple[int, int], dict]:
    """Whether the kernel reads W itself, its grid, and its tile."""
    if B <= GEMV_ROWS:
        BK = min(2048, max(128, triton.next_power_of_2(I)))
        return True, (triton.cdiv(O, 2), 1), {"BN": 2, "BK": BK, "num_warps": 4}
    return False, (triton.cdiv(O, 64), B), {"BN": 64, "BK": 16, "num_warps": 2}


def _aligned(h, w, slot, event, write, target):
    h, slot, event, write = (x.contiguous() for x in (h, slot, event, write))
    target_sb = 0 if target is None or target.dim() == 1 or len(target) == 1 else target.stride(0)
    return h, w.float().contiguous(), slot.long(), event.long(), write.view(torch.uint8), target_sb


def launch(
    h, weight, bias, U, K, kb, birth, w, slot, event, write, rate, p0, target, bad, rule, activation, mu, clip
):  # fmt: skip
    (B, I), O, R = h.shape, len(weight), K.shape[1]
    h, w, slot, event, write, target_sb = _aligned(h, w, slot, event, write, target)
    rate, p0 = per_row(rate, B, U), per_row(p0, B, U)
    c, norm = _launch_coefficients(h, w, slot, event, write, mu, [(U, K, kb, birth, bad)])
    gemv, grid, tile = _shape(B, O, I)
    frozen = h if gemv else F.linear(h, weight, bias)
    out = torch.empty(B, O, dtype=h.dtype, device=h.device)
    _single[grid](
        h, weight, h if bias is None else bias, frozen, U, c, w, norm, slot, write, rate, p0,
        h if target is None else target, bad, out, B if gemv else 1, O, I, R, U.stride(0), w.stride(0),
        rate.stride(0), p0.stride(0), target_sb, float(clip or 0),
        RULE=twin(rule).triton, PHI=activation, GEMV=gemv, HAS_BIAS=bias is not None,
        TARGET=twin(rule).reads_target, CLIP=clip is not None, BR=32, **tile, **FUSED,
    )  # fmt: skip
    return out


def launch_gated(
    h, weight, weight_up, bias, bias_up, U, U_up, K, K_up, kb, kb_up, birth, birth_up, w, slot, event, write, rate,
    rate_up, p0, p0_up, target, target_up, bad, bad_up, rule, mu, clip,
):  # fmt: skip
    (B, I), O, R = h.shape, len(weight), K.shape[1]
    target2_sb = _aligned(h, w, slot, event, write, target_up)[-1]
    h, w, slot, event, write, target_sb = _aligned(h, w, slot, event, write, target)
    rate, rate_up, p0, p0_up = (per_row(x, B, U) for x in (rate, rate_up, p0, p0_up))
    logs = [(U, K, kb, birth, bad), (U_up, K_up, kb_up, birth_up, bad_up)]
    (c, c_up), norm = _launch_coefficients(h, w, slot, event, write, mu, logs)
    gemv, grid, tile = _shape(B, O, I)
    frozen = h if gemv else F.linear(h, weight, bias)
    frozen_up = h if gemv else F.linear(h, weight_up, bias_up)
    out = torch.empty(B, O, dtype=h.dtype, device=h.device)
    _gated[grid](
        h, weight, weight_up, h if bias is None else bias, h if bias_up is None else bias_up,
        frozen, frozen_up, U, U_up, c, c_up, w, norm, slot, write, rate, rate_up, p0, p0_up,
        h if target is None else target, h if target_up is None else target_up, bad, bad_up, out,
        B if gemv else 1, O, I, R, U.stride(0), U_up.stride(0), w.stride(0), rate.stride(0), rate_up.stride(0),
        p0.stride(0), p0_up.stride(0), target_sb, target2_sb, float(clip or 0),
        RULE=twin(rule).triton, GEMV=gemv, HAS_BIAS=bias is not None, HAS_BIAS2=bias_up is not None,
        TARGET=twin(rule).reads_target, CLIP=clip is not None, BR=32, **tile, **FUSED,
    )  # fmt: skip
    return out


# ---- as operators: live inside torch.compile and CUDA graphs


@torch.library.custom_op(
    "fastweights::step", mutates_args=("U", "K", "kb", "birth", "bad"), device_types="cuda"
)  # fmt: skip
def _op(
    h: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, K: Tensor, kb: Tensor | None, birth: Tensor,
    w: Tensor, slot: Tensor, event: Tensor, write: Tensor, rate: Tensor, p0: Tensor, target: Tensor | None,
    bad: Tensor, rule: str, activation: str, mu: float | None, clip: float | None,
) -> Tensor:  # fmt: skip
    return launch(
        h, weight, bias, U, K, kb, birth, w, slot, event, write, rate, p0, target, bad, rule, activation, mu, clip
    )  # fmt: skip


@torch.library.custom_op(
    "fastweights::step_gated",
    mutates_args=("U", "U_up", "K", "K_up", "kb", "kb_up", "birth", "birth_up", "bad", "bad_up"),
    device_types="cuda",
)
def _op_gated(
    h: Tensor, weight: Tensor, weight_up: Tensor, bias: Tensor | None, bias_up: Tensor | None,
    U: Tensor, U_up: Tensor, K: Tensor, K_up: Tensor, kb: Tensor | None, kb_up: Tensor | None, birth: Tensor,
    birth_up: Tensor, w: Tensor, slot: Tensor, event: Tensor, write: Tensor, rate: Tensor, rate_up: Tensor,
    p0: Tensor, p0_up: Tensor, target: Tensor | None, target_up: Tensor | None, bad: Tensor, bad_up: Tensor,
    rule: str, mu: float | None, clip: float | None,
) -> Tensor:  # fmt: skip
    return launch_gated(
        h, weight, weight_up, bias, bias_up, U, U_up, K, K_up, kb, kb_up, birth, birth_up, w, slot, event, write,
        rate, rate_up, p0, p0_up, target, target_up, bad, bad_up, rule, mu, clip,
    )  # fmt: skip


_op.register_kernel("cpu")(reference)
_op_gated.register_kernel("cpu")(reference_gated)


@_op.register_fake
def _(h, weight, *_):
    return h.new_empty(len(h), len(weight))


@_op_gated.register_fake
def _(h, weight, *_):
    return h.new_empty(len(h), len(weight))


# ---- the choosers


def _check(h, U, K, kb, birth, w, slot, event, write, bad, backend):
    B, R = len(h), K.shape[1]
    if R == 0:
        raise ValueError("step_() got factors with 0 slots, expected at least 1")
    found = {"U": U.shape[:2], "K": K.shape[:2], "birth": birth.shape, "w": w.shape}
    if kb is not None:
        found["kb"] = kb.shape
    for name, shape in found.items():
        if tuple(shape) != (B, R):
            raise ValueError(f"step_() got {name} for [rows, slots] {list(shape)}, expected {[B, R]}")
    for name, x in (("slot", slot), ("event", event), ("write", write)):
        if tuple(x.shape) != (B,):
            raise ValueError(f"step_() got {name} of shape {list(x.shape)}, expected {[B]}")
    if bad.shape != slot.shape or bad.dtype != torch.int32:
        raise ValueError(f"step_() got bad of {bad.dtype} {list(bad.shape)}, expected torch.int32 {[B]}")
    if write.dtype != torch.bool:
        raise ValueError(f"step_() got write of {write.dtype}, expected bool")
    for name, x in (("U", U), ("K", K), ("kb", kb), ("birth", birth)):
        if x is not None and (x.stride(-1) != 1 or (x.dim() == 3 and x.stride(1) != x.shape[2])):
            raise ValueError(f"step_() writes {name} in place: expected each row's slots to be contiguous")
    if backend not in ("torch", "triton"):
        raise ValueError(f'step_() got backend {backend!r}, expected "torch" or "triton"')


def step_(
    h_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None,
    U_BRO: Tensor, K_BRI: Tensor, kb_BR: Tensor | None, birth_BR: Tensor, w_BR: Tensor,
    slot_B: Tensor, event_B: Tensor, write_B: Tensor, rate: Tensor, p0: Tensor | None = None,
    target: Tensor | None = None, bad_B: Tensor | None = None, *, rule: str, activation: str, mu: float | None,
    clip: float | None = None, backend: str = "torch",
) -> Tensor:  # fmt: skip
    """One token of one plastic linear: returns a [B, O] in h's dtype, and writes one event where asked.

    h [B, I] and W [O, I] any float dtype. U, K, kb float32 (float64 on the torch path), changed in place with
    birth (int64), which gets event_B; kb None: no fast bias. w [B, R]: weights of the events before this one.
    slot, event [B] int64, write [B] bool. rate, p0: tensors [] or [B]; target [O] or [B, O]. `rule` is a
    name in `values.RULES`, `activation` "silu" or "identity"; mu None: the key is h itself. bad [B] int32 becomes 1
    in rows whose event is not finite; None: nobody asks.
    """
    bad_B = torch.zeros_like(slot_B, dtype=torch.int32) if bad_B is None else bad_B
    _check(h_BI, U_BRO, K_BRI, kb_BR, birth_BR, w_BR, slot_B, event_B, write_B, bad_B, backend)
    arguments = (
        h_BI, weight_OI, bias_O, U_BRO, K_BRI, kb_BR, birth_BR, w_BR, slot_B, event_B, write_B, rate,
        rate if p0 is None else p0, target, bad_B, rule, activation, mu, clip,
    )  # fmt: skip
    match backend:
        case "triton":
            return _op(*arguments) if h_BI.is_cuda else launch(*arguments)
        case _:
            return reference(*arguments)


def step_gated_(
    h_BI: Tensor, gate_OI: Tensor, up_OI: Tensor, gate_bias_O: Tensor | None, up_bias_O: Tensor | None,
    U_gate_BRO: Tensor, U_up_BRO: Tensor, K_gate_BRI: Tensor, K_up_BRI: Tensor, kb_gate_BR: Tensor | None,
    kb_up_BR: Tensor | None, birth_gate_BR: Tensor, birth_up_BR: Tensor, w_BR: Tensor, slot_B: Tensor, event_B: Tensor,
    write_B: Tensor, rate_gate: Tensor, rate_up: Tensor, p0_gate: Tensor | None = None, p0_up: Tensor | None = None,
    gate_target: Tensor | None = None, up_target: Tensor | None = None, bad_gate_B: Tensor | None = None,
    bad_up_B: Tensor | None = None, *, rule: str, mu: float | None, clip: float | None = None, backend: str = "torch",
) -> Tensor:  # fmt: skip
    """One token of gate_proj and up_proj: silu(a_gate) ⊙ a_up, [B, O], each a rounded to h's dtype first.

    They have the rule, slots and weights in common; rate, p0, target, factors, birth and bad are each one's own.
    """
    bad_gate_B, bad_up_B = (
        torch.zeros_like(slot_B, dtype=torch.int32) if bad is None else bad for bad in (bad_gate_B, bad_up_B)
    )
    common = (w_BR, slot_B, event_B, write_B)
    _check(h_BI, U_gate_BRO, K_gate_BRI, kb_gate_BR, birth_gate_BR, *common, bad_gate_B, backend)
    _check(h_BI, U_up_BRO, K_up_BRI, kb_up_BR, birth_up_BR, *common, bad_up_B, backend)
    if K_gate_BRI is K_up_BRI or (kb_gate_BR is None) != (kb_up_BR is None):
        raise ValueError("step_gated_() expected keys of its own for each linear, and bias keys for both or none")
    arguments = (
        h_BI, gate_OI, up_OI, gate_bias_O, up_bias_O, U_gate_BRO, U_up_BRO, K_gate_BRI, K_up_BRI, kb_gate_BR, kb_up_BR,
        birth_gate_BR, birth_up_BR, *common, rate_gate, rate_up, rate_gate if p0_gate is None else p0_gate,
        rate_up if p0_up is None else p0_up, gate_target, up_target,
        bad_gate_B, bad_up_B, rule, mu, clip,
    )  # fmt: skip
    match backend:
        case "triton":
            return _op_gated(*arguments) if h_BI.is_cuda else launch_gated(*arguments)
        case _:
            return reference_gated(*arguments)
