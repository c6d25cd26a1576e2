"""What one pass wants to write: candidate events, one per token of every row. Shape suffixes as in `state`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def side_by_side(x_BT: Tensor) -> Tensor:
    """B rows [B, T, …] that share one log, as its one row, column by column: [1, T · B, …]."""
    return x_BT.transpose(0, 1).reshape(1, -1, *x_BT.shape[2:])


def as_rows(x_1T: Tensor, rows: int) -> Tensor:
    """The inverse of `side_by_side`."""
    return x_1T.view(-1, rows, *x_1T.shape[2:]).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Events:
    """What one pass wants to write: one candidate event per token of every row."""

    U_BTO: Tensor
    K_BTI: Tensor
    bias_BT: Tensor | None
    write_BT: Tensor  # bool: which of them are written
    whole: bool = False  # whether that is all of them, when the caller knows
    norm_BT: Tensor | None = None  # ‖ΔW‖_F after each of them, before a budget scales it: see `EventLog.measured`

    @property
    def counts(self) -> list[int]:
        """Events to be written, per row."""
        rows, tokens = self.write_BT.shape
        return [tokens] * rows if self.whole else self.write_BT.sum(1).tolist()

    def part(self, start: int, end: int) -> Events:
        """The events of tokens start to end."""
        return self._each(lambda t: t[:, start:end])

    def joined(self, other: Events) -> Events:
        """These events, and those of `other` in the rows where it writes."""
        write_BT = other.write_BT
        bias_BT = None
        if self.bias_BT is not None and other.bias_BT is not None:
            bias_BT = torch.where(write_BT, other.bias_BT, self.bias_BT)
        U_BTO = torch.where(write_BT[..., None], other.U_BTO, self.U_BTO)
        K_BTI = torch.where(write_BT[..., None], other.K_BTI, self.K_BTI)
        return Events(U_BTO, K_BTI, bias_BT, self.write_BT | write_BT)

    def side_by_side(self) -> Events:
        """The events of many rows as those of the one log they share."""
        bias_BT = None if self.bias_BT is None else side_by_side(self.bias_BT)
        U_BTO, K_BTI, write_BT = map(side_by_side, (self.U_BTO, self.K_BTI, self.write_BT))
        return Events(U_BTO, K_BTI, bias_BT, write_BT, self.whole)

    def finite_BT(self) -> Tensor:
        finite_BT = self.U_BTO.isfinite().all(-1) & self.K_BTI.isfinite().all(-1)
        return finite_BT if self.bias_BT is None else finite_BT & self.bias_BT.isfinite()

    def to(self, device: torch.device) -> Events:
        return self._each(lambda t: t.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Events:
        bias_BT, norm_BT = (None if t is None else change(t) for t in (self.bias_BT, self.norm_BT))
        return Events(
            change(self.U_BTO), change(self.K_BTI), bias_BT, change(self.write_BT), whole=self.whole, norm_BT=norm_BT
        )
