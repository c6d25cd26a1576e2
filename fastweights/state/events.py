"""What one pass wants to write: candidate events, one per token of every row. Shape suffixes as in `log`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def side_by_side(x_BT: Tensor) -> Tensor:
    """B rows [B, T, …] that share one log, as the one row of that log, column after column: [1, T · B, …]."""
    return x_BT.transpose(0, 1).reshape(1, -1, *x_BT.shape[2:])


def as_rows(x_1T: Tensor, rows: int) -> Tensor:
    """The inverse of `side_by_side`."""
    return x_1T.view(-1, rows, *x_1T.shape[2:]).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class Events:
    """What one pass wants to write: one candidate event per token of every row.

    Which of them are written is a matter of the host: on a GPU it must not wait for the device to know how many events
    there are and which slots they take.
    """

    U_BTO: Tensor
    K_BTI: Tensor
    bias_BT: Tensor | None
    write_BT: Tensor  # bool, best on the CPU: which of them are written
    all_written: bool = False  # True: the caller knows that every entry of write_BT is True
    norm_BT: Tensor | None = None  # with a budget: ‖ΔW‖_F after each event, before the budget scales it

    @property
    def counts(self) -> list[int]:
        """Events to be written, per row."""
        rows, tokens = self.write_BT.shape
        return [tokens] * rows if self.all_written else self.write_BT.sum(1).tolist()

    def part(self, start: int, end: int) -> Events:
        """The events of tokens start to end."""
        return self._each(lambda t: t[:, start:end])

    def joined(self, other: Events) -> Events:
        """These events, replaced by those of `other` wherever `other` writes."""
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
        return Events(U_BTO, K_BTI, bias_BT, write_BT, self.all_written)

    def repeated(self, rows: int) -> Events:
        """The events of one row, for `rows` rows that begin alike."""
        return self._each(lambda t: t.expand(rows, *t.shape[1:]))

    def total(self) -> Tensor:
        """The sum of all their numbers, []: not finite if one of them is not, and perhaps where they are large."""
        total = self.U_BTO.sum() + self.K_BTI.sum()
        return total if self.bias_BT is None else total + self.bias_BT.sum()

    def finite_BT(self) -> Tensor:
        """Whether key, value and bias key of each event are finite, [B, T]."""
        finite_BT = self.U_BTO.isfinite().all(-1) & self.K_BTI.isfinite().all(-1)
        return finite_BT if self.bias_BT is None else finite_BT & self.bias_BT.isfinite()

    def detached(self) -> Events:
        """The same events without their graph."""
        return self._each(Tensor.detach)

    def to(self, device: torch.device) -> Events:
        """The same events on another device; which are written stays, or comes, on the CPU."""
        write_BT = self.write_BT.cpu()
        return replace(self._each(lambda t: t if t is self.write_BT else t.to(device)), write_BT=write_BT)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Events:
        bias_BT, norm_BT = (None if t is None else change(t) for t in (self.bias_BT, self.norm_BT))
        U_BTO, K_BTI, write_BT = map(change, (self.U_BTO, self.K_BTI, self.write_BT))
        return Events(U_BTO, K_BTI, bias_BT, write_BT, self.all_written, norm_BT)
