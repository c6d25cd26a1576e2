"""scan: all the reads and writes of one prompt at one plastic linear, in parallel (DESIGN §3.2).

    a_t = A_t + Σ_{s<t, s written} (1 − decay)^{e(s,t)} (h_t·k_s + bias_s) u_s        u_t = value(a_t)

e(s,t) is the number of events after s and before t. Neurons are independent, so the tokens of one neuron are
a strictly lower triangular system, nonlinear because u is a function of a.

Where several sequences share one ΔW, they are one row of tokens, column by column: `width` of them stand side by
side and do not see each other, so s<t means an earlier column, and e(s,t) counts up to the column of t.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cpu import MOST_TOKENS
from .gram import OUTER, Gram
from .linear import add_product_, c_library_for
from .values import (
    FUSED,
    IN_C,
    KERNELS,
    Number,
    clipped_triton,
    jit,
    kernel_of,
    on_its_gpu,
    per_neuron,
    require_triton,
    tl,
    triton,
)

# value(a_BCO, t0, t1) → u_BCO of tokens t0:t1, rate and clip included
Value = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class Known:
    """What a kernel needs to compute the same value for a whole prompt.

    rule: a name in `values.KERNELS`. rate, gamma: floats, tuples of B or tensors [], [B], [1, O] or [B, O]. frozen,
    target: broadcast to [B, T, O]. norm_BT: ‖k‖, for clip.
    """

    rule: str
    activation: str = "identity"
    rate: Number = 1.0
    gamma: Number = 1.0
    clip: float | None = None
    norm_BT: torch.Tensor | None = None
    frozen_BTO: torch.Tensor | None = None
    target: torch.Tensor | None = None


INNER = 32  # tokens solved together inside


def scan_sequential(a_BTO: torch.Tensor, gram: Gram, value: Value) -> tuple[torch.Tensor, torch.Tensor]:
    """One token after the other: slow, obviously right."""
    a_BTO, u_BTO = a_BTO.clone(), torch.zeros_like(a_BTO)
    for t in range(a_BTO.shape[1]):
        G_B1s = gram.part(t, t + 1)[:, :, :t]
        a_BTO[:, t] += (G_B1s @ u_BTO[:, :t])[:, 0]
        u_B1O = value(a_BTO[:, t : t + 1], t, t + 1)
        if gram.written is not None:
            u_B1O = u_B1O.masked_fill(~gram.written[:, t : t + 1, None], 0)
        u_BTO[:, t : t + 1] = u_B1O
    return a_BTO, u_BTO


def scan_chunked(
    a_BTO: torch.Tensor, gram: Gram, value: Value, known: Known | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in matrix products: earlier tokens enter as a GEMM, INNER tokens are solved together, or in C."""

    def event(a: torch.Tensor, t0: int, t1: int) -> torch.Tensor:
        u = value(a, t0, t1)
        return u if gram.written is None else u.masked_fill(~gram.written[:, t0:t1, None], 0)

    a_BTO = a_BTO.clone(memory_format=torch.contiguous_format)
    u_BTO = torch.empty_like(a_BTO)
    T = a_BTO.shape[1]
    if T == 1:  # nothing came before: no Gram
        return a_BTO, event(a_BTO, 0, 1)
    in_c = None if known is None else _in_c(a_BTO, u_BTO, gram, known)
    for t0 in range(0, T, OUTER):
        t1 = min(t0 + OUTER, T)
        G = gram.rows(t0, t1)
        if t0:
            _add_product(a_BTO[:, t0:t1], G[:, :, :t0], u_BTO[:, :t0])
        if in_c is None:
            _solve(a_BTO, u_BTO, G, event, t0, t0, t1)
        else:
            in_c(G, t0, t1)
    return a_BTO, u_BTO


