"""Where the events of one row lie: whole numbers only, and functions of the row's event count alone.

    slot of event j = j                                  while j < C, the slots there are
                      kept + (j − C) mod (C − kept)      from then on; kept = 0 for a ring

A ring has one slot more than its rank, so that the next event never overwrites one that is still read.

"compress" folds a row into its first `kept` slots as soon as all C are full: after C, 2 C − kept, 3 C − 2 kept, …
events. So what a row holds depends neither on the other rows of a batch nor on how a prompt is split into feeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERFLOW = ("compress", "evict", "grow", "error")


@dataclass(frozen=True)
class Slots:
    """The arithmetic of one overflow policy; "grow" and "error" keep event j in slot j.

    Args:
        capacity: C; the slots that "grow" starts with.
        kept: slots that hold the result of a fold, 0 unless overflow is "compress".
    """

    overflow: str
    capacity: int
    kept: int = 0

    @classmethod
    def of(cls, overflow: str, rank: int, out_features: int, in_features: int) -> Slots:
        """The slots of one policy. "compress" has max(8, rank / 2) more than it keeps, and folds when they are full."""
        if overflow != "compress":
            return cls(overflow, rank + (overflow == "evict"))
        return cls(overflow, rank + max(8, rank // 2), min(rank, out_features, in_features + 1))

    @property
    def window(self) -> int:
        """Events that a ring reads."""
        return self.capacity - 1

    def filled(self, events: int) -> int:
        """Slots that hold anything after so many events."""
        if self.overflow == "compress" and events >= self.capacity:
            return self.kept + (events - self.capacity) % (self.capacity - self.kept)
        return min(events, self.capacity) if self.overflow == "evict" else events

    def slot(self, event: Tensor) -> Tensor:
        """The slot that each event is written to; events are numbered from 0."""
        if self.overflow in ("grow", "error"):
            return event
        later = self.kept + (event - self.capacity) % (self.capacity - self.kept)
        return torch.where(event < self.capacity, event, later)

    def next(self, events: int) -> int:
        """The slot of event number `events`, as a whole number."""
        if self.overflow in ("grow", "error") or events < self.capacity:
            return events
        return self.kept + (events - self.capacity) % (self.capacity - self.kept)

    def last_fold(self, events: int) -> int:
        """The event count at the last fold of a row that has so many events now; 0: never folded."""
        over = events - self.capacity
        return 0 if self.overflow != "compress" or over < 0 else events - over % (self.capacity - self.kept)

    def oldest_event(self, events: int) -> int:
        """The oldest event that still has a slot of its own; all later ones have one, too."""
        return max(0, events - self.window) if self.overflow == "evict" else self.last_fold(events)

    def oldest_moment(self, events: int) -> int:
        """The smallest event count n whose ΔW_n the slots can still form.

        "compress": the last fold. "evict": once an event has left the window, now.
        """
        return events if self.overflow == "evict" and events > self.window else self.last_fold(events)

    def fits(self, events: Sequence[int], counts: Sequence[int]) -> bool:
        """True if `counts` more events overwrite no slot that is read now, and at most the last of them drops one."""
        pairs = [(n, c) for n, c in zip(events, counts, strict=True) if c]
        if self.overflow == "compress":
            return all(self.last_fold(n + c) == self.last_fold(n) for n, c in pairs)
        if self.overflow == "evict":
            return all(c == 1 or n + c <= self.window for n, c in pairs)
        return self.overflow == "grow" or all(n + c <= self.capacity for n, c in pairs)

    def side_by_side(self, events: int, more: int) -> bool:
        """True if `more` events of a row go into slots in order, and none but the last of them folds."""
        return self.overflow in ("grow", "error") or self.next(events) + more <= self.capacity

    def segments(self, events: Sequence[int], write_BT: Tensor, rows_per_column: int = 1) -> list[tuple[int, int]]:
        """Token ranges that can be written one after the other: no row folds, or overwrites a live slot, inside one.

        A range ends with the event that fills a row ("compress"), or before a row has more events than a ring reads.
        The `rows_per_column` tokens of one column are kept in one range, because all read before any writes. A fold
        may still fall between their writes.
        """
        tokens, width = write_BT.shape[1], rows_per_column
        if tokens <= width or self.overflow in ("grow", "error"):
            return [(0, tokens)]
        count_BC = write_BT.cpu().unflatten(1, (-1, width)).sum(2)
        before_B1 = torch.tensor(list(events), device="cpu")[:, None]
        after_BC = before_B1 + count_BC.cumsum(1)
        cuts = []
        if self.overflow == "compress":
            free, over_BC = self.capacity - self.kept, after_BC - self.capacity
            full_C = ((over_BC >= 0) & (over_BC // free != (over_BC - count_BC).clamp(min=-1) // free)).any(0)
            cuts = [c + 1 for c in full_C.nonzero()[:, 0].tolist()]
        else:
            start = 0
            while (over_C := (after_BC - before_B1 > self.window).any(0)).any():
                start = max(start + 1, int(over_C.int().argmax()))
                cuts.append(start)
                before_B1 = after_BC[:, start - 1, None]
        return [(a * width, b * width) for a, b in itertools.pairwise(sorted({0, *cuts, tokens // width}))]
