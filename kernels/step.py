"""step: one token at one plastic linear, for a batch of rows, in place and fused.

    a = W h + b + Σ_j w_j (k_j·h + bias_j) u_j                   read, before this token's own write
    k = h / (‖h‖² + mu),   u = rate · value(a), clipped         write, into slot `slot` where `write`

and the pair gate_proj, up_proj with SiLU·up behind it: out = silu(a_gate) ⊙ a_up, whose logs have slots, weights and
rule in common. Two launches each. Whatever changes between tokens (weights, slots, rates, the mask) is a tensor, so a
captured graph stays good. A slot outside 0:R writes nothing. `bad` [B] becomes 1 where what was written is not
finite, so that nobody has to look, and wait for the device, after every linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .read import reference as read_reference
from .values import FUSED, clipped_triton, jit, kernel_of, per_row, require_triton, tl, triton

GEMV_ROWS = 4  # more rows than this: the frozen product by torch's GEMM, the rest fused behind it


class Frozen(NamedTuple):
    """The linear itself, any float dtype."""

    W_OI: Tensor
    b_O: Tensor | None


class Factors(NamedTuple):
    """What the event is written into, in place: float32 (float64 on the torch path), birth int64."""

    U_BRO: Tensor
    K_BRI: Tensor
    bias_BR: Tensor | None  # None: no fast bias
    birth_BR: Tensor


class StepInputs(NamedTuple):
    """What one token's event needs; a captured graph has the same tensors at every token."""

    event_B: Tensor  # its number, int64: becomes the slot's birth
    slot_B: Tensor  # where it goes, int64
    w_BR: Tensor  # weights of the events before it
    write_B: Tensor  # bool: whether it is written
    rate: Tensor  # [] or [B]
    gamma: Tensor  # [] or [B], of the slow rules
    target: Tensor | None  # [O] or [B, O]
    bad_B: Tensor  # int32: becomes 1 in rows whose event is not finite


class StepLinear(NamedTuple):
    """One plastic linear, for one token."""

    frozen: Frozen
    factors: Factors
    inputs: StepInputs


class StepRule(NamedTuple):
    """What of a rule is no tensor.

    name: in `values.KERNELS`. activation: "silu" or "identity". mu None: the key is h itself.
    event: what it writes, in torch: (this rule, a_BO, frozen_BO, norm_B = ‖k‖, inputs) → u_BO. None: "triton" alone.
    """

    name: str
    activation: str
    mu: float | None
    clip: float | None
    event: Callable[[StepRule, Tensor, Tensor, Tensor, StepInputs], Tensor] | None = None


# ---- torch


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


def reference(h_BI: Tensor, linear: StepLinear, rule: StepRule) -> Tensor:
    """The definition, in torch."""
    assert rule.event is not None
    (W_OI, b_O), (U_BRO, K_BRI, bias_BR, birth_BR), inputs = linear
    k_BI, scale_B, norm_B = _keys(h_BI.to(K_BRI.dtype), rule.mu)
    frozen_BO = F.linear(h_BI, W_OI, b_O).to(U_BRO.dtype)
    a_BO = frozen_BO + read_reference(h_BI[:, None], U_BRO, K_BRI, bias_BR, inputs.w_BR)[:, 0]
    u_BO = rule.event(rule, a_BO, frozen_BO, norm_B, inputs)
    changes = ((U_BRO, u_BO), (K_BRI, k_BI), (bias_BR, scale_B), (birth_BR, inputs.event_B))
    _put(inputs.slot_B, inputs.write_B, *changes)
    _note(inputs.bad_B, inputs.slot_B, inputs.write_B, K_BRI.shape[1], u_BO, k_BI)
    return a_BO.to(h_BI.dtype)


def reference_gated(h_BI: Tensor, gate: StepLinear, up: StepLinear, rule: StepRule) -> Tensor:
    a_gate_BO = reference(h_BI, gate, rule._replace(activation="silu"))
    return F.silu(a_gate_BO) * reference(h_BI, up, rule._replace(activation="identity"))


