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
import torch.nn.functional as F

from .cpu import MOST_TOKENS
from .linear import add_product_, c_library_for, product
from .values import (
    ACTIVATIONS,
    FUSED,
    KERNELS,
    Number,
    clipped_triton,
    jit,
    kernel_of,
    on_its_gpu,
    per_row,
    require_triton,
    tl,
    triton,
)

# value(a_BCO, t0, t1) → u_BCO of tokens t0:t1, rate and clip included
Value = Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class Known:
    """What a kernel needs to compute the same value for a whole prompt.

    rule: a name in `values.KERNELS`. rate, gamma: floats, tuples of B or tensors [] or [B]. frozen, target: broadcast
    to [B, T, O]. norm_BT: ‖k‖, for clip.
    """

    rule: str
    activation: str = "identity"
    rate: Number = 1.0
    gamma: Number = 1.0
    clip: float | None = None
    norm_BT: torch.Tensor | None = None
    frozen_BTO: torch.Tensor | None = None
    target: torch.Tensor | None = None


OUTER = MOST_TOKENS  # whose earlier tokens enter as one GEMM
INNER = 32  # tokens solved together inside
KEEP = 1 << 26  # Gram entries kept for the next linear that shares h and k (256 MB in float32)


def before(write_BT: torch.Tensor, width: int = 1) -> torch.Tensor:
    """Events that each token sees [B, T]: those of earlier columns of `width` tokens."""
    count_BT = write_BT.cumsum(1) - write_BT.long()
    return count_BT if width == 1 else count_BT[:, ::width].repeat_interleave(width, 1)


class Gram:
    """G[t, s] = (1 − decay)^{e(s,t)} (h_t·k_s + bias_s) where s < t and s is written, else 0; by rows of OUTER.

    h, k [B, T, I] any float dtype, bias [B, T] or None, write [B, T] bool, decay a float or a tensor [] or [B].
    gate_proj and up_proj share h, k, bias, write and decay, and so one Gram: its rows are kept while they are
    small and computed again otherwise, so that memory stays bounded for any T.
    """

    def __init__(self, h_BTI, k_BTI, bias_BT, write_BT, decay=0.0, dtype=None, width=1):
        dtype = dtype or (torch.float64 if k_BTI.dtype == torch.float64 else torch.float32)
        self.h, self.k = h_BTI.to(dtype), k_BTI.to(dtype)
        self.bias = None if bias_BT is None else bias_BT.to(dtype)
        self.write = write_BT.to(torch.bool).expand(h_BTI.shape[:2])
        self.decay, self.width = decay, width
        self.count = before(self.write)  # events before each token
        self.seen = self.count if width == 1 else before(self.write, width)
        B, T = self.write.shape
        self._kept: dict[int, torch.Tensor] | None = {} if B * T * T // 2 <= KEEP else None

    def rows(self, t0: int, t1: int) -> torch.Tensor:
        """G[:, t0:t1, :t1] as [B, t1 − t0, t1]."""
        if self._kept is not None and t0 in self._kept:
            return self._kept[t0]
        G = self._rows(t0, t1)
        if self._kept is not None:
            self._kept[t0] = G
        return G

    def _rows(self, t0: int, t1: int) -> torch.Tensor:
        G = torch.stack([product(h, k) for h, k in zip(self.h[:, t0:t1], self.k[:, :t1], strict=True)])
        if self.bias is not None:
            G += self.bias[:, None, :t1]
        if isinstance(self.decay, torch.Tensor) or self.decay != 0:
            events = (self.seen[:, t0:t1, None] - self.count[:, None, :t1] - 1).clamp_(min=0)
            keep = 1 - torch.as_tensor(self.decay, dtype=G.dtype, device=G.device)
            G *= keep.reshape(-1, 1, 1) ** events.to(G.dtype)
        t = torch.arange(t1, device=G.device)
        if self.width > 1:
            t //= self.width  # the column of each token
        earlier = t[None, :] < t[t0:t1, None]
        return G.masked_fill_(~(earlier & self.write[:, None, :t1]), 0)