class ScanArguments(ctypes.Structure):
    """`ScanArguments` of scan.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "u", "G", "frozen", "target", "norm", "write")),
        *((name, ctypes.c_long) for name in ("a_t", "u_t", "G_t", "frozen_t", "target_t", "T", "O")),
        *((name, ctypes.c_void_p) for name in ("rate", "gamma")),
        *((name, ctypes.c_long) for name in ("rate_o", "gamma_o")),
        ("clip", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("rule", "phi")),
    ]


def _in_c(a_BTO, u_BTO, gram: Gram, known: Known) -> Callable[[torch.Tensor, int, int], None] | None:
    """Solves tokens t0:t1, given their Gram rows and a with everything before t0; None where C does not do that."""
    rule = KERNELS.get(known.rule)
    if rule is None or rule.in_c is None or known.activation not in IN_C or a_BTO.dtype != torch.float32:
        return None
    B, T, O = a_BTO.shape
    frozen = known.frozen_BTO.expand(B, T, O) if rule.reads_frozen and known.frozen_BTO is not None else None
    target = known.target.expand(B, T, O) if rule.reads_target and known.target is not None else None
    norm = None if known.clip is None or known.norm_BT is None else known.norm_BT.expand(B, T).contiguous()
    helper = c_library_for(a_BTO, gram.h, frozen, target, norm)
    lie_apart = any(x is not None and x.stride(2) != 1 for x in (frozen, target))
    if helper is None or not hasattr(helper, "scan_block") or lie_apart:
        return None
    numbers = [per_neuron(x, B, O, a_BTO) for x in (known.rate, known.gamma)]
    write = gram.write.contiguous()
    kind = (math.inf if known.clip is None else known.clip, rule.in_c, IN_C[known.activation])

    def solve(G: torch.Tensor, t0: int, t1: int) -> None:
        assert t1 - t0 <= MOST_TOKENS
        for b in range(B):
            large = [x if x is None else x[b, t0:t1] for x in (a_BTO, u_BTO, frozen, target)]
            large.insert(2, G[b, :, t0:])
            where = [0 if x is None else x.data_ptr() for x in large]
            where += [0 if norm is None else norm[b, t0:].data_ptr(), write[b, t0:].data_ptr()]
            strides = [0 if x is None else x.stride(0) for x in large]
            own = [x[b].data_ptr() for x in numbers] + [x.stride(1) for x in numbers]
            arguments = ScanArguments(*where, *strides, t1 - t0, O, *own, *kind)
            helper.scan_block(ctypes.byref(arguments), torch.get_num_threads())

    return solve


def _add_product(a, G, u):
    for row in range(a.shape[0]):  # bmm on CPU is slower than a loop of products at these sizes
        add_product_(a[row], G[row], u[row])


def _solve(a, u, G, event, g0, t0, t1):
    """Tokens t0:t1, everything before t0 being in a already: halves, until a leaf of INNER tokens."""
    if t1 - t0 > INNER:
        mid = t0 + (t1 - t0 + 1) // 2
        _solve(a, u, G, event, g0, t0, mid)
        _add_product(a[:, mid:t1], G[:, mid - g0 : t1 - g0, t0:mid], u[:, t0:mid])
        _solve(a, u, G, event, g0, mid, t1)
        return
    L = G[:, t0 - g0 : t1 - g0, t0:t1]
    a[:, t0:t1], u[:, t0:t1] = _sweep(a[:, t0:t1], L, event, t0, t1)


def _sweep(start, L, event, t0, t1):
    """Fixed-point sweeps of a = start + L u(a), until nothing changes any more.

    L is strictly lower triangular, so after sweep n the first n tokens are exact. The last sweep is therefore exact at
    any rate; usually a few sweeps reach rounding level.
    """
    a, u = start, event(start, t0, t1)
    tolerance = 4 * torch.finfo(u.dtype).eps
    for sweep in range(t1 - t0 - 1):
        a = start.clone(memory_format=torch.contiguous_format)
        _add_product(a, L, u)
        old, u = u, event(a, t0, t1)
        if sweep and _settled(u, old, tolerance):  # one is never enough
            break
    if bool(u.sum().isfinite()):
        return a, u
    # 0 · NaN is NaN, so a product lets a later token reach back: token by token it cannot
    a, u = start.clone(), torch.zeros_like(start)
    for t in range(t1 - t0):
        a[:, t : t + 1] += L[:, t : t + 1, :t] @ u[:, :t]
        u[:, t : t + 1] = event(a[:, t : t + 1], t0 + t, t0 + t + 1)
    return a, u


def _settled(u: torch.Tensor, old: torch.Tensor, tolerance: float) -> bool:
    """Whether no neuron's u has changed by more than `tolerance` of its largest; not where one is not finite."""
    helper = c_library_for(u, old) if u.dtype == torch.float32 and u.is_contiguous() and old.is_contiguous() else None
    if helper is None or len(u) > 1:
        change = (u - old).abs_().amax(1)
        return bool(((change <= tolerance * u.abs().amax(1)) & change.isfinite()).all())
    return bool(helper.settled(u.data_ptr(), old.data_ptr(), *u.shape[1:], tolerance))


# ---- Triton


