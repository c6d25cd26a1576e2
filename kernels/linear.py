"""linear: W h + b. For a few rows of float32 or bfloat16 on a CPU, a product in C that reads W once at memory speed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import MOST_ROWS, library

LEAST_WEIGHTS = 1 << 16  # below this a product costs less than waking the threads


def linear(h: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """W h + b, [..., O] in h's dtype; h [..., I]."""
    if (
        h.dtype in (torch.float32, torch.bfloat16)
        and h.numel() <= MOST_ROWS * h.shape[-1]
        and weight_OI.numel() >= LEAST_WEIGHTS
        and h.is_cpu
        and not h.requires_grad
        and not torch.compiler.is_compiling()
        and type(h) is Tensor
        and weight_OI.dtype == h.dtype
        and weight_OI.is_contiguous()
        and (helper := library()) is not None
    ):
        h = h.contiguous()
        O, I = weight_OI.shape
        y = h.new_empty(*h.shape[:-1], O)
        product = helper.gemv if h.dtype == torch.float32 else helper.gemv_bfloat16
        pointers = (weight_OI.data_ptr(), h.data_ptr(), None if bias_O is None else bias_O.data_ptr(), y.data_ptr())
        product(*pointers, O, I, h.numel() // I, torch.get_num_threads())
        return y
    return F.linear(h, weight_OI, bias_O)
