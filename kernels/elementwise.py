"""rms_norm and silu_mul of a model on a GPU: one kernel each, where torch launches five and two.

`takes` asks whether Triton may run for given tensors. Elsewhere torch's own operations run. They are the definition.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .values import FUSED, jit, tl, triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN = (Tensor, nn.Parameter)
WIDEST = 1 << 14  # of a norm: one program holds a whole row in registers; wider ones spill
BLOCK = 2048  # of silu_mul, for 4 warps: 16 bytes of each operand a thread or more, on warps of 64 threads too


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def takes(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton may run: one GPU, one dtype that the kernels know, not differentiated and not traced."""
    if (
        not on_gpu(x)
        or triton is None
        or torch.compiler.is_compiling()
        or x.dtype not in DTYPES
        or x.numel() == 0
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    dtype, device, grad = x.dtype, x.get_device(), torch.is_grad_enabled()
    for t in (x, *others):
        if type(t) not in PLAIN or t.dtype != dtype or t.get_device() != device or (grad and t.requires_grad):
            return False
    return True


# ---- rms_norm


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight · x / sqrt(mean(x²) + eps), [..., D] in x's dtype.

    Half precision is normalised in float32 and rounded before it meets the weight, as in transformers.
    """
    if takes(x, weight_D) and weight_D.shape == x.shape[-1:] and weight_D.is_contiguous() and len(weight_D) <= WIDEST:
        return launch_rms_norm(x, weight_D, eps)
    return reference_rms_norm(x, weight_D, eps)


def reference_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x.dtype.itemsize >= 4:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    return weight_D * F.rms_norm(x.float(), weight_D.shape, None, eps).to(x.dtype)


def launch_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The norm of x, of any dtype that the kernels know, in the dtype of its weight."""
    D, y = x.shape[-1], torch.empty(x.shape, dtype=weight_D.dtype, device=x.device)
    apart = D
    if not x.is_contiguous():
        x = x.reshape(-1, D)  # a view, unless rows lie at uneven distances
        x = x if x.stride(1) == 1 else x.contiguous()
        apart = x.stride(0)
    block, warps = _norm_tile(D)
    with torch.cuda.device_of(x):
        _rms_norm[(x.numel() // D,)](x, weight_D, y, apart, D, eps, BD=block, num_warps=warps, **FUSED)
    return y


@functools.cache
def _norm_tile(D: int) -> tuple[int, int]:
    """The power of two that holds a row, and warps."""
    block = triton.next_power_of_2(D)
    return block, 4 if block <= 2048 else 8 if block <= 8192 else 16


@jit
def _rms_norm(x_ptr, weight_ptr, y_ptr, x_sn, D, eps, BD: tl.constexpr):
    """One program per row."""
    n = tl.program_id(0).to(tl.int64)  # before any multiply: offsets pass 2**31
    d = tl.arange(0, BD)
    inside = d < D
    x = tl.load(x_ptr + n * x_sn + d, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=inside, other=0.0)
    normal = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    y = normal.to(weight.dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + n * D + d, y.to(weight.dtype), mask=inside)


# ---- silu_mul


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up of two tensors of one shape; silu(gate) is rounded to the dtype first."""
    if takes(gate, up) and gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous():
        return launch_silu_mul(gate, up)
    return reference_silu_mul(gate, up)


def reference_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    # whoever made gate may keep it, so that is not changed in place; what SiLU gives is ours
    return F.silu(gate).mul_(up)


def launch_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    y, size = torch.empty_like(gate), gate.numel()
    with torch.cuda.device_of(gate):
        _silu_mul[(-(-size // BLOCK),)](gate, up, y, size, BLOCK=BLOCK, num_warps=4, **FUSED)
    return y


@jit
def _silu_mul(gate_ptr, up_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.load(gate_ptr + i, mask=inside, other=0.0)
    up = tl.load(up_ptr + i, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(y_ptr + i, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)
