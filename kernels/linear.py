"""linear: W h + b, and the products of the scan, of the read and of a backward.

On a CPU a few rows of float32 or bfloat16 go to a product in C that reads W once at memory speed. More rows of float32
go to another where there is AVX-512 and MKL leaves it unused, on processors that are not Intel's: less than half of
torch's time on Zen 5. Everything else, and whatever is differentiated or traced, is torch's.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .cpu import ACROSS, MOST_ROWS, TALL, library, mkl_uses_avx512

LEAST_WEIGHTS = 1 << 16  # of a few rows: below this a product costs less than waking the threads
LEAST_TERMS = 1 << 19  # of more rows


def linear(h: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """W h + b, [..., O] in h's dtype; h [..., I]."""
    O, I = weight_OI.shape
    rows = h.numel() // I
    helper = c_library_for(h, weight_OI, bias_O) if h.shape[-1] == I and weight_OI.is_contiguous() else None
    if helper is None or (rows <= MOST_ROWS and O * I < LEAST_WEIGHTS):
        return F.linear(h, weight_OI, bias_O)
    bias = None if bias_O is None else bias_O.data_ptr()
    if rows > MOST_ROWS:
        return _rows(helper, h, weight_OI, bias) if _many(helper, h, rows, O, I) else F.linear(h, weight_OI, bias_O)
    h = h.contiguous()
    y = h.new_empty(*h.shape[:-1], O)
    few = helper.gemv if h.dtype == torch.float32 else helper.gemv_bfloat16
    few(weight_OI.data_ptr(), h.data_ptr(), bias, y.data_ptr(), O, I, rows, torch.get_num_threads())
    return y


def product(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x Wᵀ, [..., O]; x [..., I], W of any strides."""
    O, I = weight_OI.shape
    helper = c_library_for(x, weight_OI) if x.shape[-1] == I else None
    if helper is None or not _many(helper, x, x.numel() // I, O, I):
        return x @ weight_OI.T
    if weight_OI.stride(0) != 1 or O < ACROSS:
        return _rows(helper, x, weight_OI.contiguous(), None)
    y = x.new_empty(*x.shape[:-1], O)
    _columns(helper, y.view(-1, O), x.reshape(-1, I), weight_OI.T, add=False)
    return y


def product_back(d_MO: Tensor, weight_OI: Tensor) -> Tensor:
    """d W, [M, I] in d's dtype, which is float32 where W is in half precision: what a gradient is behind a linear."""
    (M, O), I = d_MO.shape, weight_OI.shape[1]
    few = M <= MOST_ROWS and O * I >= LEAST_WEIGHTS and d_MO.dtype == torch.float32
    stored = weight_OI.is_cpu and weight_OI.is_contiguous() and weight_OI.dtype in (torch.float32, torch.bfloat16)
    helper = c_library_for(d_MO) if few and stored else None
    if helper is None:
        return (d_MO.to(weight_OI.dtype) @ weight_OI).to(d_MO.dtype)
    threads, d_MO = torch.get_num_threads(), d_MO.contiguous()
    y_MI, part = d_MO.new_empty(M, I), d_MO.new_empty(threads * M * I)
    run = helper.back_float32 if weight_OI.dtype == torch.float32 else helper.back_bfloat16
    run(weight_OI.data_ptr(), d_MO.data_ptr(), y_MI.data_ptr(), part.data_ptr(), O, I, M, threads)
    return y_MI


def add_product_(y_MO: Tensor, x_MI: Tensor, weight_IO: Tensor) -> None:
    """y += x W, in place; rows of each contiguous in themselves."""
    (M, I), O = x_MI.shape, weight_IO.shape[1]
    helper = c_library_for(x_MI, weight_IO, y_MO)
    if helper is None or O < ACROSS or not _many(helper, x_MI, M, O, I):
        y_MO.addmm_(x_MI, weight_IO)
    else:
        _columns(helper, y_MO, x_MI, weight_IO, add=True)


def _rows(helper: ctypes.CDLL, h: Tensor, weight_OI: Tensor, bias: int | None) -> Tensor:
    h, (O, I), threads = h.contiguous(), weight_OI.shape, torch.get_num_threads()
    y, scratch = h.new_empty(*h.shape[:-1], O), h.new_empty(threads * I * ACROSS)
    pointers = (weight_OI.data_ptr(), h.data_ptr(), bias, y.data_ptr())
    helper.product_rows(*pointers, O, I, h.numel() // I, scratch.data_ptr(), threads)
    return y


def _columns(helper: ctypes.CDLL, y_MO: Tensor, x_MI: Tensor, weight_IO: Tensor, add: bool) -> None:
    (M, I), O = x_MI.shape, weight_IO.shape[1]
    if x_MI.stride(1) != 1:
        x_MI = x_MI.contiguous()
    assert y_MO.stride(1) == weight_IO.stride(1) == 1
    where = [number for t in (weight_IO, x_MI, y_MO) for number in (t.data_ptr(), t.stride(0))]
    helper.product_columns(*where, O, I, M, add, torch.get_num_threads())


def _many(helper: ctypes.CDLL, x: Tensor, rows: int, O: int, I: int) -> bool:
    """Whether the product of many rows is there, takes this one, and is worth it."""
    fits = rows >= TALL and O >= TALL and rows * O * I >= LEAST_TERMS
    return fits and x.dtype == torch.float32 and hasattr(helper, "product_rows") and not mkl_uses_avx512()


def c_library_for(h: Tensor, *others: Tensor | None) -> ctypes.CDLL | None:
    """The C library if it can take these tensors: CPU, one dtype that it knows, not differentiated and not traced."""
    tensors = [h, *(t for t in others if t is not None)]
    if (
        h.dtype not in (torch.float32, torch.bfloat16)
        or type(h) is not Tensor
        or any(t.dtype != h.dtype or not t.is_cpu for t in tensors)
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        or torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    ):
        return None
    return library()
