"""The adjoint of the scan (adjoint.py) on a GPU, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import OUTER
from .scan import BLOCK, PRODUCT
from .values import FUSED, jit, on_its_gpu, require_triton, tl, triton


@jit
def _later(
    b_ptr, G_ptr, above_ptr, t0, t1, T, O, G_sb, G_st,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """b [B, T, O] of tokens t0:t1 += Gᵀ ā of all tokens from t1 on, of which there is a multiple of BK."""
    row = tl.program_id(1).to(tl.int64)  # before any multiply: offsets pass 2**31
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = t0 + tl.arange(0, BM).to(tl.int64)
    m_in, n_in = m < t1, (n < O)[None, :]
    here = b_ptr + (row * T + m)[:, None] * O + n[None, :]
    b = tl.load(here, mask=m_in[:, None] & n_in, other=0.0)
    for r0 in range(t1, T, BK):
        r = r0 + tl.arange(0, BK).to(tl.int64)
        G = tl.load(G_ptr + row * G_sb + r[None, :] * G_st + m[:, None], mask=m_in[:, None], other=0.0)
        above = tl.load(above_ptr + (row * T + r)[:, None] * O + n[None, :], mask=n_in, other=0.0)
        b = tl.dot(G, above, b, input_precision=PRECISION)
    tl.store(here, b, mask=m_in[:, None] & n_in)


@jit
def _back(
    c_ptr, slope_ptr, G_ptr, b_ptr, above_ptr, t0, t1, T, O, c_sb, c_st, slope_sb, slope_st, G_sb, G_st,
    BN: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens t0:t1 of BN neurons of one row, C tokens at a time from the last, given b with all from t1 on in it.

    b [B, T, O] is changed in place. As in the scan, a thread has all C tokens of its neurons.
    """
    row = tl.program_id(1).to(tl.int64)  # before any multiply: offsets pass 2**31; those inside a block do not
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    alive, tokens = n < O, t1 - t0
    m = tl.arange(0, 16)[:, None]  # rows of the smallest product: C of them are the tokens of a chunk
    c_ptr += row * c_sb + t0 * c_st.to(tl.int64)
    slope_ptr += row * slope_sb + t0 * slope_st.to(tl.int64)
    G_ptr += row * G_sb + t0 * G_st.to(tl.int64) + t0
    b_ptr += (row * T + t0) * O
    above_ptr += (row * T + t0) * O
    for done in range(0, tokens, C):
        c1 = tokens - done
        if done > 0:  # b of this chunk + Gᵀ ā of the chunks that are done
            t = c1 - C + m
            t_in = (m < C) & (t >= 0)
            inside = t_in & alive[None, :]
            b = tl.load(b_ptr + t * O + n[None, :], mask=inside, other=0.0)
            for r0 in range(c1, tokens, BK):
                r = r0 + tl.arange(0, BK)
                r_in = r < tokens
                G = tl.load(G_ptr + r[None, :] * G_st + t, mask=t_in & r_in[None, :], other=0.0)
                above = tl.load(above_ptr + r[:, None] * O + n[None, :], mask=r_in[:, None] & alive[None, :], other=0.0)
                b = tl.dot(G, above, b, input_precision=PRECISION)
            tl.store(b_ptr + t * O + n[None, :], b, mask=inside)
            tl.debug_barrier()  # below, a thread loads b as other threads stored it
        b_C, above_C = (), ()
        for j in tl.static_range(C):  # token c1 - 1 - j
            there = c1 > j  # what is computed of a token before the first is not stored
            here = n < tl.where(there, O, 0)
            b_j = tl.load(b_ptr + (c1 - 1 - j) * O + n, mask=here, other=0.0)
            for i in tl.static_range(j):
                b_j += above_C[i] * tl.load(G_ptr + (c1 - 1 - i) * G_st + (c1 - 1 - j), mask=there, other=0.0)
            slope_j = tl.load(slope_ptr + (c1 - 1 - j) * slope_st + n, mask=here, other=0.0)
            c_j = tl.load(c_ptr + (c1 - 1 - j) * c_st + n, mask=here, other=0.0)
            b_C, above_C = b_C + (b_j,), above_C + (c_j + slope_j * b_j,)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(C):
            here = n < tl.where(c1 > j, O, 0)
            tl.store(b_ptr + (c1 - 1 - j) * O + n, b_C[j], mask=here)
            tl.store(above_ptr + (c1 - 1 - j) * O + n, above_C[j], mask=here)
        tl.debug_barrier()  # the next chunk loads ā as other threads stored it


# of _later: as scan.PRODUCT, but a transposed Gram takes more registers
LATER = PRODUCT | {"tf32": PRODUCT["tf32"] | {"BK": 16}}


@on_its_gpu
def launch_(b: Tensor, c: Tensor | None, slope: Tensor, G: Tensor, precision: str = "ieee") -> Tensor:
    """ā, given d in the place of b [B, T, O], contiguous; b is finished there.

    For each block of OUTER tokens, from the last, one product with all later ā, and the block itself. Blocks end where
    the tokens end: the first block is the short one, so what comes after a block is a whole number of them.
    """
    require_triton(*(x for x in (b, c, slope, G) if x is not None))
    above, (B, T, O) = torch.empty_like(b), b.shape
    c = torch.zeros_like(b) if c is None else c
    c, slope, G = (x if x.stride(2) == 1 else x.contiguous() for x in (c, slope, G))
    tile = LATER[precision]
    for t1 in range(T, 0, -OUTER):
        t0 = max(0, t1 - OUTER)
        if t1 < T:
            _later[(triton.cdiv(O, tile["BN"]), B)](
                b, G, above, t0, t1, T, O, *G.stride()[:2], PRECISION=precision, **tile, **FUSED
            )
        _back[(triton.cdiv(O, BLOCK["BN"]), B)](
            c, slope, G, b, above, t0, t1, T, O, *c.stride()[:2], *slope.stride()[:2], *G.stride()[:2],
            PRECISION=precision, **BLOCK, **FUSED,
        )  # fmt: skip
    return above
