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
        ("scale", ctypes.c_float),
    ]


def attention(
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    visible: Tensor | None,
    start: int | None,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """z [B, T, H, E] of T queries.

    visible: [B or 1, 1, T, S], True where a query may look; None: causal, query t looks at keys 0 to S − T + t.
    start: S − T where `visible` says just that as well, None where it says anything else.
    scale: of the scores; None: 1 / √E. cap: scores become cap · tanh(scores / cap) before the mask.
    """
    (B, H, T, E), (KH, S) = q_BHTE.shape, k_BKSE.shape[1:3]
    scale = E**-0.5 if scale is None else scale
    if cap is not None:
        return _capped(q_BHTE, k_BKSE, v_BKSE, visible, scale, cap)
    helper = c_library_for(q_BHTE, k_BKSE, v_BKSE) if T >= TALL and E >= TALL and start is not None else None
    if (
        helper is None
        or not hasattr(helper, "attention")
        or q_BHTE.dtype != torch.float32
        or any(t.stride(-1) != 1 for t in (q_BHTE, k_BKSE, v_BKSE))
    ):
        return _torch(q_BHTE, k_BKSE, v_BKSE, visible, start, scale)
    threads, y = torch.get_num_threads(), q_BHTE.new_empty(B, T, H, E)
    scratch = q_BHTE.new_empty(threads * ACROSS * (2 * E + KEYS))
    pointers = [t.data_ptr() for t in (q_BHTE, k_BKSE, v_BKSE, y)]
    strides = [n for t in (q_BHTE, k_BKSE, v_BKSE) for n in t.stride()[:3]]
    arguments = Arguments(*pointers, *strides, B, H, KH, T, S - T, E, scale)
    helper.attention(ctypes.byref(arguments), scratch.data_ptr(), threads)
    return y


def _torch(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, start: int | None, scale: float) -> Tensor:
    (B, heads, tokens, E), (kv_heads, places), gpu = q.shape, k.shape[1:3], on_gpu(q)
    grouped = heads != kv_heads
    if gpu and start and tokens > 1 and _takes_flash(q, k, v, grouped):
        return _flash(q, k, v, scale).transpose(1, 2)
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
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=scale, enable_gqa=grouped)
    return z.reshape(B, heads, tokens, E).transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, cap: float) -> Tensor:
    """By way of the scores, because no kernel of torch caps them; the softmax is float32 at least."""
    T, S, times = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    if visible is None:
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = (cap * torch.tanh(q @ k.mT * scale / cap)).masked_fill(~visible, -torch.inf)
    pattern = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (pattern @ v).transpose(1, 2)


def _takes_flash(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """Whether `_flash` takes these; NVIDIA's alone, because on AMD nobody has seen where its diagonal lies."""
    able = q.shape[3] % 8 == 0 and torch.version.hip is None
    return able and can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped))


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention whose queries are the last T places.

    torch's public form of it, `torch.nn.attention.bias.causal_lower_right`, calls this as well. But importing that
    imports torch's compiler, which takes seconds.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=scale)[0]