@jit
def _earlier(
    start_ptr, G_ptr, u_ptr, a_ptr, t0, t1, T, O, start_sb, start_st, G_sb, G_st,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a [B, t1 − t0, O] float32 of tokens t0:t1 = start + G u of all tokens before t0, a multiple of BK.

    G [B, t1 − t0, at least t0] holds the rows of these tokens; u [B, T, O].
    """
    b = tl.program_id(1).to(tl.int64)  # before any multiply: offsets pass 2**31
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM).to(tl.int64)
    m_in, n_in = (t0 + m < t1)[:, None], (n < O)[None, :]
    start = start_ptr + b * start_sb + (t0 + m)[:, None] * start_st + n[None, :]
    a = tl.load(start, mask=m_in & n_in, other=0.0).to(tl.float32)
    for s0 in range(0, t0, BK):
        s = s0 + tl.arange(0, BK).to(tl.int64)
        G = tl.load(G_ptr + b * G_sb + m[:, None] * G_st + s[None, :], mask=m_in, other=0.0)
        u = tl.load(u_ptr + (b * T + s)[:, None] * O + n[None, :], mask=n_in, other=0.0)
        a = tl.dot(G, u, a, input_precision=PRECISION)
    tl.store(a_ptr + (b * (t1 - t0) + m)[:, None] * O + n[None, :], a, mask=m_in & n_in)


@jit
def _block(
    a_ptr, G_ptr, y_ptr, u_ptr, written_ptr, frozen_ptr, target_ptr, norm_ptr, rate_ptr, gamma_ptr,
    t0, t1, T, O, G_sb, G_st, frozen_sb, frozen_st, target_sb, target_st, rate_sb, rate_so, gamma_sb, gamma_so, clip,
    RULE: tl.constexpr, PHI: tl.constexpr, FROZEN: tl.constexpr, TARGET: tl.constexpr, CLIP: tl.constexpr,
    ALL: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens t0:t1 of BN neurons of one row, C tokens at a time, given a with everything before t0 in it.

    a [B, t1 − t0, O] is changed on the way; y and u [B, T, O] are the results. A thread has all C tokens of its
    neurons, each as a vector [BN] of its own: so they need no exchange.
    """
    b = tl.program_id(1).to(tl.int64)  # before any multiply: offsets pass 2**31; those inside a block do not
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    alive, tokens = n < O, t1 - t0
    m = tl.arange(0, 16)[:, None]  # rows of the smallest product: C of them are the tokens of a chunk
    rate = tl.load(rate_ptr + b * rate_sb + n * rate_so, mask=alive, other=0.0)
    gamma = tl.load(gamma_ptr + b * gamma_sb + n * gamma_so, mask=alive, other=0.0)
    a_ptr += b * tokens * O
    G_ptr += b * G_sb + t0
    y_ptr += (b * T + t0) * O
    u_ptr += (b * T + t0) * O
    frozen_ptr += b * frozen_sb + t0 * frozen_st.to(tl.int64)
    target_ptr += b * target_sb + t0 * target_st.to(tl.int64)
    norm_ptr += b * T + t0
    written_ptr += b * T + t0
    for c0 in range(0, tokens, C):
        if c0 > 0:  # a of this chunk + G u of the chunks that are done
            t = c0 + m
            t_in = (m < C) & (t < tokens)
            inside = t_in & alive[None, :]
            a = tl.load(a_ptr + t * O + n[None, :], mask=inside, other=0.0)
            for s0 in range(0, c0, BK):
                s = s0 + tl.arange(0, BK)
                G = tl.load(G_ptr + t * G_st + s[None, :], mask=t_in & (s < c0)[None, :], other=0.0)
                u = tl.load(u_ptr + s[:, None] * O + n[None, :], mask=(s < c0)[:, None] & alive[None, :], other=0.0)
                a = tl.dot(G, u, a, input_precision=PRECISION)
            tl.store(a_ptr + t * O + n[None, :], a, mask=inside)
            tl.debug_barrier()  # below, a thread loads a as other threads stored it
        a_C, u_C = (), ()
        for j in tl.static_range(C):
            there = tokens > c0 + j  # what is computed of a token after the end is not stored
            here = n < tl.where(there, O, 0)
            a_j = tl.load(a_ptr + (c0 + j) * O + n, mask=here, other=0.0)
            for i in tl.static_range(j):
                a_j += u_C[i] * tl.load(G_ptr + (c0 + j) * G_st + c0 + i, mask=there, other=0.0)
            frozen_j, target_j = a_j, a_j
            if FROZEN:
                frozen_j = tl.load(frozen_ptr + (c0 + j) * frozen_st + n, mask=here, other=0.0).to(tl.float32)
            if TARGET:
                target_j = tl.load(target_ptr + (c0 + j) * target_st + n, mask=here, other=0.0)
            u_j = rate * RULE(a_j, frozen_j, target_j, gamma, PHI)
            if CLIP:
                u_j = clipped_triton(u_j, clip, tl.load(norm_ptr + c0 + j, mask=there, other=0.0))
            if not ALL:
                u_j = tl.where(tl.load(written_ptr + c0 + j, mask=there, other=0) != 0, u_j, 0.0)
            a_C, u_C = a_C + (a_j,), u_C + (u_j,)  # type: ignore[assignment]  # noqa: RUF005
        for j in tl.static_range(C):
            here = n < tl.where(tokens > c0 + j, O, 0)
            tl.store(y_ptr + (c0 + j) * O + n, a_C[j], mask=here)
            tl.store(u_ptr + (c0 + j) * O + n, u_C[j], mask=here)
        tl.debug_barrier()  # the next chunk loads u as other threads stored it


# of _block: neurons of a program, tokens of a product inside it, tokens of a chunk. All that a chunk needs is loaded
# ahead, so a longer one takes more registers.
BLOCK = {"BN": 32, "BK": 16, "C": 8, "num_warps": 1}
# of _earlier: tokens and neurons of a program, earlier tokens of one step; without tensor cores fewer fit the registers
PRODUCT = {
    "tf32": {"BM": OUTER, "BN": 64, "BK": 32, "num_warps": 8},
    "ieee": {"BM": OUTER, "BN": 32, "BK": 16, "num_warps": 4},
}


@on_its_gpu
def launch(start_BTO: torch.Tensor, gram: Gram, known: Known) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan by Triton: for each block of OUTER tokens one product with all earlier u, and the block itself."""
    require_triton(start_BTO, gram.h)
    rule = kernel_of(known.rule, known.activation)
    for name, needed in (
        ("frozen_BTO", rule.reads_frozen),
        ("target", rule.reads_target),
        ("norm_BT", known.clip is not None),
    ):
        if needed and getattr(known, name) is None:
            raise ValueError(f"scan() by rule {known.rule!r} and clip {known.clip} needs {name}, got None")
    B, T, O = start_BTO.shape

    def in_rows(x: torch.Tensor | None) -> torch.Tensor:
        x = start_BTO if x is None else x.expand(B, T, O)  # something, in the place of what the rule does not read
        return x if x.stride(2) == 1 else x.contiguous()

    start, frozen, target = map(in_rows, (start_BTO, known.frozen_BTO, known.target))
    y_BTO = torch.empty(B, T, O, dtype=start.dtype, device=start.device)
    u_BTO = torch.empty(B, T, O, dtype=torch.float32, device=start.device)
    block_BCO = torch.empty(B, min(T, OUTER), O, dtype=torch.float32, device=start.device)
    rate_BO, gamma_BO = (per_neuron(x, B, O, u_BTO) for x in (known.rate, known.gamma))
    norm_BT = rate_BO if known.norm_BT is None else known.norm_BT.expand(B, T).float().contiguous()
    written_BT = rate_BO if gram.written is None else gram.written.to(torch.uint8).contiguous()
    known_to_triton = {
        "RULE": rule.value,
        "PHI": known.activation,
        "FROZEN": rule.reads_frozen,
        "TARGET": rule.reads_target,
        "CLIP": known.clip is not None,
        "ALL": gram.written is None,
        "PRECISION": gram.precision,
    }
    product_tile = PRODUCT[gram.precision]
    for t0 in range(0, T, OUTER):
        t1 = min(t0 + OUTER, T)
        G = gram.rows(t0, t1)
        _earlier[(triton.cdiv(O, product_tile["BN"]), B)](
            start, G, u_BTO, block_BCO, t0, t1, T, O, *start.stride()[:2], *G.stride()[:2],
            PRECISION=gram.precision, **product_tile, **FUSED,
        )  # fmt: skip
        _block[(triton.cdiv(O, BLOCK["BN"]), B)](
            block_BCO, G, y_BTO, u_BTO, written_BT, frozen, target, norm_BT, rate_BO, gamma_BO,
            t0, t1, T, O, *G.stride()[:2], *frozen.stride()[:2], *target.stride()[:2], *rate_BO.stride(),
            *gamma_BO.stride(), float(known.clip or 0), **known_to_triton, **BLOCK, **FUSED,
        )  # fmt: skip
    return y_BTO, u_BTO


def scan(
    a_BTO: torch.Tensor, gram: Gram, value: Value, known: Known | None = None, backend: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations with every earlier write of this prompt in them, and the values written: (a, u).

    a [B, T, O]: frozen product, bias and the read of the factors present before the prompt. For torch it is float32 or
    float64. For Triton it may be of any dtype but float64, the rule sees float32, and what is returned is rounded to
    a's dtype; u is float32.
    `gram` from the same h, scale, bias, write and decay; `value(a, t0, t1)` the rule for tokens t0:t1, rate and clip
    included (the write mask is applied here). `known`: the same rule as kernels know it; None: it has no kernel, and
    runs in torch alone. u is 0 where nothing is written.
    """
    match backend:
        case "torch":
            return scan_chunked(a_BTO, gram, value, known)
        case "triton":
            if known is None:
                raise ValueError("this rule has no Triton twin (kernels.scan.Known): it runs on backend='torch'")
            return launch(a_BTO, gram, known)
        case _:
            raise ValueError(f'scan() got backend {backend!r}, expected "torch" or "triton"')
