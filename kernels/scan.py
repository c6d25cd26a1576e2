"""scan: all the reads and writes of one prompt at one plastic linear, in parallel (DESIGN §3.2).

    a_t = A_t + Σ_{s<t, s written} (1 − decay)^{e(s,t)} (h_t·k_s + kb_s) u_s        u_t = value(a_t)

e(s,t) is the number of events after s and before t. Neurons are independent, so the tokens of one neuron are
a strictly lower triangular system, nonlinear because u is a function of a.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# value(a_BCO, t0, t1) → u_BCO of tokens t0:t1, rate and clip included
Value = Callable[[torch.Tensor, int, int], torch.Tensor]

OUTER = 128  # tokens whose earlier tokens enter as one GEMM
INNER = 16  # tokens solved together inside
KEEP = 1 << 26  # Gram entries kept for the next linear that shares h and k (256 MB in float32)


class Gram:
    """G[t, s] = (1 − decay)^{e(s,t)} (h_t·k_s + kb_s) where s < t and s is written, else 0; by rows of OUTER.

    h, k [B, T, I] any float dtype, kb [B, T] or None, write [B, T] bool, decay a float or a tensor [] or [B].
    gate_proj and up_proj share h, k, kb, write and decay, and so one Gram: rows are kept while they are small,
    computed again otherwise, so memory stays bounded for any T.
    """

    def __init__(self, h_BTI, k_BTI, kb_BT, write_BT, decay=0.0, dtype=None):
        dtype = dtype or (torch.float64 if k_BTI.dtype == torch.float64 else torch.float32)
        self.h, self.k = h_BTI.to(dtype), k_BTI.to(dtype)
        self.kb = None if kb_BT is None else kb_BT.to(dtype)
        self.write = write_BT.to(torch.bool).expand(h_BTI.shape[:2])
        self.decay = decay
        self.count = self.write.cumsum(1) - self.write.long()  # events before each token
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
        G = self.h[:, t0:t1] @ self.k[:, :t1].mT
        if self.kb is not None:
            G += self.kb[:, None, :t1]
        if isinstance(self.decay, torch.Tensor) or self.decay != 0:
            events = (self.count[:, t0:t1, None] - self.count[:, None, :t1] - 1).clamp_(min=0)
            keep = 1 - torch.as_tensor(self.decay, dtype=G.dtype, device=G.device)
            G *= keep.reshape(-1, 1, 1) ** events.to(G.dtype)
        t = torch.arange(t1, device=G.device)
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


def scan_chunked(a_BTO: torch.Tensor, gram: Gram, value: Value) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in matrix products: earlier tokens enter as a GEMM, INNER tokens are solved together."""
    a_BTO = a_BTO.clone(memory_format=torch.contiguous_format)
    u_BTO = torch.empty_like(a_BTO)
    T = a_BTO.shape[1]
    for t0 in range(0, T, OUTER):
        t1 = min(t0 + OUTER, T)
        G = gram.rows(t0, t1)
        if t0:
            _add_product(a_BTO[:, t0:t1], G[:, :, :t0], u_BTO[:, :t0])
        _solve(a_BTO, u_BTO, G, gram.write, value, t0, t0, t1)
    return a_BTO, u_BTO


def _add_product(a, G, u):
    for row in range(a.shape[0]):  # bmm on CPU is slower than a loop of mm at these sizes
        a[row].addmm_(G[row], u[row])


def _solve(a, u, G, write, value, g0, t0, t1):
    """Tokens t0:t1, everything before t0 being in a already: halves, until a leaf of INNER tokens."""
    if t1 - t0 > INNER:
        mid = t0 + (t1 - t0 + 1) // 2
        _solve(a, u, G, write, value, g0, t0, mid)
        _add_product(a[:, mid:t1], G[:, mid - g0 : t1 - g0, t0:mid], u[:, t0:mid])
        _solve(a, u, G, write, value, g0, mid, t1)
        return
    L = G[:, t0 - g0 : t1 - g0, t0:t1]
    unwritten = ~write[:, t0:t1, None]
    start = a[:, t0:t1]
    a_leaf, u_leaf = _sweep(start, L, unwritten, value, t0, t1)
    a[:, t0:t1], u[:, t0:t1] = a_leaf, u_leaf


def _sweep(start, L, unwritten, value, t0, t1):
    """Fixed-point sweeps of a = start + L u(a). L is strictly lower triangular: sweep n leaves the first n
    tokens exact, so the last one is exact, whatever the rate; usually rounding is reached in a few."""
    a = start
    u = value(a, t0, t1).masked_fill(unwritten, 0)
    tolerance = 4 * torch.finfo(u.dtype).eps
    for _ in range(t1 - t0 - 1):
        a = torch.baddbmm(start, L, u)
        new = value(a, t0, t1).masked_fill(unwritten, 0)
        change, scale = (new - u).abs_().amax(1), new.abs().amax(1)
        u = new
        if bool((change <= tolerance * scale).all()):  # NaN compares false: no early stop
            break
    if bool(u.sum().isfinite()):
        return a, u
    # 0 · NaN is NaN, so a product lets a later token reach back: token by token it cannot
    a, u = start.clone(), torch.zeros_like(start)
    for t in range(t1 - t0):
        a[:, t : t + 1] += L[:, t : t + 1, :t] @ u[:, :t]
        u[:, t : t + 1] = value(a[:, t : t + 1], t0 + t, t0 + t + 1).masked_fill(unwritten[:, t : t + 1], 0)
    return a, u


def scan(
    a_BTO: torch.Tensor, gram: Gram, value: Value, backend: str = "torch"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pre-activations with every earlier write of this prompt in them, and the values written: (a, u).

    a [B, T, O] float32 or float64: frozen product, bias and the read of the factors present before the prompt;
    `gram` from the same h, k, kb, write and decay; `value(a, t0, t1)` the rule for tokens t0:t1, rate and clip
    included (the write mask is applied here). u is 0 where nothing is written.
    """
    match backend:
        case "torch":
            return scan_chunked(a_BTO, gram, value)
        case _:
            raise ValueError(f'scan() got backend {backend!r}, expected "torch" or "triton"')
