"""decode: one token of each row through a whole float32 Llama on a CPU, in one call of C that reads every weight once.

The model's own modules are its slow twin: `fastweights.fused` decides which of the two runs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cpu import library


class Fast(ctypes.Structure):
    """ΔW of one linear as C reads it, and what it leaves: see `cpu.c`."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("U", "K", "bias", "w", "h", "frozen", "a", "c")],
        *[(name, ctypes.c_long) for name in ("n", "R")],
    ]


WEIGHTS = ("norm1", "q", "k", "v", "o", "norm2", "gate", "up", "down")
BIASES = ("qb", "kb", "vb", "ob", "gateb", "upb", "downb")


class Layer(ctypes.Structure):
    """One block's weights, cache and fast weights (gate, up, down) as C reads them."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in (*WEIGHTS, *BIASES, "K", "V")],
        ("fast", ctypes.POINTER(Fast) * 3),
    ]


def decode(
    layers: ctypes.Array[Layer],
    norm_D: Tensor,
    head_VD: Tensor,
    x_BD: Tensor,
    rope: tuple[Tensor, Tensor],
    slot_B: Tensor,
    length_B: Tensor,
    scratch: Tensor,
    sizes: tuple[int, int, int, int],
    slots: int,
    eps: float,
) -> Tensor:
    """Logits [B, V] of embeddings x [B, D], which are overwritten; float32, contiguous, on the CPU.

    rope: cos and sin, [B, E] each. slot, length [B] int64: where each row's key and value are stored, and how many
    slots it looks at. sizes: F, H, KH, E. slots: S of the cache. scratch: B (2 H E + 2 F + D + H S) numbers.
    """
    helper = library()
    assert helper is not None
    (B, D), V = x_BD.shape, len(head_VD)
    y_BV = torch.empty(B, V)
    pointers = [t.data_ptr() for t in (norm_D, head_VD, x_BD, y_BV, *rope, slot_B, length_B, scratch)]
    F, H, KH, E = sizes
    table = ctypes.addressof(layers)
    helper.decode(table, len(layers), *pointers, B, D, F, H, KH, E, slots, V, eps, torch.get_num_threads())
    return y_BV
