"""attention: softmax(q kᵀ / √E + mask) v, causal or under a mask, for groups of query heads that share keys and values.

On a CPU with AVX-512 a causal pass of many float32 queries runs in C, on the tiles of `linear`; everything else is
torch's scaled_dot_product_attention, asked on a GPU in a form that one of its fused kernels takes.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from .cpu import ACROSS, KEYS, TALL
from .elementwise import on_gpu
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
        return _torch(q_BHTE, k_BKSE, v_BKSE, visible, start)
    threads, y = torch.get_num_threads(), q_BHTE.new_empty(B, T, H, E)
    scratch = q_BHTE.new_empty(threads * ACROSS * (2 * E + KEYS))
    pointers = [t.data_ptr() for t in (q_BHTE, k_BKSE, v_BKSE, y)]
    strides = [n for t in (q_BHTE, k_BKSE, v_BKSE) for n in t.stride()[:3]]
    arguments = Arguments(*pointers, *strides, B, H, KH, T, S - T, E)
    helper.attention(ctypes.byref(arguments), scratch.data_ptr(), threads)
    return y


def _torch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, start: int | None) -> Tensor:
    (B, heads, tokens, E), (kv_heads, places), gpu = q.shape, k.shape[1:3], on_gpu(q)
    grouped = heads != kv_heads
    if gpu and start and tokens > 1 and _takes_flash(q, k, v, grouped):
        return _flash(q, k, v).transpose(1, 2)
    if visible is None and 1 < tokens < places:  # torch's own causal attention begins at the first key
        visible = torch.ones(tokens, places, dtype=torch.bool, device=q.device).tril(places - tokens)
    # on a GPU flash attention alone takes groups, and it takes neither masks nor float32
    if grouped and (visible is not None or (gpu and q.dtype == torch.float32)):
        if tokens == 1:  # a group's queries stand side by side like tokens
            q, grouped = q.reshape(B, kv_heads, -1, E), False
        elif gpu:
            k, v = (x[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2) for x in (k, v))
            grouped = False
    causal = visible is None and tokens > 1
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, enable_gqa=grouped)
    return z.reshape(B, heads, tokens, E).transpose(1, 2)


def _takes_flash(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """Whether `_flash` takes these; NVIDIA's alone, because on AMD nobody has seen where its diagonal lies."""
    able = q.shape[3] % 8 == 0 and torch.version.hip is None
    return able and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention whose queries are the last T places.

    torch's public form of it, `torch.nn.attention.bias.causal_lower_right`, calls this as well. But importing that
    imports torch's compiler, which takes seconds.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
