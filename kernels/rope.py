"""rope: queries and keys turned by their positions, and keys and values put into the cache.

    y = (x₁ cos₁ − x₂ sin₁, x₂ cos₂ + x₁ sin₂) of the halves of each head

On a GPU one kernel does all of it, where torch launches eight for rope and more for the cache. It rounds once, at the
end; torch rounds half precision after the first product as well.

Shape suffixes: B rows, T tokens, S places of the cache, H heads, K key/value heads, E head width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .elementwise import takes
from .values import FUSED, jit, tl, triton

HEADS = 8  # of one program

Rope = tuple[Tensor, Tensor]  # cos and sin, each [B, 1, T, E] in the model's dtype


class Into(NamedTuple):
    """Where this pass's keys and values go: places `start` onwards, or else each token's own place."""

    keys_BKSE: Tensor
    values_BKSE: Tensor
    start: int | None
    place_BT: Tensor | None  # int64, contiguous; −1 is the last place


# ---- torch


def reference(x_BHTE: Tensor, rope: Rope) -> Tensor:
    """The definition, in torch; it keeps x's layout. Channels beyond those of the rope stay as they are."""
    cos, sin = rope
    if cos.shape[-1] < x_BHTE.shape[-1]:
        turned, rest = x_BHTE.split((cos.shape[-1], x_BHTE.shape[-1] - cos.shape[-1]), dim=-1)
        return torch.cat((reference(turned, rope), rest), dim=-1)
    half = x_BHTE.shape[-1] // 2
    y_BHTE = x_BHTE * cos
    y_BHTE[..., :half].addcmul_(x_BHTE[..., half:], sin[..., :half], value=-1)
    y_BHTE[..., half:].addcmul_(x_BHTE[..., :half], sin[..., half:])
    return y_BHTE


# ---- the choosers


