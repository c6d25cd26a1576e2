"""decode: one token of each row through a whole model on a CPU, in one call of C that reads every weight once.

The model's own modules are its slow twin: `fastweights.engine.table` decides which of the two runs. Records are numpy
structures, field for field those of `cpu.c` and `decode_body.inc`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .cpu import library

POINTER, LONG, FLOAT = np.uint64, np.int64, np.float32
NORMS = ("rms", "rms1", "rms_once", "layer")  # in the order of their numbers in cpu.c


def _record(pointers: str, longs: str, floats: str = "") -> np.dtype:
    kinds = ((pointers, POINTER), (longs, LONG), (floats, FLOAT))
    return np.dtype([(name, kind) for names, kind in kinds for name in names.split()], align=True)


LAYER = _record(
    "q k v o up down gate before_attention after_attention before_mlp after_mlp q_norm k_norm "
    "qb kb vb ob gateb upb downb before_attentionb before_mlpb K V tape",
    "window rope",
    "scale",
)
MODEL = _record("norm normb head frequency", "D F H KH E V ropes turned apart norms phi whole parallel", "eps cap")
FAST = _record("U K bias w birth h square frozen a c u scale", "O I R n slot event")


def decode(
    model: np.ndarray,
    layers: np.ndarray,
    fast: np.ndarray,
    which: np.ndarray,
    head_VD: Tensor,
    x_BD: Tensor,
    position_B: Tensor,
    slot_B: Tensor,
    scratch: Tensor,
    slots: int,
    tape: int = 0,
) -> Tensor:
    """Logits [B, V], before any cap, of embeddings x [B, D], float32; all contiguous, on the CPU.

    x holds the residual stream after the last layer afterwards.

    Weights, KV cache and logits are float32, or all of them bfloat16: then every sum is a float32 one, rounded once.

    model: one MODEL. layers: LAYER [L]. fast: FAST [N], what is plastic; which [L, 3] int64: the record of each
    layer's gate, up and down, -1 where it is frozen; gate and up of one linear have one record. head: what `model`
    names. position, slot [B] int64: each row's position, and where its key and value are stored. scratch:
    B (H E + 2 F + D + H S + threads H (E + 2)) numbers. slots: S of the cache. tape: how far apart the rows of the
    layers' tapes lie; a layer without one leaves nothing.
    """
    helper = library()
    assert helper is not None
    B, V = len(x_BD), len(head_VD)
    y_BV = head_VD.new_empty(B, V)
    tables = (model.ctypes.data, layers.ctypes.data, len(layers), fast.ctypes.data, which.ctypes.data)
    tensors = (x_BD, y_BV, position_B, slot_B, scratch)
    run = helper.decode_float32 if head_VD.dtype == torch.float32 else helper.decode_bfloat16
    run(*tables, *(t.data_ptr() for t in tensors), B, slots, tape, torch.get_num_threads())
    return y_BV


def put(fast: np.ndarray, rows: int) -> bool:
    """Writes each record's event into its slot: u, k = scale · h and bias key of every row, and its number.

    False, and nothing is written, if one of them is not finite.
    """
    helper = library()
    assert helper is not None
    return not helper.put(fast.ctypes.data, len(fast), rows)
