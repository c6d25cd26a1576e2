"""linear: W h + b, and product: x Wᵀ. On a CPU a few rows by a product in C that reads W once at memory speed, more
rows of float32 by oneDNN.

torch computes float32 products with MKL, which on processors that are not Intel's leaves AVX-512 unused: oneDNN, which
torch brings along as well, took less than half of its time on Zen 5. Half precision goes to oneDNN in torch already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .cpu import MOST_ROWS, library

LEAST_WEIGHTS = 1 << 16  # below this a product costs less than waking the threads
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(h: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """W h + b, [..., O] in h's dtype; h [..., I]."""
    if weight_OI.numel() < LEAST_WEIGHTS or not _ours(h, weight_OI, bias_O):
        return F.linear(h, weight_OI, bias_O)
    if h.numel() > MOST_ROWS * h.shape[-1]:
        return _onednn(h, weight_OI, bias_O) if h.dtype == torch.float32 else F.linear(h, weight_OI, bias_O)
    if not weight_OI.is_contiguous() or (helper := library()) is None:
        return F.linear(h, weight_OI, bias_O)
    h = h.contiguous()
    O, I = weight_OI.shape
    y = h.new_empty(*h.shape[:-1], O)
    few = helper.gemv if h.dtype == torch.float32 else helper.gemv_bfloat16
    pointers = (weight_OI.data_ptr(), h.data_ptr(), None if bias_O is None else bias_O.data_ptr(), y.data_ptr())
    few(*pointers, O, I, h.numel() // I, torch.get_num_threads())
    return y


def product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x Wᵀ, [..., O]; x [..., I] and W of any strides."""
    if weight_OI.numel() < LEAST_WEIGHTS or x.dtype != torch.float32 or not _ours(x, weight_OI):
        return x @ weight_OI.T
    return _onednn(x, weight_OI, None)


def _ours(h: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> bool:
    """Whether these are plain CPU tensors through which nobody differentiates or traces."""
    return (
        h.dtype in (torch.float32, torch.bfloat16)
        and weight_OI.dtype == h.dtype
        and h.is_cpu
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (h, weight_OI, bias_O) if t is not None))
        and not torch.compiler.is_compiling()
        and type(h) is Tensor
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _onednn(h: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if not ONEDNN or not torch.backends.mkldnn.enabled:
        return F.linear(h, weight_OI, bias_O)
    return torch.ops.mkldnn._linear_pointwise(h, weight_OI, bias_O, "none", [], "")