def rotate(q_BHTE: Tensor, k_BKTE: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Both turned by their positions."""
    if takes(q_BHTE, k_BKTE, *rope) and _fit(q_BHTE, k_BKTE, k_BKTE, rope):
        return launch(q_BHTE, k_BKTE, rope)
    return reference(q_BHTE, rope), reference(k_BKTE, rope)


def rotate_into(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, rope: Rope, into: Into) -> Tensor | None:
    """q turned; k, turned, and v are in the cache then. None: Triton cannot do it, and nothing has changed."""
    keys, values = into.keys_BKSE, into.values_BKSE
    if not takes(q_BHTE, k_BKTE, v_BKTE, *rope, keys, values) or not _fit(q_BHTE, k_BKTE, v_BKTE, rope):
        return None
    (B, K, T, E), (_, _, S, _) = k_BKTE.shape, keys.shape
    if keys.shape != (B, K, S, E) or keys.stride(-1) != 1 or keys.stride() != values.stride():
        return None
    if into.place_BT is None and (into.start is None or into.start + T > S):
        return None
    return launch(q_BHTE, k_BKTE, rope, v_BKTE, into)[0]


def _fit(q_BHTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, rope: Rope) -> bool:
    """Whether shapes agree, heads have two halves, and each head lies in one piece."""
    (B, _, T, E), (cos, sin) = q_BHTE.shape, rope
    return (
        k_BKTE.shape == v_BKTE.shape == (B, k_BKTE.shape[1], T, E)
        and cos.shape == sin.shape == (len(cos), 1, T, E)  # a rope of a part of each head: torch
        and len(cos) in (1, B)
        and cos.stride() == sin.stride()
        and E % 2 == 0
        and q_BHTE.stride(3) == k_BKTE.stride(3) == v_BKTE.stride(3) == cos.stride(3) == 1
    )


# ---- Triton


def launch(
    q_BHTE: Tensor, k_BKTE: Tensor, rope: Rope, v_BKTE: Tensor | None = None, into: Into | None = None
) -> tuple[Tensor, Tensor]:
    """q turned, as [B, T, H, E] lies, and k turned, so as well or where `into` says. One launch."""
    (B, H, T, E), K, (cos, sin) = q_BHTE.shape, k_BKTE.shape[1], rope
    q = q_BHTE.new_empty(B, T, H, E).transpose(1, 2)
    if into is None:
        k = k_BKTE.new_empty(B, T, K, E).transpose(1, 2)
        into = Into(k, k, 0, None)
    k, values, start, place_BT = into
    v_strides = k_BKTE.stride() if v_BKTE is None else v_BKTE.stride()
    q_parts, k_parts, half = _parts(H, K, E)
    with torch.cuda.device_of(q_BHTE):
        _rope[(T, q_parts + k_parts * (1 if v_BKTE is None else 2), B)](
            q_BHTE, k_BKTE, v_BKTE, cos, sin, place_BT, q, k, values, start or 0, k.shape[2],
            *q_BHTE.stride()[:3], *k_BKTE.stride()[:3], *v_strides[:3],
            cos.stride(0) if len(cos) > 1 else 0, cos.stride(2), *k.stride()[:3], H, K,
            E=E, BH=HEADS, BE=half, num_warps=4, **FUSED,
        )  # fmt: skip
    return q, k


@functools.cache
def _parts(H: int, K: int, E: int) -> tuple[int, int, int]:
    """Programs for q and for k at each token, and the power of two that holds half a head."""
    return -(-H // HEADS), -(-K // HEADS), triton.next_power_of_2(E // 2)


@jit(do_not_specialize=["start", "places"])
def _rope(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, place_ptr, q_out_ptr, k_out_ptr, v_out_ptr, start, places,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, rope_sb, rope_st, out_sb, out_sh, out_st, H, K,
    E: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One program: BH heads of q, of k or of v at one token. v_ptr None: q and k alone."""
    t, T = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)  # before any multiply: offsets pass 2**31
    place = t + start
    if place_ptr is not None:
        place = tl.load(place_ptr + b * T + t)
        place = tl.where(place < 0, place + places, place)
    out = b * out_sb + place * out_st
    rope = b * rope_sb + t * rope_st
    q_parts, k_parts = tl.cdiv(H, BH), tl.cdiv(K, BH)
    if part < q_parts:
        q_out = q_out_ptr + (b * T + t) * H * E
        _heads(q_ptr + b * q_sb + t * q_st, q_sh, q_out, E, part, H, cos_ptr + rope, sin_ptr + rope, True, E, BH, BE)
    elif part < q_parts + k_parts:
        k = k_ptr + b * k_sb + t * k_st
        _heads(k, k_sh, k_out_ptr + out, out_sh, part - q_parts, K, cos_ptr + rope, sin_ptr + rope, True, E, BH, BE)
    else:
        if v_ptr is not None:
            v, first = v_ptr + b * v_sb + t * v_st, part - q_parts - k_parts
            _heads(v, v_sh, v_out_ptr + out, out_sh, first, K, cos_ptr, sin_ptr, False, E, BH, BE)


@jit
def _heads(
    x_ptr, x_sh, y_ptr, y_sh, part, heads, cos_ptr, sin_ptr,
    TURN: tl.constexpr, E: tl.constexpr, BH: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Heads `part` · BH onwards of one token, turned or as they are."""
    h = (part * BH + tl.arange(0, BH)).to(tl.int64)[:, None]
    e = tl.arange(0, BE)[None, :]
    inside = (h < heads) & (e < E // 2)
    x1 = tl.load(x_ptr + h * x_sh + e, mask=inside, other=0.0)
    x2 = tl.load(x_ptr + h * x_sh + e + E // 2, mask=inside, other=0.0)
    y1, y2 = x1, x2
    if TURN:
        width = e < E // 2
        cos1 = tl.load(cos_ptr + e, mask=width, other=0.0).to(tl.float32)
        sin1 = tl.load(sin_ptr + e, mask=width, other=0.0).to(tl.float32)
        cos2 = tl.load(cos_ptr + e + E // 2, mask=width, other=0.0).to(tl.float32)
        sin2 = tl.load(sin_ptr + e + E // 2, mask=width, other=0.0).to(tl.float32)
        wide1, wide2 = x1.to(tl.float32), x2.to(tl.float32)
        y1 = (wide1 * cos1 - wide2 * sin1).to(x1.dtype)
        y2 = (wide2 * cos2 + wide1 * sin2).to(x1.dtype)
    tl.store(y_ptr + h * y_sh + e, y1, mask=inside)
    tl.store(y_ptr + h * y_sh + e + E // 2, y2, mask=inside)
