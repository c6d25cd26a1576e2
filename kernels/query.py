"""query: attention of one token of each row to the tokens before it, with rope and the append to the cache inside.

    z = softmax(q kᵀ / √E) v        over the keys 0 to position, the last of which is this token's own

Under a window those are the last `window` of them.

Several programs share the keys of one KV head. The last of them to arrive puts their parts together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .products import SINGLE, announce, chained, wait
from .values import jit, require_triton, tl, triton

KEYS = 64  # of one program at least
PROGRAMS = 264  # about two for each multiprocessor


class Where(NamedTuple):
    """Where the tokens of a pass stand, one of each row."""

    position_B: Tensor  # int64: of rope; the token sees the places before it, and itself
    place_B: Tensor  # int64: where its key and value are stored
    cos_Pe: Tensor  # rope's cosines and sines of every position, half a head wide, in the model's dtype
    sin_Pe: Tensor


def reference(
    qkv_BO: Tensor, where: Where, K_BKSE: Tensor, V_BKSE: Tensor, heads: int, end: int, window: int
) -> Tensor:
    """The definition, in torch."""
    (B, KH, _, E), row_B = K_BKSE.shape, torch.arange(len(qkv_BO), device=qkv_BO.device)
    q, k, v = (part.unflatten(1, (-1, E)) for part in qkv_BO.split([heads * E, KH * E, KH * E], dim=1))
    cos_B1e, sin_B1e = where.cos_Pe[where.position_B][:, None], where.sin_Pe[where.position_B][:, None]

    def rotated(x_BHE: Tensor) -> Tensor:
        x, y = x_BHE.chunk(2, dim=2)
        return torch.cat((x * cos_B1e - y * sin_B1e, y * cos_B1e + x * sin_B1e), dim=2)

    q, k = rotated(q), rotated(k)
    K_BKSE[row_B, :, where.place_B], V_BKSE[row_B, :, where.place_B] = k, v
    # a token that is padding stores nothing that is read, and sees itself alone
    before_BS = where.position_B[:, None] - torch.arange(end, device=qkv_BO.device)  # how many tokens a key lies back
    seen_BS = (before_BS > 0) & (before_BS < window)
    keys, values = (torch.cat((C[:, :, :end], own[:, :, None]), dim=2) for C, own in ((K_BKSE, k), (V_BKSE, v)))
    seen_BS = torch.cat((seen_BS, seen_BS.new_ones(B, 1)), dim=1)
    q = q.unflatten(1, (KH, -1)).to(torch.promote_types(q.dtype, torch.float32))
    scores = (q @ keys.to(q.dtype).mT / E**0.5).masked_fill(~seen_BS[:, None, None], float("-inf"))
    return (scores.softmax(-1) @ values.to(q.dtype)).flatten(1).to(qkv_BO.dtype)


@jit
def _turned(x_ptr, e, cos_ptr, sin_ptr, E: tl.constexpr, mask):
    """Rope of a head: channel e turns with the channel half a head away."""
    half: tl.constexpr = E // 2
    low = e < half
    other = tl.where(low, e + half, e - half)
    x = tl.load(x_ptr + e, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + other, mask=mask, other=0.0).to(tl.float32)
    pair = tl.where(low, e, e - half)
    cos = tl.load(cos_ptr + pair, mask=e < E, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=e < E, other=0.0).to(tl.float32)
    return x * cos + tl.where(low, -y, y) * sin


@jit
def _attend(
    qkv_ptr, position_ptr, place_ptr, cos_ptr, sin_ptr, K_ptr, V_ptr, z_ptr, acc_ptr, sum_ptr, arrived_ptr,
    H, KH, places, window, per, scale,
    G: tl.constexpr, BG: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The queries of one KV head of one row, over `per` of the last `window` keys. scale: log2(e) / √E.

    acc [B, H, programs, E] and sum [B, H, programs, 2] hold the parts: unnormalised z; the largest score, and the sum
    of exponentials under it. arrived [B, KH] counts; it is 0 before and after.
    """
    announce(PDL)
    wait(PDL)
    kh, part, b = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    position = tl.load(position_ptr + b)
    oldest = tl.maximum(position + 1 - window, 0)  # the first key it sees
    parts = (position - oldest) // per + 1  # the last has this token's own key
    if part < parts:
        dtype: tl.constexpr = K_ptr.dtype.element_ty
        e = tl.arange(0, BE)
        g = tl.arange(0, BG)
        head = kh * G + g
        in_e, in_q = e < E, (g < G)[:, None] & (e < E)[None, :]
        cos_row, sin_row = cos_ptr + position * (E // 2), sin_ptr + position * (E // 2)
        token = qkv_ptr + b * (H + 2 * KH) * E
        q_row = token + head[:, None] * E + tl.zeros([BG, BE], tl.int64)
        q = _turned(q_row, e[None, :], cos_row, sin_row, E, in_q).to(dtype)
        largest = tl.full([BG], float("-inf"), tl.float32)
        total = tl.full([BG], 0.0, tl.float32)
        acc = tl.full([BG, BE], 0.0, tl.float32)
        base = (b * KH + kh) * places
        first = oldest + part.to(tl.int64) * per
        last = tl.minimum(first + per, position)
        for s0 in range(first, last, BS):
            s = s0 + tl.arange(0, BS)
            inside = (s < last)[:, None] & in_e[None, :]
            K = tl.load(K_ptr + (base + s)[:, None] * E + e[None, :], mask=inside, other=0.0)
            V = tl.load(V_ptr + (base + s)[:, None] * E + e[None, :], mask=inside, other=0.0)
            score = tl.dot(q, tl.trans(K), input_precision=PRECISION) * scale
            score = tl.where((s < last)[None, :], score, float("-inf"))
            larger = tl.maximum(largest, tl.max(score, 1))
            p = tl.exp2(score - larger[:, None])
            shrunk = tl.exp2(largest - larger)
            total = total * shrunk + tl.sum(p, 1)
            acc = tl.dot(p.to(dtype), V, acc * shrunk[:, None], input_precision=PRECISION)
            largest = larger
        if part == parts - 1:
            k = _turned(token + (H + kh) * E + tl.zeros([BE], tl.int64), e, cos_row, sin_row, E, in_e).to(dtype)
            v = tl.load(token + (H + KH + kh) * E + e, mask=in_e, other=0.0)
            place = base + tl.load(place_ptr + b)
            tl.store(K_ptr + place * E + e, k, mask=in_e)
            tl.store(V_ptr + place * E + e, v, mask=in_e)
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
            larger = tl.maximum(largest, score)
            p = tl.exp2(score - larger)
            shrunk = tl.exp2(largest - larger)
            total = total * shrunk + p
            acc = acc * shrunk[:, None] + p[:, None] * v.to(tl.float32)[None, :]
            largest = larger
        z = z_ptr + (b * H + head)[:, None] * E + e[None, :]
        if parts == 1:
            tl.store(z, (acc / total[:, None]).to(z_ptr.dtype.element_ty), mask=in_q)
        else:
            most = tl.num_programs(1)
            mine = (b * H + head) * most + part
            tl.store(acc_ptr + mine[:, None] * E + e[None, :], acc, mask=in_q)
            tl.store(sum_ptr + mine * 2, largest, mask=g < G)
            tl.store(sum_ptr + mine * 2 + 1, total, mask=g < G)
            tl.debug_barrier()  # all of it is stored before this program counts itself
            if tl.atomic_add(arrived_ptr + b * KH + kh, 1, sem="acq_rel") == parts - 1:
                part_p = tl.arange(0, BP)
                at = ((b * H + head) * most)[:, None] + part_p[None, :]
                there = (g < G)[:, None] & (part_p < parts)[None, :]
                tops = tl.load(sum_ptr + at * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
                sums = tl.load(sum_ptr + at * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
                largest = tl.where(g < G, tl.max(tops, 1), 0.0)
                total = tl.sum(sums * tl.exp2(tops - largest[:, None]), 1)
                acc = tl.full([BG, BE], 0.0, tl.float32)
                for first_part in range(0, parts, 4):
                    for j in tl.static_range(4):  # their loads are on the way together
                        other = first_part + j
                        theirs = (b * H + head) * most + other
                        known = g < tl.where(other < parts, G, 0)
                        top = tl.load(sum_ptr + theirs * 2, mask=known, other=float("-inf"), cache_modifier=".cg")
                        cell = acc_ptr + theirs[:, None] * E + e[None, :]
                        z_part = tl.load(cell, mask=in_q & known[:, None], other=0.0, cache_modifier=".cg")
                        acc += z_part * tl.exp2(top - largest)[:, None]
                tl.store(z, (acc / total[:, None]).to(z_ptr.dtype.element_ty), mask=in_q)
                tl.store(arrived_ptr + b * KH + kh, 0)


def keys_per_program(end: int, heads: int) -> int:
    """How many keys one program reads, of `end` at most, where so many (row, KV head) pairs are read at once."""
    parts = max(1, min(triton.cdiv(end, KEYS), PROGRAMS // heads))
    return triton.cdiv(triton.cdiv(end, parts), KEYS) * KEYS


def launch(
    qkv_BO: Tensor, where: Where, K_BKSE: Tensor, V_BKSE: Tensor, heads: int, window: int, arrived: Tensor
) -> Tensor:
    require_triton(qkv_BO, K_BKSE)
    (B, KH, places, E), device = K_BKSE.shape, qkv_BO.device
    per = keys_per_program(window, B * KH)
    most, z_BO = triton.cdiv(window, per), torch.empty(B, heads * E, dtype=qkv_BO.dtype, device=device)
    acc, sums = (torch.empty(B * heads * most * n, dtype=torch.float32, device=device) for n in (E, 2))
    G = heads // KH
    BS = 32 if K_BKSE.dtype == torch.float32 or torch.version.hip else 64  # what the registers hold
    _attend[(KH, most, B)](
        qkv_BO, *where, K_BKSE, V_BKSE, z_BO, acc, sums, arrived, heads, KH, places, window, per,
        1.4426950408889634 / E**0.5,
        G=G, BG=max(16, triton.next_power_of_2(G)), E=E, BE=max(16, triton.next_power_of_2(E)), BS=BS,
        BP=triton.next_power_of_2(most),
        PRECISION=SINGLE, num_warps=4, num_stages=2, **chained(device),
    )  # fmt: skip
    return z_BO


def attend_(
    qkv_BO: Tensor,
    where: Where,
    K_BKSE: Tensor,
    V_BKSE: Tensor,
    heads: int,
    end: int,
    arrived_BK: Tensor,
    backend: str = "torch",
    window: int | None = None,
) -> Tensor:
    """z [B, H · E] of one token of each row; stores its key and value.

    qkv [B, (H + 2 KH) E]: queries, keys and values before rope; K and V [B, KH, places, E]: a layer's cache; all are
    contiguous. end: no position is larger than end − 1. arrived [B, KH] int32: zeros, and zeros again afterwards.
    window: how many keys a token sees, with its own; None: all before it.
    """
    window = end if window is None else min(window, end)
    if backend == "torch":
        return reference(qkv_BO, where, K_BKSE, V_BKSE, heads, end, window)
    return launch(qkv_BO, where, K_BKSE, V_BKSE, heads, window, arrived_BK)
