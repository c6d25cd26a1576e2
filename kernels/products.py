"""products: W h + b of one token of each row, with the norm before it or the residual stream behind it.

    y = W (g ⊙ x) · rsqrt(mean x² + eps) + b        `project`: of several matrices that read the same x, side by side
    x ← x + W z + b                                 `add_project_`

x is the residual stream, in float32 whatever the weights' dtype (float64 for a float64 model). One row is a
matrix-vector product, which reads W at memory speed and needs no launch for the norm. Up to MOST_ROWS rows are a
product on the tensor cores that reads W once as well; their norm is a launch of its own.

Kernels of one token follow each other by programmatic dependent launch where the device has it: each announces at once
that the next may start, reads what no kernel ever writes (weights), and then waits for the kernel before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import launch_rms_norm
from .values import FUSED, jit, require_triton, tl, triton

MOST_ROWS = 64  # more rows than this are a matter of torch's GEMM
# how `tl.dot` multiplies float32: three terms of TF32 have its accuracy; AMD's matrix cores take float32 itself
SINGLE = "ieee" if torch.version.hip else "tf32x3"


class Frozen(NamedTuple):
    """A linear, any float dtype."""

    W_OI: Tensor
    b_O: Tensor | None


class Norm(NamedTuple):
    """RMSNorm: g ⊙ x · rsqrt(mean x² + eps)."""

    weight_D: Tensor
    eps: float


# ---- torch


def normed(x_BD: Tensor, norm: Norm) -> Tensor:
    """The norm of x in the dtype of its weight."""
    x_BD = x_BD * (x_BD.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return (norm.weight_D.to(x_BD.dtype) * x_BD).to(norm.weight_D.dtype)


# ---- Triton


@cache
def dependent(device: torch.device) -> bool:
    """Whether kernels on this device may start before the kernel before them has ended: from Hopper on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def chained(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that is one of a chain."""
    return {"PDL": True, "launch_pdl": True, **FUSED} if dependent(device) else {"PDL": False, **FUSED}


@jit
def announce(PDL: tl.constexpr):
    """Lets the next kernel start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait(PDL: tl.constexpr):
    """Until the kernel before has ended, and what it wrote can be seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def tile(W_ptr, n, k, O, I):
    """W [n, k], 0 outside."""
    inside = (n < O)[:, None] & (k < I)[None, :]
    return tl.load(W_ptr + n[:, None] * I + k[None, :], mask=inside, other=0.0)


@jit
def weighed(x_ptr, g_ptr, k, I):
    """x and g ⊙ x at k, float32; without g both are x."""
    x = tl.load(x_ptr + k, mask=k < I, other=0.0).to(tl.float32)
    y = x
    if g_ptr is not None:
        y = x * tl.load(g_ptr + k, mask=k < I, other=0.0).to(tl.float32)
    return x, y


@jit
def _row(
    x_ptr, g_ptr, W0, b0, O0, W1, b1, O1, W2, b2, O2, y_ptr, I, eps,
    ADD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN outputs of one of up to three matrices, for one row."""
    announce(PDL)
    program, programs = tl.program_id(0).to(tl.int64), tl.cdiv(O0, BN)
    if W1 is not None:
        if program < programs:
            _outputs(x_ptr, g_ptr, W0, b0, O0, y_ptr, program, I, eps, ADD, BN, BK, PDL)
        else:
            program -= programs
            programs = tl.cdiv(O1, BN)
            if program < programs:
                _outputs(x_ptr, g_ptr, W1, b1, O1, y_ptr + O0, program, I, eps, ADD, BN, BK, PDL)
            else:
                if W2 is not None:
                    program -= programs
                    _outputs(x_ptr, g_ptr, W2, b2, O2, y_ptr + O0 + O1, program, I, eps, ADD, BN, BK, PDL)
    else:
        _outputs(x_ptr, g_ptr, W0, b0, O0, y_ptr, program, I, eps, ADD, BN, BK, PDL)


@jit
def _outputs(
    x_ptr, g_ptr, W_ptr, b_ptr, O, y_ptr, program, I, eps,
    ADD: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = program * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    W = tile(W_ptr, n, k, O, I)
    wait(PDL)
    acc = tl.full([BN, BK], 0.0, tl.float32)
    square = tl.full([BK], 0.0, tl.float32)
    for k0 in range(0, I, BK):
        x, y = weighed(x_ptr, g_ptr, k0 + k, I)
        square += x * x
        acc += W.to(tl.float32) * y[None, :]
        W = tile(W_ptr, n, k0 + BK + k, O, I)  # on its way while this one is used
    y = tl.sum(acc, 1)
    if g_ptr is not None:
        y *= tl.rsqrt(tl.sum(square, 0) / I + eps)
    if b_ptr is not None:
        y += tl.load(b_ptr + n, mask=n < O, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(y_ptr + n, mask=n < O, other=0.0)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < O)


@jit
def _rows(
    h_ptr, W0, b0, O0, W1, b1, O1, W2, b2, O2, y_ptr, B, I, y_sb,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BN outputs of one of up to three matrices, for all rows. Rows of y lie y_sb apart."""
    announce(PDL)
    wait(PDL)
    program, programs = tl.program_id(0).to(tl.int64), tl.cdiv(O0, BN)
    if W1 is not None:
        if program < programs:
            _many(h_ptr, W0, b0, O0, y_ptr, program, B, I, y_sb, ADD, BM, BN, BK, PRECISION)
        else:
            program -= programs
            programs = tl.cdiv(O1, BN)
            if program < programs:
                _many(h_ptr, W1, b1, O1, y_ptr + O0, program, B, I, y_sb, ADD, BM, BN, BK, PRECISION)
            else:
                if W2 is not None:
                    program -= programs
                    _many(h_ptr, W2, b2, O2, y_ptr + O0 + O1, program, B, I, y_sb, ADD, BM, BN, BK, PRECISION)
    else:
        _many(h_ptr, W0, b0, O0, y_ptr, program, B, I, y_sb, ADD, BM, BN, BK, PRECISION)


@jit
def _many(
    h_ptr, W_ptr, b_ptr, O, y_ptr, program, B, I, y_sb,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = program * BN + tl.arange(0, BN)
    m = tl.arange(0, BM).to(tl.int64)
    k = tl.arange(0, BK)
    acc = tl.full([BM, BN], 0.0, tl.float32)
    for k0 in range(0, I, BK):
        inside = (m < B)[:, None] & (k0 + k < I)[None, :]
        h = tl.load(h_ptr + m[:, None] * I + (k0 + k)[None, :], mask=inside, other=0.0)
        acc = tl.dot(h, tl.trans(tile(W_ptr, n, k0 + k, O, I)), acc, input_precision=PRECISION)
    if b_ptr is not None:
        acc += tl.load(b_ptr + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    at = y_ptr + m[:, None] * y_sb + n[None, :]
    inside = (m < B)[:, None] & (n < O)[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(x_BI: Tensor, norm: Norm | None, linears: Sequence[Frozen], y_BO: Tensor, add: bool) -> None:
    require_triton(x_BI, *(frozen.W_OI for frozen in linears))
    (B, I), outputs = x_BI.shape, [len(frozen.W_OI) for frozen in linears]
    matrices: list[Any] = [part for (W, b), O in zip(linears, outputs, strict=True) for part in (W, b, O)]
    matrices += [None, None, None] * (3 - len(linears))
    options = chained(x_BI.device)
    if B == 1:
        weight, eps = norm or (None, 0.0)
        narrow = I > 8192  # a long row by itself; two short ones together
        BN, BK, warps = (1, 2048, 4) if narrow else (2, min(2048, max(128, triton.next_power_of_2(I))), 8)
        warps = min(warps, 4) if torch.version.hip else warps  # a warp has twice the threads there
        grid = (sum(triton.cdiv(O, BN) for O in outputs),)
        _row[grid](x_BI, weight, *matrices, y_BO, I, eps, ADD=add, BN=BN, BK=BK, num_warps=warps, **options)
        return
    h_BI = x_BI if norm is None else launch_rms_norm(x_BI, *norm)
    BM = max(16, triton.next_power_of_2(B))
    grid = (sum(triton.cdiv(O, 32) for O in outputs),)
    _rows[grid](
        h_BI, *matrices, y_BO, B, I, y_BO.stride(0),
        ADD=add, BM=BM, BN=32, BK=32 if h_BI.dtype == torch.float32 else 128, PRECISION=SINGLE, num_warps=4,
        num_stages=2 if torch.version.hip else 4, **options,
    )  # fmt: skip


# ---- the choosers


def project(
    x_BD: Tensor, norm: Norm | None, linears: Sequence[Frozen], dtype: torch.dtype, backend: str = "torch"
) -> Tensor:
    """W norm(x) + b of up to three linears side by side, [B, ΣO] in `dtype`.

    x [B ≤ MOST_ROWS, D] contiguous, float32; without a norm in the weights' dtype. Weights [O, D] contiguous.
    """
    if backend == "torch":
        h_BD = x_BD if norm is None else normed(x_BD, norm)
        return torch.cat([F.linear(h_BD, *frozen) for frozen in linears], dim=1).to(dtype)
    y_BO = torch.empty(len(x_BD), sum(len(frozen.W_OI) for frozen in linears), dtype=dtype, device=x_BD.device)
    _launch(x_BD, norm, linears, y_BO, add=False)
    return y_BO


def add_project_(x_BD: Tensor, z_BI: Tensor, frozen: Frozen, backend: str = "torch") -> None:
    """x += W z + b, in place; x as in `project`, z [B, I] in the weights' dtype, contiguous."""
    if backend == "torch":
        x_BD += F.linear(z_BI, *frozen)
    else:
        _launch(z_BI, None, [frozen], x_BD, add=True)
