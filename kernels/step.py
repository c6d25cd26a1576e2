"""step: the MLP of one token of each row, with the fast weights of its linears read and written in the same kernels.

    a = W h + b + Σ_j w_j (k_j·h + bias_j) u_j                   read, before this token's own write
    k = h / (‖h‖² + mu),   u = rate · value(a), clipped         write, into slot `slot` where `write`

`gate_up` gives silu(a_gate) ⊙ a_up of h = norm(x), `down_` adds a to the residual stream x. Each of the linears is
plastic or frozen by itself. One launch, and one before it where a linear is plastic: w ⊙ (K h + bias) needs all of h.
Whatever changes between tokens (weights, slots, rates, the mask) is a tensor, so a captured graph stays good. A slot
outside 0:R writes nothing. `bad` [B] becomes 1 where what was written is not finite, so that nobody has to look, and
wait for the device, after every linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import launch_rms_norm
from .products import Frozen, Norm, add_project_, announce, chained, normed, project, tile, wait, weighed
from .read import reference as read_reference
from .values import clipped_triton, jit, kernel_of, per_row, phi_triton, require_triton, tl, triton


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


class StepRule(NamedTuple):
    """What of a rule is no tensor.

    name: in `values.KERNELS`. activation: in `values.ACTIVATIONS`. mu None: the key is h itself.
    event: what it writes, in torch: (this rule, a_BO, frozen_BO, norm_B = ‖k‖, inputs) → u_BO. None: "triton" alone.
    """

    name: str
    activation: str
    mu: float | None
    clip: float | None
    event: Callable[[StepRule, Tensor, Tensor, Tensor, StepInputs], Tensor] | None = None


class Plastic(NamedTuple):
    """The fast weights of one linear, for one token."""

    factors: Factors
    inputs: StepInputs
    rule: StepRule


class StepLinear(NamedTuple):
    """One linear, for one token; plastic None: it is frozen."""

    frozen: Frozen
    plastic: Plastic | None = None


# ---- torch


def _keys(h_BI: Tensor, mu: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """k, the bias key 1 / (‖h‖² + mu), and ‖k‖; mu None: k = h."""
    square_B = h_BI.square().sum(-1)
    scale_B = torch.ones_like(square_B) if mu is None else 1 / (square_B + mu)
    return h_BI * scale_B[:, None], scale_B, square_B.sqrt() * scale_B


def _put(slot_B: Tensor, write_B: Tensor, *changes: tuple[Tensor | None, Tensor]) -> None:
    """buffer[b, slot[b]] = new[b] in every row that is written, for (buffer [B, R, ...], new [B, ...])."""
    R = next(buffer.shape[1] for buffer, _ in changes if buffer is not None)
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


def reference(h_BI: Tensor, linear: StepLinear) -> Tensor:
    """a [B, O] of one linear in h's dtype, by the definition; writes the event where it is plastic."""
    (W_OI, b_O), plastic = linear
    if plastic is None:
        return F.linear(h_BI, W_OI, b_O)
    (U_BRO, K_BRI, bias_BR, birth_BR), inputs, rule = plastic
    assert rule.event is not None
    k_BI, scale_B, norm_B = _keys(h_BI.to(K_BRI.dtype), rule.mu)
    frozen_BO = F.linear(h_BI, W_OI, b_O).to(U_BRO.dtype)
    a_BO = frozen_BO + read_reference(h_BI[:, None], U_BRO, K_BRI, bias_BR, inputs.w_BR)[:, 0]
    u_BO = rule.event(rule, a_BO, frozen_BO, norm_B, inputs)
    changes = ((U_BRO, u_BO), (K_BRI, k_BI), (bias_BR, scale_B), (birth_BR, inputs.event_B))
    _put(inputs.slot_B, inputs.write_B, *changes)
    _note(inputs.bad_B, inputs.slot_B, inputs.write_B, K_BRI.shape[1], u_BO, k_BI)
    return a_BO.to(h_BI.dtype)


# ---- Triton: the kernels are given one of these for each linear; None is known when a kernel is compiled


