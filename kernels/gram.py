"""gram: h_t·k_s of every pair of tokens of one prompt, which is all that the scan needs of h and k (DESIGN §3.2)."""

from __future__ import annotations

import torch

from .cpu import MOST_TOKENS
from .linear import product

OUTER = MOST_TOKENS  # tokens of one block of the scan
KEEP = 1 << 26  # Gram entries kept for the next linear that shares h (256 MB in float32)
PANEL = 1 << 24  # Gram entries computed together away from the CPU, where a product of few rows wastes the device


def before(write_BT: torch.Tensor, width: int = 1) -> torch.Tensor:
    """Events that each token sees [B, T]: those of earlier columns of `width` tokens."""
    count_BT = write_BT.cumsum(1) - write_BT.long()
    return count_BT if width == 1 else count_BT[:, ::width].repeat_interleave(width, 1)


class Gram:
    """G[t, s] = (1 − decay)^{e(s,t)} (h_t·h_s + 1) scale_s where s < t and s is written, else 0; by rows of OUTER.

    The key of token s is scale_s h_s. Its bias key is scale_s: the 1 is there only with `bias`.

    h [B, T, I] any float dtype; scale [B, T] in the dtype of G, float32 or float64; write [B, T] bool, on the CPU.
    The product has h's own numbers as they are: on CUDA half precision goes in and float32 comes out.

    gate_proj and up_proj share h, scale, bias, write and decay, and so one Gram: its rows are kept while they are
    small and computed again otherwise, so that memory stays bounded for any T.
    """

    def __init__(
        self,
        h_BTI: torch.Tensor,
        scale_BT: torch.Tensor,
        bias: bool,
        write_BT: torch.Tensor,
        decay: float = 0.0,
        width: int = 1,
    ):
        half = h_BTI.dtype.itemsize < 4
        self.precision = "tf32" if half else "ieee"  # of the products with u, where Triton makes them
        self.h = h_BTI if half and h_BTI.is_cuda else h_BTI.to(scale_BT.dtype)
        self.scale, self.bias, self.decay, self.width = scale_BT, bias, decay, width
        self.write = write_BT.to("cpu", torch.bool).expand(h_BTI.shape[:2])
        self.all_written = bool(self.write.all())
        # on the device of h; None: every token is written
        self.written = None if self.all_written else self.write.to(h_BTI.device, non_blocking=True)
        B, T = self.write.shape
        self.height = OUTER if h_BTI.is_cpu else max(1, PANEL // (B * T * OUTER)) * OUTER  # rows computed together
        self._kept: dict[int, torch.Tensor] | None = {} if B * T * T // 2 <= KEEP else None
        self._last: tuple[int, torch.Tensor] | None = None  # the rows that were asked for last, and their first

    def rows(self, t0: int, t1: int) -> torch.Tensor:
        """G[:, t0:t1, :t1] as [B, t1 − t0, t1]; t0 is a multiple of OUTER, and t1 at most OUTER more."""
        p0 = t0 // self.height * self.height
        panel = self._kept.get(p0) if self._kept is not None else None
        if panel is None and self._last is not None and self._last[0] == p0:
            panel = self._last[1]
        if panel is None:
            panel = self.part(p0, min(p0 + self.height, self.write.shape[1]))
            if self._kept is not None:
                self._kept[p0] = panel
            elif self.height > OUTER:
                self._last = p0, panel
        return panel[:, t0 - p0 : t1 - p0, :t1]

    def part(self, t0: int, t1: int) -> torch.Tensor:
        """The same for any t0 and t1, computed now."""
        G = self._products(self.h[:, t0:t1], self.h[:, :t1])
        if self.bias:
            G += 1
        G *= self.scale[:, None, :t1]
        if self.decay != 0:
            counts = before(self.write), before(self.write, self.width)
            count_BT, seen_BT = (x.to(G.device, non_blocking=True) for x in counts)
            events = (seen_BT[:, t0:t1, None] - count_BT[:, None, :t1] - 1).clamp_(min=0)
            G *= (1 - self.decay) ** events.to(G.dtype)
        if self.width == 1:
            G.tril_(t0 - 1)
        else:
            column = torch.arange(t1, device=G.device) // self.width
            G.masked_fill_(column >= column[t0:t1, None], 0)
        return G if self.written is None else G.masked_fill_(~self.written[:, None, :t1], 0)

    def _products(self, h_BMI: torch.Tensor, h_BSI: torch.Tensor) -> torch.Tensor:
        """h_t·h_s, [B, M, S] in scale's dtype."""
        if h_BMI.is_cpu:
            return torch.stack([product(rows, columns) for rows, columns in zip(h_BMI, h_BSI, strict=True)])
        if h_BMI.dtype == self.scale.dtype:
            return torch.bmm(h_BMI, h_BSI.mT)
        return torch.bmm(h_BMI, h_BSI.mT, out_dtype=self.scale.dtype)