# ---- Triton: the kernels are given these groups as they are; None is known when a kernel is compiled


class _Linear(NamedTuple):
    W: Any
    b: Any  # or None
    product: Any  # W h + b [B, O] where torch has made it; None: the kernel reads W
    U: Any
    K: Any
    bias: Any  # or None
    birth: Any
    rate: Any
    gamma: Any
    target: Any  # or None
    bad: Any
    c: Any  # scratch [B, R]: w ⊙ (K h + bias keys)
    U_sb: Any  # how far rows lie apart
    K_sb: Any
    bias_sb: Any
    birth_sb: Any
    target_sb: Any


class _Token(NamedTuple):
    event: Any
    slot: Any
    w: Any  # [B, R]
    write: Any
    norm: Any  # scratch [B]: ‖k‖


@jit
def _coefficients(h_ptr, linear, other, token, I, R, mu, PAIR: tl.constexpr, BI: tl.constexpr):
    """c = w ⊙ (K h + bias keys) and norm = ‖k‖; then this token's key into its slot. `other` counts if this is a PAIR.

    One program per slot: the program that writes a slot has itself read the old value, so no barrier between programs
    is needed.
    """
    b = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0).to(tl.int64)
    K_ptr, K_sb, birth_ptr, birth_sb = linear.K, linear.K_sb, linear.birth, linear.birth_sb
    c_ptr, bad_ptr = linear.c, linear.bad
    if linear.bias is not None:
        bias_ptr, bias_sb = linear.bias, linear.bias_sb
    if PAIR:  # Triton 3.6 cannot compare a group with None
        second = tl.program_id(2) == 1
        K_ptr, K_sb = tl.where(second, other.K, K_ptr), tl.where(second, other.K_sb, K_sb)
        birth_ptr, birth_sb = tl.where(second, other.birth, birth_ptr), tl.where(second, other.birth_sb, birth_sb)
        c_ptr, bad_ptr = tl.where(second, other.c, c_ptr), tl.where(second, other.bad, bad_ptr)
        if linear.bias is not None:
            bias_ptr, bias_sb = tl.where(second, other.bias, bias_ptr), tl.where(second, other.bias_sb, bias_sb)
    w = tl.load(token.w + b * R + r)
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
    if linear.bias is not None:
        c += tl.load(bias_ptr + b * bias_sb + r, mask=w != 0, other=0.0)
    tl.store(c_ptr + b * R + r, tl.where(w != 0, c * w, 0.0))
    scale = norm2 * 0 + 1
    if mu is not None:
        scale = 1 / (norm2 + mu)
    if r == 0:
        tl.store(token.norm + b, tl.sqrt(norm2) * scale)
    if (tl.load(token.write + b) != 0) & (tl.load(token.slot + b) == r):
        tl.debug_barrier()  # every thread has read its part of the old key
        for i0 in range(0, I, BI):
            i = i0 + tl.arange(0, BI)
            h = tl.load(h_ptr + b * I + i, mask=i < I, other=0.0).to(tl.float32)
            tl.store(K_row + i, h * scale, mask=i < I)
            tl.store(bad_ptr + b + i * 0, 1, mask=(i < I) & ~(tl.abs(h * scale) < float("inf")))
        if linear.bias is not None:
            tl.store(bias_ptr + b * bias_sb + r, scale)
        tl.store(birth_ptr + b * birth_sb + r, tl.load(token.event + b))