class _Linear(NamedTuple):
    W: Any
    b: Any  # or None
    product: Any  # W h + b, float32, where it is made already; None: the kernel reads W
    product_sb: Any  # how far rows lie apart, here and below
    U: Any = None  # None: frozen, and so is everything below
    K: Any = None
    bias: Any = None  # None: no fast bias
    birth: Any = None
    event: Any = None
    slot: Any = None
    w: Any = None  # [B, R]
    write: Any = None
    rate: Any = None
    gamma: Any = None
    target: Any = None  # None: the rule has none
    bad: Any = None
    c: Any = None  # scratch [B, R]: w ⊙ (K h + bias keys)
    norm: Any = None  # scratch [B]: ‖k‖
    R: Any = None
    mu: Any = None  # None: k = h
    clip: Any = None  # None: no clip
    U_sb: Any = None
    K_sb: Any = None
    bias_sb: Any = None
    birth_sb: Any = None
    target_sb: Any = None


@jit
def _coefficients(
    x_ptr, g_ptr, first, second, I, eps, PAIR: tl.constexpr, BI: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """c = w ⊙ (K h + bias keys) and norm = ‖k‖ of one linear or two; then this token's keys into their slots.

    h is norm(x), or x itself without g. One program per slot: the program that writes a slot has itself read the old
    value, so no barrier between programs is needed.
    """
    announce(PDL)
    wait(PDL)
    r, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if tl.program_id(2) == 0:
        if r < first.R:
            _coefficient(b, r, x_ptr + b * I, g_ptr, first, I, eps, BI)
    else:
        if PAIR:  # noqa: SIM102  Triton 3.6 cannot compare a group with None
            if r < second.R:
                _coefficient(b, r, x_ptr + b * I, g_ptr, second, I, eps, BI)


@jit
def _coefficient(b, r, x_ptr, g_ptr, linear, I, eps, BI: tl.constexpr):
    w = tl.load(linear.w + b * linear.R + r)
    K_row = linear.K + b * linear.K_sb + r * I
    live = tl.where(w != 0, I, 0)  # a dead slot may hold anything
    dot = tl.full([BI], 0.0, tl.float32)
    square_x = tl.full([BI], 0.0, tl.float32)
    square_h = tl.full([BI], 0.0, tl.float32)
    for i0 in range(0, I, BI):
        i = i0 + tl.arange(0, BI)
        x, h = weighed(x_ptr, g_ptr, i, I)
        K = tl.load(K_row + i, mask=i < live, other=0.0)
        dot += h * K
        square_x += x * x
        square_h += h * h
    c = tl.sum(dot, 0)
    norm2 = tl.sum(square_h, 0)
    unit = norm2 * 0 + 1
    if g_ptr is not None:
        unit = tl.rsqrt(tl.sum(square_x, 0) / I + eps)
        c *= unit
        norm2 *= unit * unit
    if linear.bias is not None:
        c += tl.load(linear.bias + b * linear.bias_sb + r, mask=w != 0, other=0.0)
    tl.store(linear.c + b * linear.R + r, tl.where(w != 0, c * w, 0.0))
    scale = norm2 * 0 + 1
    if linear.mu is not None:
        scale = 1 / (norm2 + linear.mu)
    if r == 0:
        tl.store(linear.norm + b, tl.sqrt(norm2) * scale)
    if (tl.load(linear.write + b) != 0) & (tl.load(linear.slot + b) == r):
        tl.debug_barrier()  # every thread has read its part of the old key
        for i0 in range(0, I, BI):
            i = i0 + tl.arange(0, BI)
            _, h = weighed(x_ptr, g_ptr, i, I)
            key = h * unit * scale
            tl.store(K_row + i, key, mask=i < I)
            tl.store(linear.bad + b + i * 0, 1, mask=(i < I) & ~(tl.abs(key) < float("inf")))
        if linear.bias is not None:
            tl.store(linear.bias + b * linear.bias_sb + r, scale)
        tl.store(linear.birth + b * linear.birth_sb + r, tl.load(linear.event + b))


@jit
def _event(b, n, frozen, linear, O, RULE: tl.constexpr, PHI: tl.constexpr, BR: tl.constexpr):
    """a of neurons n [BN] of row b, float32, given W h + b; writes their values. Of a frozen linear a is W h + b."""
    a = frozen
    if linear.U is not None:
        alive = n < O
        fast = tl.full([BR, n.shape[0]], 0.0, tl.float32)
        for r0 in range(0, linear.R, BR):
            r = r0 + tl.arange(0, BR).to(tl.int64)
            w = tl.load(linear.w + b * linear.R + r, mask=r < linear.R, other=0.0)
            c = tl.load(linear.c + b * linear.R + r, mask=r < linear.R, other=0.0)
            # the mask keeps out what dead slots hold: 0 · NaN is NaN
            inside = (w != 0)[:, None] & alive[None, :]
            U = tl.load(linear.U + b * linear.U_sb + r[:, None] * O + n[None, :], mask=inside, other=0.0)
            fast += c[:, None] * U
        a += tl.sum(fast, 0)
        target = a
        if linear.target is not None:
            target = tl.load(linear.target + b * linear.target_sb + n, mask=alive, other=0.0).to(tl.float32)
        u = tl.load(linear.rate + b) * RULE(a, frozen, target, tl.load(linear.gamma + b), PHI)
        if linear.clip is not None:
            u = clipped_triton(u, linear.clip, tl.load(linear.norm + b))
        slot = tl.load(linear.slot + b)
        end = tl.where((tl.load(linear.write + b) != 0) & (slot >= 0) & (slot < linear.R), O, 0)
        tl.debug_barrier()  # the slot may be one that was just read
        tl.store(linear.U + b * linear.U_sb + slot * O + n, u, mask=n < end)
        tl.store(linear.bad + b + n * 0, 1, mask=(n < end) & ~(tl.abs(u) < float("inf")))
    return a


@jit
def _bias(b_ptr, n, O):
    return tl.load(b_ptr + n, mask=n < O, other=0.0).to(tl.float32)


@jit
def _gate_up(
    x_ptr, g_ptr, gate, up, y_ptr, O, I, eps,
    MADE: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """silu(a_gate) ⊙ a_up of BN neurons of one row; MADE: their products are made already. GATE, UP: rules' values."""
    announce(PDL)
    n, b = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.program_id(1).to(tl.int64)
    if MADE:
        wait(PDL)
        a_gate = tl.load(gate.product + b * gate.product_sb + n, mask=n < O, other=0.0)
        a_up = tl.load(up.product + b * up.product_sb + n, mask=n < O, other=0.0)
    else:
        k = tl.arange(0, BK)
        W_gate, W_up = tile(gate.W, n, k, O, I), tile(up.W, n, k, O, I)
        wait(PDL)
        sum_gate = tl.full([BN, BK], 0.0, tl.float32)
        sum_up = tl.full([BN, BK], 0.0, tl.float32)
        square = tl.full([BK], 0.0, tl.float32)
        for k0 in range(0, I, BK):
            x, h = weighed(x_ptr + b * I, g_ptr, k0 + k, I)
            square += x * x
            sum_gate += W_gate.to(tl.float32) * h[None, :]
            sum_up += W_up.to(tl.float32) * h[None, :]
            # on their way while these are used
            W_gate, W_up = tile(gate.W, n, k0 + BK + k, O, I), tile(up.W, n, k0 + BK + k, O, I)
        a_gate, a_up = tl.sum(sum_gate, 1), tl.sum(sum_up, 1)
        if g_ptr is not None:
            unit = tl.rsqrt(tl.sum(square, 0) / I + eps)
            a_gate *= unit
            a_up *= unit
        if gate.b is not None:
            a_gate += _bias(gate.b, n, O)
        if up.b is not None:
            a_up += _bias(up.b, n, O)
    a_gate = _event(b, n, a_gate, gate, O, GATE, "silu", BR)
    a_up = _event(b, n, a_up, up, O, UP, "identity", BR)
    y = phi_triton(a_gate, "silu") * a_up
    tl.store(y_ptr + b * O + n, y.to(y_ptr.dtype.element_ty), mask=n < O)


@jit
def _down(
    h_ptr, down, x_ptr, O, I,
    MADE: tl.constexpr, RULE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x + a of BN neurons of one row of a plastic linear; MADE: its product is made already."""
    announce(PDL)
    n, b = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), tl.program_id(1).to(tl.int64)
    if MADE:
        wait(PDL)
        a = tl.load(down.product + b * down.product_sb + n, mask=n < O, other=0.0)
    else:
        k = tl.arange(0, BK)
        W = tile(down.W, n, k, O, I)
        wait(PDL)
        acc = tl.full([BN, BK], 0.0, tl.float32)
        for k0 in range(0, I, BK):
            h = tl.load(h_ptr + b * I + k0 + k, mask=k0 + k < I, other=0.0).to(tl.float32)
            acc += W.to(tl.float32) * h[None, :]
            W = tile(down.W, n, k0 + BK + k, O, I)
        a = tl.sum(acc, 1)
        if down.b is not None:
            a += _bias(down.b, n, O)
    a = _event(b, n, a, down, O, RULE, "identity", BR)
    x = tl.load(x_ptr + b * O + n, mask=n < O, other=0.0)
    tl.store(x_ptr + b * O + n, x + a, mask=n < O)


def _for_kernels(linear: StepLinear, rows: int, product_BO: Tensor | None) -> _Linear:
    (W, b), plastic = linear
    product_sb = None if product_BO is None else product_BO.stride(0)
    if plastic is None:
        return _Linear(W, b, product_BO, product_sb)
    (U, K, bias, birth), inputs, rule = plastic
    require_triton(U, K)
    rate, gamma = (per_row(x, rows, U).contiguous() for x in (inputs.rate, inputs.gamma))
    target = inputs.target if kernel_of(rule.name, rule.activation).reads_target else None
    c, norm = (torch.empty(size, dtype=torch.float32, device=U.device) for size in (K.shape[:2], rows))
    return _Linear(
        W, b, product_BO, product_sb, U, K, bias, birth, inputs.event_B, inputs.slot_B, inputs.w_BR,
        inputs.write_B.view(torch.uint8), rate, gamma, target, inputs.bad_B, c, norm, K.shape[1],
        None if rule.mu is None else float(rule.mu), None if rule.clip is None else float(rule.clip),
        U.stride(0), K.stride(0), None if bias is None else bias.stride(0), birth.stride(0),
        None if target is None else 0 if target.dim() == 1 or len(target) == 1 else target.stride(0),
    )  # fmt: skip


def _value(linear: StepLinear) -> Any:
    """The rule's value as kernels are built from it."""
    rule = linear.plastic and linear.plastic.rule
    return rule and kernel_of(rule.name, rule.activation).value


def _launch_coefficients(x_BI: Tensor, norm: Norm | None, linears: list[_Linear]) -> None:
    plastic = [linear for linear in linears if linear.U is not None]
    if not plastic:
        return
    (B, I), (weight, eps) = x_BI.shape, norm or (None, 0.0)
    grid = (max(linear.R for linear in plastic), B, len(plastic))
    options = {"PAIR": len(plastic) == 2, "BI": min(1024, triton.next_power_of_2(I)), "num_warps": 4}
    _coefficients[grid](x_BI, weight, plastic[0], plastic[-1], I, eps, **options, **chained(x_BI.device))


def _grid(rows: int, O: int, I: int, BN: int, BK: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid and tile of a kernel that makes its own product, or of one whose product is made."""
    if rows == 1:
        return (triton.cdiv(O, BN), 1), {"MADE": False, "BN": BN, "BK": min(BK, triton.next_power_of_2(I)), "BR": 32}
    return (triton.cdiv(O, 64), rows), {"MADE": True, "BN": 64, "BK": 16, "BR": 32}


def launch_gate_up(x_BD: Tensor, norm: Norm, gate: StepLinear, up: StepLinear) -> Tensor:
    """`gate_up` by Triton."""
    require_triton(x_BD, gate.frozen.W_OI)
    (B, I), O, dtype = x_BD.shape, len(gate.frozen.W_OI), gate.frozen.W_OI.dtype
    y_BO = torch.empty(B, O, dtype=dtype, device=x_BD.device)
    own: Norm | None = norm
    products: tuple[Tensor | None, ...] = (None, None)
    if B > 1:
        h_BD = launch_rms_norm(x_BD, *norm)
        products = project(h_BD, None, (gate.frozen, up.frozen), torch.float32, "triton").split(O, dim=1)
        x_BD, own = h_BD, None
    linears = [_for_kernels(linear, B, product) for linear, product in zip((gate, up), products, strict=True)]
    _launch_coefficients(x_BD, own, linears)
    grid, tiles = _grid(B, O, I, 2, 1024)
    weight, eps = own or (None, 0.0)
    values = {"GATE": _value(gate), "UP": _value(up)}
    _gate_up[grid](x_BD, weight, *linears, y_BO, O, I, eps, **values, **tiles, num_warps=4, **chained(x_BD.device))
    return y_BO


def launch_down(x_BD: Tensor, h_BI: Tensor, down: StepLinear) -> None:
    """`down_` of a plastic linear by Triton."""
    require_triton(x_BD, down.frozen.W_OI)
    (B, I), O = h_BI.shape, len(down.frozen.W_OI)
    product = project(h_BI, None, (down.frozen,), torch.float32, "triton") if B > 1 else None
    linear = _for_kernels(down, B, product)
    _launch_coefficients(h_BI, None, [linear])
    grid, tiles = _grid(B, O, I, 1, 2048)
    _down[grid](h_BI, linear, x_BD, O, I, RULE=_value(down), **tiles, num_warps=4, **chained(x_BD.device))


# ---- the choosers


def _check(linear: StepLinear, rows: int, backend: str) -> None:
    if backend not in ("torch", "triton"):
        raise ValueError(f'the step got backend {backend!r}, expected "torch" or "triton"')
    if linear.plastic is None:
        return
    (U, K, bias, birth), inputs, rule = linear.plastic
    B, R = rows, K.shape[1]
    if R == 0:
        raise ValueError("the step got factors with 0 slots, expected at least 1")
    found = {"U": U.shape[:2], "K": K.shape[:2], "birth": birth.shape, "w": inputs.w_BR.shape}
    if bias is not None:
        found["bias"] = bias.shape
    for name, shape in found.items():
        if tuple(shape) != (B, R):
            raise ValueError(f"the step got {name} for [rows, slots] {list(shape)}, expected {[B, R]}")
    for name, x in (("slot", inputs.slot_B), ("event", inputs.event_B), ("write", inputs.write_B)):
        if tuple(x.shape) != (B,) or not x.is_contiguous():
            raise ValueError(f"the step got {name} of shape {list(x.shape)}, expected {[B]}, contiguous")
    bad = inputs.bad_B
    if bad.shape != inputs.slot_B.shape or bad.dtype != torch.int32:
        raise ValueError(f"the step got bad of {bad.dtype} {list(bad.shape)}, expected torch.int32 {[B]}")
    if inputs.write_B.dtype != torch.bool:
        raise ValueError(f"the step got write of {inputs.write_B.dtype}, expected bool")
    for name, buffer in (("U", U), ("K", K), ("bias", bias), ("birth", birth), ("w", inputs.w_BR)):
        if buffer is None:
            continue
        if buffer.stride(-1) != 1 or (buffer.dim() == 3 and buffer.stride(1) != buffer.shape[2]):
            raise ValueError(f"the step reads and writes {name} in place: expected each row's slots to be contiguous")
    if backend == "torch" and rule.event is None:
        raise ValueError(f'the step by rule {rule.name!r} on backend "torch" needs its event in torch, got None')
    if backend == "triton" and kernel_of(rule.name, rule.activation).reads_target and inputs.target is None:
        raise ValueError(f"the step by rule {rule.name!r} needs a target, got None")


def gate_up(x_BD: Tensor, norm: Norm, gate: StepLinear, up: StepLinear, backend: str = "torch") -> Tensor:
    """silu(a_gate) ⊙ a_up [B, O] of h = norm(x), in the weights' dtype; writes the events of what is plastic.

    x [B, D] contiguous, the residual stream as in `products`; the rest as in the groups' own words.
    """
    for linear in (gate, up):
        _check(linear, len(x_BD), backend)
    both = (gate.plastic, up.plastic)
    if all(both) and both[0].factors.K_BRI is both[1].factors.K_BRI:  # type: ignore[union-attr]
        raise ValueError("the step expected keys of its own for each linear, got the same for gate and up")
    if backend == "triton":
        return launch_gate_up(x_BD, norm, gate, up)
    h_BD = normed(x_BD, norm)
    return F.silu(reference(h_BD, gate)) * reference(h_BD, up)


def down_(x_BD: Tensor, h_BI: Tensor, down: StepLinear, backend: str = "torch") -> None:
    """x += a [B, D], in place; h [B, I] in the weights' dtype, contiguous; writes the event if it is plastic."""
    _check(down, len(x_BD), backend)
    if down.plastic is None:
        add_project_(x_BD, h_BI, down.frozen, backend)
    elif backend == "triton":
        launch_down(x_BD, h_BI, down)
    else:
        x_BD += reference(h_BI, down)