def scan_sequential(a_BTO: torch.Tensor, gram: Gram, value: Value) -> tuple[torch.Tensor, torch.Tensor]:
    """One token after the other: slow, obviously right."""
    a_BTO, u_BTO = a_BTO.clone(), torch.zeros_like(a_BTO)
    for t in range(a_BTO.shape[1]):
        G_B1s = gram._rows(t, t + 1)[:, :, :t]
        a_BTO[:, t] += (G_B1s @ u_BTO[:, :t])[:, 0]
        u_B1O = value(a_BTO[:, t : t + 1], t, t + 1)
        u_BTO[:, t : t + 1] = u_B1O.masked_fill(~gram.write[:, t : t + 1, None], 0)
    return a_BTO, u_BTO


def scan_chunked(
    a_BTO: torch.Tensor, gram: Gram, value: Value, known: Known | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in matrix products: earlier tokens enter as a GEMM, INNER tokens are solved together, or in C."""
    whole = bool(gram.write.all())

    def event(a: torch.Tensor, t0: int, t1: int) -> torch.Tensor:
        u = value(a, t0, t1)
        return u if whole else u.masked_fill(~gram.write[:, t0:t1, None], 0)

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
        *((name, ctypes.c_float) for name in ("rate", "gamma", "clip")),
        *((name, ctypes.c_int) for name in ("rule", "silu")),
    ]


def _in_c(a_BTO, u_BTO, gram: Gram, known: Known) -> Callable[[torch.Tensor, int, int], None] | None:
    """Solves tokens t0:t1, given their Gram rows and a with everything before t0; None where C does not do that."""
    rule = KERNELS.get(known.rule)
    if rule is None or rule.in_c is None or known.activation not in ACTIVATIONS or a_BTO.dtype != torch.float32:
        return None
    B, T, O = a_BTO.shape
    frozen = known.frozen_BTO.expand(B, T, O) if rule.reads_frozen and known.frozen_BTO is not None else None
    target = known.target.expand(B, T, O) if rule.reads_target and known.target is not None else None
    norm = None if known.clip is None or known.norm_BT is None else known.norm_BT.expand(B, T).contiguous()
    helper = c_library_for(a_BTO, gram.h, frozen, target, norm)
    lie_apart = any(x is not None and x.stride(2) != 1 for x in (frozen, target))
    if helper is None or not hasattr(helper, "scan_block") or lie_apart:
        return None
    rate_B, gamma_B = (per_row(x, B, a_BTO).tolist() for x in (known.rate, known.gamma))
    write = gram.write.contiguous()
    kind = (math.inf if known.clip is None else known.clip, rule.in_c, known.activation == "silu")

    def solve(G: torch.Tensor, t0: int, t1: int) -> None:
        assert t1 - t0 <= MOST_TOKENS
        for b in range(B):
            large = [x if x is None else x[b, t0:t1] for x in (a_BTO, u_BTO, frozen, target)]
            large.insert(2, G[b, :, t0:])
            where = [0 if x is None else x.data_ptr() for x in large]
            where += [0 if norm is None else norm[b, t0:].data_ptr(), write[b, t0:].data_ptr()]
            strides = [0 if x is None else x.stride(0) for x in large]
            arguments = ScanArguments(*where, *strides, t1 - t0, O, rate_B[b], gamma_B[b], *kind)
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
def _block(
    a_ptr, u_ptr, G_ptr, write_ptr, frozen_ptr, target_ptr, norm_ptr, rate_ptr, gamma_ptr,
    t0, t1, O, T_padded, G_rows, write_sb, norm_sb, rate_sb, gamma_sb, clip,
    RULE: tl.constexpr, PHI: tl.constexpr, FROZEN: tl.constexpr, TARGET: tl.constexpr, CLIP: tl.constexpr,
    BN: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens t0:t1 of BN neurons of one row, C tokens at a time; G is [B, s, t].

    a, u, frozen and target are [B, O, T_padded]: with tokens contiguous a neuron's tokens sit in one warp, and
    the row loop needs no barrier.
    """
    b = tl.program_id(1).to(tl.int64)  # before any multiply: offsets pass 2**31
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    lane = tl.arange(0, C)
    alive = (n < O)[:, None]  # tokens need no mask: everything is padded to whole chunks
    row = (b * O + n)[:, None] * T_padded
    rate, gamma = tl.load(rate_ptr + b * rate_sb), tl.load(gamma_ptr + b * gamma_sb)
    for c0 in range(t0, t1, C):
        t = c0 + lane
        a = tl.load(a_ptr + row + t[None, :], mask=alive, other=0.0)
        for s0 in range(t0, c0, C):  # the chunks of this block that are done
            u = tl.load(u_ptr + row + (s0 + lane)[None, :], mask=alive, other=0.0)
            G = tl.load(G_ptr + (b * G_rows + (s0 - t0 + lane)[:, None]) * G_rows + (t - t0)[None, :])
            a = tl.dot(u, G, a, input_precision=PRECISION)
        u = tl.full([BN, C], 0.0, tl.float32)
        frozen, target = a, a
        if FROZEN:
            frozen = tl.load(frozen_ptr + row + t[None, :], mask=alive, other=0.0)
        if TARGET:
            target = tl.load(target_ptr + row + t[None, :], mask=alive, other=0.0)
        for j in range(C):
            here = (lane == j)[None, :]
            a_j = tl.sum(tl.where(here, a, 0.0), 1)
            frozen_j, target_j = a_j, a_j
            if FROZEN:
                frozen_j = tl.sum(tl.where(here, frozen, 0.0), 1)
            if TARGET:
                target_j = tl.sum(tl.where(here, target, 0.0), 1)
            u_j = rate * RULE(a_j, frozen_j, target_j, gamma, PHI)
            if CLIP:
                norm = tl.load(norm_ptr + b * norm_sb + c0 + j)
                u_j = clipped_triton(u_j, clip, norm)
            write = tl.load(write_ptr + b * write_sb + c0 + j)
            u_j = tl.where(write != 0, u_j, 0.0)[:, None]
            G_j = tl.load(G_ptr + (b * G_rows + c0 - t0 + j) * G_rows + c0 - t0 + lane)[None, :]
            a = tl.where(lane[None, :] > j, a + u_j * G_j, a)  # where, not a zero in G: 0 · NaN is NaN
            u = tl.where(here, u_j, u)
        tl.store(a_ptr + row + t[None, :], a, mask=alive)
        tl.store(u_ptr + row + t[None, :], u, mask=alive)
        tl.debug_barrier()  # the next chunk loads u as other threads stored it


BN, C = 32, 16  # neurons of one program, tokens of one chunk


def _launch_block(
    a_BOT, u_BOT, G_Bst, write_BT, frozen_BOT, target_BOT, norm_BT, rate_B, gamma_B, t0, rule, activation, clip
):  # fmt: skip
    rule, (B, O, T_padded) = kernel_of(rule, activation), a_BOT.shape
    G_rows = G_Bst.shape[1]
    _block[(triton.cdiv(O, BN), B)](
        a_BOT, u_BOT, G_Bst, write_BT, frozen_BOT, target_BOT, norm_BT, rate_B, gamma_B,
        t0, t0 + G_rows, O, T_padded, G_rows, write_BT.stride(0), norm_BT.stride(0), rate_B.stride(0),
        gamma_B.stride(0), float(clip or 0),
        RULE=rule.value, PHI=activation, FROZEN=rule.reads_frozen, TARGET=rule.reads_target,
        CLIP=clip is not None, BN=BN, C=C, PRECISION="ieee", num_warps=2, **FUSED,
    )  # fmt: skip


@torch.library.custom_op("fastweights::scan_block", mutates_args=("a", "u"), device_types="cuda")
def _op(
    a: torch.Tensor, u: torch.Tensor, G: torch.Tensor, write: torch.Tensor, frozen: torch.Tensor,
    target: torch.Tensor, norm: torch.Tensor, rate: torch.Tensor, gamma: torch.Tensor, t0: int,
    rule: str, activation: str, clip: float | None,
) -> None:  # fmt: skip
    _launch_block(a, u, G, write, frozen, target, norm, rate, gamma, t0, rule, activation, clip)


@_op.register_fake
def _(a, u, G, write, frozen, target, norm, rate, gamma, t0, rule, activation, clip):
    return None


@on_its_gpu
def launch(a_BTO: torch.Tensor, gram: Gram, known: Known) -> tuple[torch.Tensor, torch.Tensor]:
    """The scan by Triton: blocks of OUTER tokens, earlier blocks as torch GEMMs, one launch per block.

    Returns views [B, T, O] of tensors laid out [B, O, T].
    """
    require_triton(a_BTO, gram.h)
    rule = kernel_of(known.rule, known.activation)
    for name, needed in (
        ("frozen_BTO", rule.reads_frozen),
        ("target", rule.reads_target),
        ("norm_BT", known.clip is not None),
    ):
        if needed and getattr(known, name) is None:
            raise ValueError(f"scan() by rule {known.rule!r} and clip {known.clip} needs {name}, got None")
    B, T, O = a_BTO.shape
    padding = -T % C

    def neuron_major(x: torch.Tensor | None) -> torch.Tensor:
        x_BOT = torch.zeros(B, O, T + padding, dtype=torch.float32, device=a_BTO.device)
        if x is not None:
            x_BOT[:, :, :T] = x.expand(B, T, O).mT
        return x_BOT

    a_BOT, u_BOT = neuron_major(a_BTO), neuron_major(None)
    nothing_BOT = a_BOT.new_zeros(1, 1, 1).expand_as(a_BOT)  # in the place of what the rule does not read
    frozen_BOT = neuron_major(known.frozen_BTO) if rule.reads_frozen else nothing_BOT
    target_BOT = neuron_major(known.target) if rule.reads_target else nothing_BOT
    write_BT = F.pad(gram.write.to(torch.uint8), (0, padding))
    rate_B, gamma_B = per_row(known.rate, B, a_BOT), per_row(known.gamma, B, a_BOT)
    norm_BT = torch.zeros(B, T, device=a_BOT.device) if known.norm_BT is None else known.norm_BT.float()
    norm_BT = F.pad(norm_BT, (0, padding))
    block = _op if a_BOT.is_cuda else _launch_block  # on the CPU: Triton's interpreter
    for t0 in range(0, T, OUTER):
        t1 = min(t0 + OUTER, T)
        G_BCT = gram.rows(t0, t1)
        if t0:
            a_BOT[:, :, t0:t1].baddbmm_(u_BOT[:, :, :t0], G_BCT[:, :, :t0].mT)
        pad = -(t1 - t0) % C
        G_Bst = F.pad(G_BCT[:, :, t0:].mT, (0, pad, 0, pad)).contiguous()
        block(
            a_BOT, u_BOT, G_Bst, write_BT, frozen_BOT, target_BOT, norm_BT, rate_B, gamma_B,
            t0, known.rule, known.activation, known.clip,
        )  # fmt: skip
    return a_BOT[:, :, :T].mT, u_BOT[:, :, :T].mT


def scan(
    a_BTO: torch.Tensor, gram: Gram, value: Value, known: Known | None = None, backend: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations with every earlier write of this prompt in them, and the values written: (a, u).

    a [B, T, O] float32 or float64: frozen product, bias and the read of the factors present before the
    prompt; `gram` from the same h, k, bias, write and decay; `value(a, t0, t1)` the rule for tokens t0:t1, rate
    and clip included (the write mask is applied here). `known`: the same rule as kernels know it; None: it has no
    kernel, and runs in torch alone. u is 0 where nothing is written.
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