@jit
def _neurons(
    b, n, h_ptr, linear, token, O, I, R, clip,
    RULE: tl.constexpr, PHI: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """a of neurons n [BN] of row b, float32; writes their values."""
    alive = n < O
    if linear.product is None:
        acc = tl.full([BN, BK], 0.0, tl.float32)
        for k0 in range(0, I, BK):
            k = k0 + tl.arange(0, BK)
            inside = k < I
            W = tl.load(linear.W + n[:, None] * I + k[None, :], mask=alive[:, None] & inside[None, :], other=0.0)
            h = tl.load(h_ptr + b * I + k, mask=inside, other=0.0)
            acc += W.to(tl.float32) * h.to(tl.float32)[None, :]
        frozen = tl.sum(acc, 1)
        if linear.b is not None:
            frozen += tl.load(linear.b + n, mask=alive, other=0.0).to(tl.float32)
    else:
        frozen = tl.load(linear.product + b * O + n, mask=alive, other=0.0).to(tl.float32)
    fast = tl.full([BR, BN], 0.0, tl.float32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR).to(tl.int64)
        w = tl.load(token.w + b * R + r, mask=r < R, other=0.0)
        c = tl.load(linear.c + b * R + r, mask=r < R, other=0.0)
        # the mask keeps out what dead slots hold: 0 · NaN is NaN
        inside = (w != 0)[:, None] & alive[None, :]
        U = tl.load(linear.U + b * linear.U_sb + r[:, None] * O + n[None, :], mask=inside, other=0.0)
        fast += c[:, None] * U
    a = frozen + tl.sum(fast, 0)
    target = a
    if linear.target is not None:
        target = tl.load(linear.target + b * linear.target_sb + n, mask=alive, other=0.0).to(tl.float32)
    u = tl.load(linear.rate + b) * RULE(a, frozen, target, tl.load(linear.gamma + b), PHI)
    if clip is not None:
        u = clipped_triton(u, clip, tl.load(token.norm + b))
    slot = tl.load(token.slot + b)
    end = tl.where((tl.load(token.write + b) != 0) & (slot >= 0) & (slot < R), O, 0)
    tl.debug_barrier()  # the slot may be one that was just read
    tl.store(linear.U + b * linear.U_sb + slot * O + n, u, mask=n < end)
    tl.store(linear.bad + b + n * 0, 1, mask=(n < end) & ~(tl.abs(u) < float("inf")))
    return a


@jit
def _single(
    h_ptr, linear, token, out_ptr, rows, O, I, R, clip,
    RULE: tl.constexpr, PHI: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows
    for b in range(first, first + rows):  # W stays in the L1 cache from row to row
        a = _neurons(b, n, h_ptr, linear, token, O, I, R, clip, RULE, PHI, BN, BK, BR)
        tl.store(out_ptr + b * O + n, a.to(out_ptr.dtype.element_ty), mask=n < O)


@jit
def _gated(
    h_ptr, gate, up, token, out_ptr, rows, O, I, R, clip,
    RULE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows
    for b in range(first, first + rows):
        a_gate = _neurons(b, n, h_ptr, gate, token, O, I, R, clip, RULE, "silu", BN, BK, BR)
        a_up = _neurons(b, n, h_ptr, up, token, O, I, R, clip, RULE, "identity", BN, BK, BR)
        # each linear's output has the model's dtype, as when the two run one by one
        a_gate = a_gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        a_up = a_up.to(out_ptr.dtype.element_ty).to(tl.float32)
        a_gate = (a_gate / (1 + tl.exp(-a_gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
        tl.store(out_ptr + b * O + n, (a_gate * a_up).to(out_ptr.dtype.element_ty), mask=n < O)


def _tile(B: int, O: int, I: int) -> tuple[bool, tuple[int, int], dict]:
    """Whether the kernel reads W itself, its grid, and its tile."""
    if B <= GEMV_ROWS:
        BK = min(2048, max(128, triton.next_power_of_2(I)))
        return True, (triton.cdiv(O, 2), 1), {"BN": 2, "BK": BK, "num_warps": 4}
    return False, (triton.cdiv(O, 64), B), {"BN": 64, "BK": 16, "num_warps": 2}


def _for_kernels(h_BI: Tensor, linear: StepLinear, rule: StepRule, gemv: bool) -> _Linear:
    (W, b), (U, K, bias, birth), inputs = linear
    require_triton(h_BI, U, K)
    rate, gamma = (per_row(x, len(h_BI), U).contiguous() for x in (inputs.rate, inputs.gamma))
    target = inputs.target if kernel_of(rule.name, rule.activation).reads_target else None
    return _Linear(
        W, b, None if gemv else F.linear(h_BI, W, b), U, K, bias, birth, rate, gamma, target, inputs.bad_B,
        torch.empty(K.shape[:2], dtype=torch.float32, device=h_BI.device), U.stride(0), K.stride(0),
        0 if bias is None else bias.stride(0), birth.stride(0),
        0 if target is None or target.dim() == 1 or len(target) == 1 else target.stride(0),
    )  # fmt: skip


def launch(h_BI: Tensor, linears: tuple[StepLinear, ...], rule: StepRule) -> Tensor:
    """The step by Triton, of one linear or of gate and up: two launches."""
    h, inputs = h_BI.contiguous(), linears[0].inputs
    (B, I), O, R = h.shape, len(linears[0].frozen.W_OI), inputs.w_BR.shape[1]
    gemv, grid, tile = _tile(B, O, I)
    those = [_for_kernels(h, linear, rule, gemv) for linear in linears]
    event, slot = (x.contiguous().long() for x in (inputs.event_B, inputs.slot_B))
    write = inputs.write_B.contiguous().view(torch.uint8)
    norm = torch.empty(B, dtype=torch.float32, device=h.device)
    token = _Token(event, slot, inputs.w_BR.float().contiguous(), write, norm)
    mu, clip = (None if x is None else float(x) for x in (rule.mu, rule.clip))
    BI = min(1024, triton.next_power_of_2(I))
    pair = len(those) == 2
    _coefficients[(R, B, len(those))](h, those[0], those[-1], token, I, R, mu, PAIR=pair, BI=BI, num_warps=4, **FUSED)
    out = torch.empty(B, O, dtype=h.dtype, device=h.device)
    value = {"RULE": kernel_of(rule.name, rule.activation).value, "BR": 32, **tile, **FUSED}
    sizes = (token, out, B if gemv else 1, O, I, R, clip)
    if pair:
        _gated[grid](h, *those, *sizes, **value)
    else:
        _single[grid](h, *those, *sizes, PHI=rule.activation, **value)
    return out


# ---- as operators, which live inside torch.compile and CUDA graphs and take tensors side by side

FIELDS = (*Frozen._fields, *Factors._fields, *StepInputs._fields)
WRITTEN, OPTIONAL = {*Factors._fields, "bad_B"}, {"b_O", "bias_BR", "target"}


def flat(h_BI: Tensor, linears: tuple[StepLinear, ...], rule: StepRule) -> tuple:
    """The arguments of an operator: h, the fields of each linear, and of the rule what is no function."""
    return (h_BI, *(x for linear in linears for group in linear for x in group), *rule[:4])


def grouped(*arguments: Any) -> tuple[Tensor, tuple[StepLinear, ...], StepRule]:
    """The inverse of `flat`."""
    h_BI, *fields = arguments[:-4]
    linears = []
    while fields:
        (W, b, *factors_and_inputs), fields = fields[: len(FIELDS)], fields[len(FIELDS) :]
        factors, inputs = factors_and_inputs[:4], factors_and_inputs[4:]
        linears.append(StepLinear(Frozen(W, b), Factors(*factors), StepInputs(*inputs)))
    return h_BI, tuple(linears), StepRule(*arguments[-4:])


def _operator(name: str, linears: tuple[str, ...]) -> Any:
    """An operator over `flat` arguments, with the schema that follows from the groups."""
    names = [(field, field + suffix) for suffix in linears for field in FIELDS]
    tensors = ", ".join(
        f"Tensor{f'(a{n}!)' if field in WRITTEN else ''}{'?' if field in OPTIONAL else ''} {name}"
        for n, (field, name) in enumerate(names)
    )
    schema = f"(Tensor h_BI, {tensors}, str rule, str activation, float? mu, float? clip) -> Tensor"
    written = [name for field, name in names if field in WRITTEN]

    @torch.library.custom_op(f"fastweights::{name}", mutates_args=written, device_types="cuda", schema=schema)
    def operator(*arguments: Any) -> Tensor:
        return launch(*grouped(*arguments))

    operator.register_fake(lambda h, W, *_: h.new_empty(len(h), len(W)))
    return operator


_op, _op_gated = _operator("step", ("",)), _operator("step_gated", ("_gate", "_up"))


# ---- the choosers


def _check(h_BI: Tensor, linear: StepLinear, rule: StepRule, backend: str) -> None:
    (U, K, bias, birth), inputs = linear.factors, linear.inputs
    B, R = len(h_BI), K.shape[1]
    if R == 0:
        raise ValueError("step_() got factors with 0 slots, expected at least 1")
    found = {"U": U.shape[:2], "K": K.shape[:2], "birth": birth.shape, "w": inputs.w_BR.shape}
    if bias is not None:
        found["bias"] = bias.shape
    for name, shape in found.items():
        if tuple(shape) != (B, R):
            raise ValueError(f"step_() got {name} for [rows, slots] {list(shape)}, expected {[B, R]}")
    for name, x in (("slot", inputs.slot_B), ("event", inputs.event_B), ("write", inputs.write_B)):
        if tuple(x.shape) != (B,):
            raise ValueError(f"step_() got {name} of shape {list(x.shape)}, expected {[B]}")
    bad = inputs.bad_B
    if bad.shape != inputs.slot_B.shape or bad.dtype != torch.int32:
        raise ValueError(f"step_() got bad of {bad.dtype} {list(bad.shape)}, expected torch.int32 {[B]}")
    if inputs.write_B.dtype != torch.bool:
        raise ValueError(f"step_() got write of {inputs.write_B.dtype}, expected bool")
    for name, buffer in (("U", U), ("K", K), ("bias", bias), ("birth", birth)):
        if buffer is None:
            continue
        if buffer.stride(-1) != 1 or (buffer.dim() == 3 and buffer.stride(1) != buffer.shape[2]):
            raise ValueError(f"step_() writes {name} in place: expected each row's slots to be contiguous")
    if backend not in ("torch", "triton"):
        raise ValueError(f'step_() got backend {backend!r}, expected "torch" or "triton"')
    if backend == "torch" and rule.event is None:
        raise ValueError(f'step_() by rule {rule.name!r} on backend "torch" needs its event in torch, got None')
    if backend == "triton" and kernel_of(rule.name, rule.activation).reads_target and inputs.target is None:
        raise ValueError(f"step_() by rule {rule.name!r} needs a target, got None")


def step_(h_BI: Tensor, linear: StepLinear, rule: StepRule, backend: str = "torch") -> Tensor:
    """One token of one plastic linear: returns a [B, O] in h's dtype, and writes one event where asked.

    h [B, I] any float dtype; the rest as in the groups' own words.
    """
    _check(h_BI, linear, rule, backend)
    if backend == "torch":
        return reference(h_BI, linear, rule)
    return _op(*flat(h_BI, (linear,), rule)) if h_BI.is_cuda else launch(h_BI, (linear,), rule)


def step_gated_(h_BI: Tensor, gate: StepLinear, up: StepLinear, rule: StepRule, backend: str = "torch") -> Tensor:
    """One token of gate_proj and up_proj: silu(a_gate) ⊙ a_up, [B, O], each a rounded to h's dtype first.

    Event, slot, weights and write mask are those of `gate`; the others are each one's own. The rule's activation is
    not looked at.
    """
    rule = rule._replace(activation="silu")
    for linear in (gate, up):
        _check(h_BI, linear, rule, backend)
    if gate.factors.K_BRI is up.factors.K_BRI or (gate.factors.bias_BR is None) != (up.factors.bias_BR is None):
        raise ValueError("step_gated_() expected keys of its own for each linear, and bias keys for both or none")
    if backend == "torch":
        return reference_gated(h_BI, gate, up, rule)
    return _op_gated(*flat(h_BI, (gate, up), rule)) if h_BI.is_cuda else launch(h_BI, (gate, up), rule)
