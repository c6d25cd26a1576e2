"""attention: softmax(q kᵀ / √E + mask) v, causal or under a mask, for groups of query heads that share keys and values.

On a CPU with AVX-512 a causal pass of many float32 queries runs in C, on the tiles of `linear`; everything else is
torch's scaled_dot_product_attention.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import ACROSS, KEYS, TALL
from .linear import c_library_for

STRIDES = [f"{tensor}_{dimension}" for tensor in "qkv" for dimension in "bht"]


class Arguments(ctypes.Structure):
    """`Attention` of tiles.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "y")),
        *((name, ctypes.c_long) for name in (*STRIDES, "B", "H", "KH", "T", "start", "E")),
    ]


def attention(q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, visible: Tensor | None, start: int | None) -> Tensor:
    """z [B, T, H, E] of T queries.

    visible: [B or 1, 1, T, S], True where a query may look; None: causal, query t looks at keys 0 to S − T + t.
    start: S − T where `visible` says just that as well, None where it says anything else.
    """
    (B, H, T, E), (KH, S) = q_BHTE.shape, k_BKSE.shape[1:3]
    helper = c_library_for(q_BHTE, k_BKSE, v_BKSE) if T >= TALL and E >= TALL and start is not None else None
    if (
        helper is None
        or not hasattr(helper, "attention")
        or q_BHTE.dtype != torch.float32
        or any(t.stride(-1) != 1 for t in (q_BHTE, k_BKSE, v_BKSE))
    ):
        return _torch(q_BHTE, k_BKSE, v_BKSE, visible)
    threads, y = torch.get_num_threads(), q_BHTE.new_empty(B, T, H, E)
    scratch = q_BHTE.new_empty(threads * ACROSS * (2 * E + KEYS))
    pointers = [t.data_ptr() for t in (q_BHTE, k_BKSE, v_BKSE, y)]
    strides = [n for t in (q_BHTE, k_BKSE, v_BKSE) for n in t.stride()[:3]]
    arguments = Arguments(*pointers, *strides, B, H, KH, T, S - T, E)
    helper.attention(ctypes.byref(arguments), scratch.data_ptr(), threads)
    return y


def _torch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    B, heads, tokens, E = q.shape
    grouped = heads != k.shape[1]
    if grouped and tokens == 1 and visible is not None:
        # a group's queries stand side by side like tokens: CUDA's fused kernels take no mask with enable_gqa
        q, grouped = q.reshape(B, k.shape[1], -1, E), False
    causal = visible is None and tokens > 1
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=grouped)
    return z.reshape(B, heads, tokens, E).transpose(1, 2)
