"""adjoint: the scan with a graph, and its way back, which is a scan as well (DESIGN §3.5).

    a_t = A_t + Σ_{s<t} G_ts u_s        u_t = value(a_t)

Let ā and b be all that reaches a and u from the loss, c and d what reaches them from outside of the scan. Then

    b_t = d_t + Σ_{r>t} G_rt ā_r        ā_t = c_t + value′(a_t) ⊙ b_t        from the last token to the first

    ∂L/∂A = ā        ∂L/∂G = ā uᵀ

which is linear, and one strictly upper triangular system per neuron. What the value itself depends on gets its
gradients from autograd, once for all tokens, with b as what comes from above. So nothing of T tokens is held but a, u,
value′ and G.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adjoint_triton import launch_
from .cpu import MOST_TOKENS
from .gram import OUTER, Gram, before
from .linear import add_product_, c_library_for, product
from .scan import INNER, Known, Value, scan


def gram(
    h_BTI: Tensor, k_BTI: Tensor, bias_BT: Tensor | None, write_BT: Tensor, decay: Tensor | float, width: int = 1
) -> Tensor:
    """G[t, s] = (1 − decay)^{e(s,t)} (h_t·k_s + bias_s) where s < t and s is written, else 0: [B, T, T], with a graph.

    The same as `Gram`, whole. decay: a float or a tensor []; write is on the CPU.
    """
    G_BTS = h_BTI @ k_BTI.mT
    if bias_BT is not None:
        G_BTS = G_BTS + bias_BT[:, None]
    if isinstance(decay, Tensor) or decay != 0:
        passed_BTS = before(write_BT, width)[..., None] - before(write_BT)[:, None] - 1
        G_BTS = G_BTS * faded(passed_BTS.to(G_BTS.device), decay, G_BTS.dtype)
    column_T = torch.arange(h_BTI.shape[1], device="cpu") // width
    seen_BTS = (column_T < column_T[:, None]) & write_BT[:, None]
    return G_BTS.masked_fill(~seen_BTS.to(G_BTS.device), 0)


def faded(events: Tensor, decay: Tensor | float, dtype: torch.dtype) -> Tensor:
    """(1 − decay)^events: what so many later events have left of one; decay is a float or a tensor []."""
    return (1 - decay) ** events.clamp(min=0).to(dtype)


class Whole(Gram):
    """A Gram whose entries are known."""

    def __init__(self, G_BTT: Tensor, h_BTI: Tensor, write_BT: Tensor):
        half = h_BTI.dtype.itemsize < 4
        self.precision, self.h, self.G = "tf32" if half else "ieee", h_BTI, G_BTT
        self.write = write_BT.to("cpu", torch.bool).expand(h_BTI.shape[:2])
        self.written = None if bool(self.write.all()) else self.write.to(h_BTI.device, non_blocking=True)

    def part(self, t0: int, t1: int) -> Tensor:
        return self.G[:, t0:t1, :t1]

    rows = part


def scan_with_graph(
    a_BTO: Tensor, G_BTT: Tensor, h_BTI: Tensor, write_BT: Tensor, value: Value, known: Known | None, backend: str
) -> tuple[Tensor, Tensor]:
    """`scan`, differentiable in a, in G and in whatever `value` looks at.

    G from `gram`. value(a, t0, t1) must be neuron-local: entry i of it depends on entry i of a alone.
    """
    with torch.no_grad():
        whole = Whole(G_BTT.detach(), h_BTI.detach(), write_BT)
        solved_BTO, u_BTO = scan(a_BTO.detach(), whole, value, known, backend)

    def event(a: Tensor) -> Tensor:
        made = value(a, 0, a.shape[1])
        return made if whole.written is None else made.masked_fill(~whole.written[..., None], 0)

    slope_BTO, how = slope(event, solved_BTO), (backend, whole.precision)
    # its graph does not go to a: that way goes through the slope
    return _Scanned.apply(a_BTO, G_BTT, event(solved_BTO), slope_BTO, (solved_BTO, u_BTO), how)


def slope(event: Callable[[Tensor], Tensor], a_BTO: Tensor) -> Tensor:
    """∂u_i / ∂a_i of every entry, u = event(a)."""
    a_BTO = a_BTO.detach().requires_grad_()
    u_BTO = event(a_BTO)
    if not u_BTO.requires_grad:  # a value that does not look at a, nor at anything else that asks for a gradient
        return torch.zeros_like(a_BTO)
    (found,) = torch.autograd.grad(u_BTO.sum(), a_BTO, allow_unused=True, materialize_grads=True)
    return found


class _Scanned(torch.autograd.Function):
    """(a, u) as the scan gave them. `made` is u as autograd knows it, given a: on the way back it gets b."""

    @staticmethod
    def forward(ctx: Any, A, G, made, slope, scanned, how):
        a, u = scanned
        ctx.save_for_backward(G, slope, u)
        ctx.set_materialize_grads(False)
        ctx.how = how
        return a, u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c, d):
        G, slope, u = ctx.saved_tensors
        if c is None and d is None:
            return None, None, None, None, None, None
        above, b = adjoint(c, d, slope, G, *ctx.how)
        for_G = products_below(above, u) if ctx.needs_input_grad[1] else None
        return above, for_G, b, None, None, None


def adjoint(
    c_BTO: Tensor | None,
    d_BTO: Tensor | None,
    slope_BTO: Tensor,
    G_BTT: Tensor,
    backend: str = "torch",
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """ā and b [B, T, O], all in float32, or for torch in float64.

    None for c or d: nothing comes from there. Only what lies below the diagonal of G is used. precision: of Triton's
    products, as `Gram.precision`.
    """
    if d_BTO is None:
        b_BTO = torch.zeros_like(slope_BTO, memory_format=torch.contiguous_format)
    else:
        b_BTO = d_BTO.clone(memory_format=torch.contiguous_format)
    match backend:
        case "torch":
            return adjoint_chunked_(b_BTO, c_BTO, slope_BTO, G_BTT), b_BTO
        case "triton":
            return launch_(b_BTO, c_BTO, slope_BTO, G_BTT, precision), b_BTO
        case _:
            raise ValueError(f'adjoint() got backend {backend!r}, expected "torch" or "triton"')


def adjoint_chunked_(b: Tensor, c: Tensor | None, slope: Tensor, G: Tensor) -> Tensor:
    """ā, given d in the place of b: later tokens enter as a GEMM; INNER tokens one after the other, or OUTER in C."""
    above, T = torch.empty_like(b), b.shape[1]
    solve = _in_c(above, b, c, slope, G)
    if solve is None:
        solve = partial(_solve, above, b, torch.zeros_like(b) if c is None else c, slope, G)
    for t1 in range(T, 0, -OUTER):
        t0 = max(0, t1 - OUTER)
        if t1 < T:
            _add_later(b, G, above, t0, t1, t1, T)
        solve(t0, t1)
    return above


def products_below(above_BTO: Tensor, u_BTO: Tensor) -> Tensor:
    """ā_t·u_s where s < t, else 0: [B, T, T]."""
    if not above_BTO.is_cpu:
        return (above_BTO @ u_BTO.mT).tril_(-1)
    B, T, _ = above_BTO.shape
    G_BTT = above_BTO.new_zeros(B, T, T)
    for row in range(B):
        for t0 in range(0, T, OUTER):
            t1 = min(t0 + OUTER, T)
            G_BTT[row, t0:t1, :t1] = product(above_BTO[row, t0:t1], u_BTO[row, :t1])
            G_BTT[row, t0:t1, t0:t1].tril_(-1)
    return G_BTT


def _solve(above, b, c, slope, G, t0, t1):
    """Tokens t0:t1, everything after t1 being in b already: halves, until a leaf of INNER tokens."""
    if t1 - t0 > INNER:
        mid = t0 + (t1 - t0 + 1) // 2
        _solve(above, b, c, slope, G, mid, t1)
        _add_later(b, G, above, t0, mid, mid, t1)
        _solve(above, b, c, slope, G, t0, mid)
        return
    for t in range(t1 - 1, t0 - 1, -1):
        if t + 1 < t1:
            b[:, t] += (G[:, t + 1 : t1, t, None] * above[:, t + 1 : t1]).sum(1)
        above[:, t] = c[:, t] + slope[:, t] * b[:, t]


def _add_later(b, G, above, t0, t1, r0, r1):
    """b of tokens t0:t1 += what tokens r0:r1 give back to them."""
    for row in range(len(b)):
        add_product_(b[row, t0:t1], G[row, r0:r1, t0:t1].T, above[row, r0:r1])


class AdjointArguments(ctypes.Structure):
    """`AdjointArguments` of scan.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("c", "slope", "G", "b", "above")),
        *((name, ctypes.c_long) for name in ("c_t", "slope_t", "G_t", "b_t", "above_t", "T", "O")),
    ]


def _in_c(above, b, c, slope, G) -> Callable[[int, int], None] | None:
    """Solves tokens t0:t1, everything after them being in b already; None where C does not do that."""
    helper = c_library_for(b, slope, G, c) if b.dtype == torch.float32 else None
    if helper is None or not hasattr(helper, "adjoint_block"):
        return None
    c, slope, G = (x if x is None or x.stride(2) == 1 else x.contiguous() for x in (c, slope, G))

    def solve(t0: int, t1: int) -> None:
        assert t1 - t0 <= MOST_TOKENS
        for row in range(len(b)):
            parts = [x if x is None else x[row, t0:t1] for x in (c, slope, b, above)]
            parts.insert(2, G[row, t0:t1, t0:])
            where, strides = ([0 if x is None else of(x) for x in parts] for of in (Tensor.data_ptr, _stride))
            arguments = AdjointArguments(*where, *strides, t1 - t0, b.shape[2])
            helper.adjoint_block(ctypes.byref(arguments), torch.get_num_threads())

    return solve


def _stride(x: Tensor) -> int:
    return x.stride(0)
