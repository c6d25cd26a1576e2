"""decode: one token of each row through a whole Llama on a CPU, in one call of C that reads every weight once.

The model's own modules are its slow twin: `fastweights.fused` decides which of the two runs. Records are numpy
structures, field for field those of `cpu.c` and `decode_body.inc`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu import library

POINTER, LONG = np.uint64, np.int64
WEIGHTS = ("norm1", "q", "k", "v", "o", "norm2", "gate", "up", "down")
BIASES = ("qb", "kb", "vb", "ob", "gateb", "upb", "downb")
LAYER = np.dtype([(name, POINTER) for name in (*WEIGHTS, *BIASES, "K", "V", "tape")] + [("window", LONG)])
POINTERS = ("U", "K", "bias", "w", "birth", "h", "square", "frozen", "a", "c", "u", "scale")
FAST = np.dtype([(n, POINTER) for n in POINTERS] + [(n, LONG) for n in ("O", "I", "R", "n", "slot", "event")])


def decode(
    layers: np.ndarray,
    fast: np.ndarray,
    which: np.ndarray,
    norm_D: Tensor,
    head_VD: Tensor,
    x_BD: Tensor,
    frequency: Tensor,
    position_B: Tensor,
    slot_B: Tensor,
    scratch: Tensor,
    sizes: tuple[int, int, int, int],
    slots: int,
    eps: float,
    tape: int = 0,
) -> Tensor:
    """Logits [B, V] of embeddings x [B, D], float32; all contiguous, on the CPU.

    x holds the residual stream after the last layer afterwards.

    Weights, KV cache and logits are float32, or all of them bfloat16: then every sum is a float32 one, rounded once.

    layers: LAYER [L]; their window: how many positions a token sees, with its own; 0: all before it. fast: FAST [N],
    what is plastic; which [L, 3] int64: the record of each layer's gate, up and down, -1 where it is frozen. frequency
    [E/2]: rope's angle per position. position, slot [B] int64: each row's position, and where its key and value are
    stored. sizes: F, H, KH, E. slots: S of the cache. scratch: B (H E + 2 F + D + H S + threads H (E + 2)) numbers.
    tape: how far apart the rows of the layers' tapes lie; a layer without one leaves nothing.
    """
    helper = library()
    assert helper is not None
    (B, D), V = x_BD.shape, len(head_VD)
    y_BV = head_VD.new_empty(B, V)
    tensors = (norm_D, head_VD, x_BD, y_BV, frequency, position_B, slot_B, scratch)
    tables = (layers.ctypes.data, len(layers), fast.ctypes.data, which.ctypes.data)
    F, H, KH, E = sizes
    numbers = (B, D, F, H, KH, E, slots, V, tape, eps, torch.get_num_threads())
    run = helper.decode_float32 if head_VD.dtype == torch.float32 else helper.decode_bfloat16
    run(*tables, *(t.data_ptr() for t in tensors), *numbers)
    return y_BV


def put(fast: np.ndarray, rows: int) -> bool:
    """Writes each record's event into its slot: u, k = scale · h and bias key of every row, and its number.

    False, and nothing is written, if one of them is not finite.
    """
    helper = library()
    assert helper is not None
    return not helper.put(fast.ctypes.data, len(fast), rows)
