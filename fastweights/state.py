"""The event log of one plastic linear: low-rank factors, their weights, and what happens when it is full.

    ΔW_n = Σ_j w_j u_j k_jᵀ      w_j = (1 − decay)^(n − 1 − birth_j), 0 for an empty slot
    Δb_n = Σ_j w_j s_j u_j       s_j = the bias key of event j (0 for rules without bias)

Decay and the scalings of a budget (one more factor of w_j) live in the weights alone: nothing that was written is
rewritten, except by a fold. `slots` says where an event lies, `compress` how slots are folded, `budget` how ΔW is
kept from growing. Knows nothing of modules.
Shape suffixes: B rows, T tokens, R slots, O out, I in, M moments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from .budget import Budget, OneByOne, grown, inner, norms
from .compress import effective_rank, fold, spectrum
from .events import Events
from .slots import OVERFLOW, Slots

__all__ = ["OVERFLOW", "EventLog"]

BUFFERS = {"U": "U_BRO", "K": "K_BRI", "bias": "bias_BR", "birth": "birth_BR", "norm": "norm_BR"}


class EventLog:
    """Factors of B rows, slot-major, in float32 for their whole life (float64 for a float64 model).

    Args:
        rank: slots allocated at the start.
        overflow: what happens when the slots of a row are full:
            "compress" keeps the best `rank` rank-1 terms of `rank` + max(8, `rank` / 2) slots and bounds what was
            lost (`certificate`); exact until they are full;
            "evict" forgets the oldest event: ΔW is exactly the sum over the last `rank` events;
            "grow" doubles the buffers;
            "error" refuses the write that does not fit.
        decay: share of ΔW lost at each event.
        archive: with "compress" and "evict", keep every event on the CPU as well, so that any moment can be read
            exactly and any number of events undone. "grow" and "error" keep every event anyway.
        budget: on ‖ΔW‖_F after every event; None = no limit.

    Raises:
        ValueError: an overflow or dtype that does not exist.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        out_features: int,
        in_features: int,
        rank: int,
        overflow: str,
        decay: float,
        dtype: torch.dtype,
        device: torch.device,
        archive: bool = False,
        budget: Budget | None = None,
    ):
        if overflow not in OVERFLOW:
            raise ValueError(f"{name}: overflow={overflow!r}, expected one of {', '.join(map(repr, OVERFLOW))}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: factors in {dtype} would stop moving, expected torch.float32 or torch.float64")
        self.name, self.rank, self.overflow, self.decay = name, rank, overflow, decay
        self.budget = budget
        self.slots = Slots.of(overflow, rank, out_features, in_features)
        slots = self.slots.capacity
        self.U_BRO = torch.zeros(rows, slots, out_features, dtype=dtype, device=device)
        self.K_BRI = torch.zeros(rows, slots, in_features, dtype=dtype, device=device)
        self.bias_BR = torch.zeros(rows, slots, dtype=dtype, device=device)
        self.birth_BR = torch.full((rows, slots), -1, dtype=torch.int64, device=device)  # -1: empty
        self.events = [0] * rows  # events so far, per row
        self.errors = [(0.0, 0.0)] * rows  # (error_2, error_F) as of each row's last fold
        # ‖ΔW‖_F after the event of each slot, before it was scaled
        self.norm_BR = None if budget is None else torch.zeros(rows, slots, dtype=torch.float64, device=device)
        self.scaled = [0] * rows  # events so far that the budget scaled, per row
        self.archive: EventLog | None = None
        if archive and overflow in ("compress", "evict"):
            size = (rows, out_features, in_features, rank)
            self.archive = EventLog(name, *size, "grow", decay, dtype, torch.device("cpu"), budget=budget)

    @property
    def dtype(self) -> torch.dtype:
        return self.U_BRO.dtype

    @property
    def capacity(self) -> int:
        return self.U_BRO.shape[1]

    @property
    def used(self) -> int:
        """Slots that hold anything, longest row."""
        return max(self.slots.filled(n) for n in self.events)

    @property
    def bytes(self) -> int:
        """Memory of the buffers, the archive's included."""
        return sum(t.nbytes for t in self._buffers().values()) + (self.archive.bytes if self.archive else 0)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [B, used, O], K [B, used, I], bias keys [B, used]: views."""
        n = self.used
        return self.U_BRO[:, :n], self.K_BRI[:, :n], self.bias_BR[:, :n]

    def weights(self, events_BT: Tensor, slots: int | None = None) -> Tensor:
        """w [B, T, `slots` or used] as seen after `events_BT` events of each row (int64), the last fold or later."""
        slots = slots or self.used
        norm = None if self.norm_BR is None else self.norm_BR[:, None, :slots]
        return self._weigh(self.birth_BR[:, None, :slots], norm, events_BT[..., None], self.dtype)

    def plain(self, tokens: int) -> bool:
        """Whether every used slot of every row weighs 1 for the next `tokens` tokens, whatever they write."""
        full = self.overflow == "evict" and (tokens > 1 or self.used == self.capacity)
        return self.decay == 0 and len(set(self.events)) == 1 and not full and not any(self.scaled)

    def now(self) -> Tensor:
        """Events so far as a tensor [B, 1], for `weights`."""
        return torch.tensor(self.events, device=self.U_BRO.device)[:, None]

    # ---- writing

    def segments(self, write_BT: Tensor, width: int = 1) -> list[tuple[int, int]]:
        """Token ranges to read and append one after the other, so that one pass is what token by token is.

        `width` tokens side by side read before any of them writes.
        """
        return self.slots.segments(self.events, write_BT, width)

    def fits(self, counts: Sequence[int]) -> bool:
        """Whether appending so many events [B] leaves what is written as it is, so that `roll_back` takes them back."""
        return self.slots.fits(self.events, counts)

    def check_room(self, counts: Sequence[int]) -> None:
        """Refuses, before anything has changed, what `append` could not take; counts [B] events to come."""
        if self.overflow != "error":
            return
        need = max(n + c for n, c in zip(self.events, counts, strict=True))
        if need > self.rank:
            raise ValueError(
                f"{self.name}: {need} events do not fit its rank of {self.rank} ({max(self.events)} are written); "
                f'attach with a larger rank or overflow="grow"'
            )

    def append(self, new: Events) -> None:
        """Writes the events of one pass, in token order; rows may write different numbers of them.

        Raises:
            ValueError: for events that do not fit ("error"), are not finite or over a budget that stops; nothing is
                written then.
            OneByOne: one of several tokens is over the budget; nothing is written then.
        """
        new = self.measured(new)
        self.check(new)
        self.write(new)

    def check(self, new: Events) -> None:
        """Refuses, before anything has changed, events that do not fit or are not finite."""
        self.check_room(new.counts)
        if math.isfinite(float(new.U_BTO.sum() + new.K_BTI.sum())):  # one look for all; a sum may overflow by itself
            return
        bad_BT = new.write_BT & ~new.finite_BT()
        if bad_BT.any():
            row, token = bad_BT.nonzero()[0].tolist()
            self.refuse(row, self.events[row] + int(new.write_BT[row, : token + 1].sum()))

    def refuse(self, row: int, event: int) -> NoReturn:
        """An event that is not finite, by its number."""
        raise ValueError(
            f"event {event} of {self.name} (row {row}) has a non-finite factor, expected finite ones; nothing of "
            f"this feed is written (a smaller rate, a clip or mu > 0 may help)"
        )

    def measured(self, new: Events) -> Events:
        """The same events, with ‖ΔW‖_F after each where there is a budget on it: what `write` takes.

        Raises:
            ValueError: the one token's event is over a budget that stops.
            OneByOne: an event is over the budget, but the next token must see its scaling: several are too many.
        """
        if self.budget is None or new.norm_BT is not None:
            return new
        norm_BT = self._norms(new)
        over_BT = new.write_BT & ~(norm_BT <= self.budget.limit)  # NaN is over as well
        if over_BT.any():
            if new.write_BT.shape[1] > 1:
                raise OneByOne
            self.check(new)
            row = int(over_BT.nonzero()[0, 0])
            norm = float(norm_BT[row, 0])
            if self.budget.over == "stop" or not math.isfinite(norm):
                raise ValueError(
                    f"event {self.events[row] + 1} of {self.name} (row {row}) makes ‖ΔW‖ {norm:.6g}, over its budget "
                    f"of {self.budget.share:g} · ‖W‖ = {self.budget.limit:.6g}; nothing of this feed is written (a "
                    f'smaller rate, more decay or over_budget="scale" may help)'
                )
        return replace(new, norm_BT=norm_BT)

    def _norms(self, new: Events) -> Tensor:
        """‖ΔW‖_F after each event of one pass if none of them is scaled, [B, T] float64; any number if not written."""
        assert self.norm_BR is not None
        n, tokens = self.used, new.write_BT.shape[1]
        (U_BRO, K_BRI, _), before_B1 = self.factors(), self.now()
        after_BT = before_B1 + new.write_BT.cumsum(1)
        new_BT = torch.where(new.write_BT, after_BT - 1, -1)
        birth_BR = self.birth_BR[:, :n]
        birth_BS = torch.cat([birth_BR, new_BT], 1)
        norm_BS = torch.cat([self.norm_BR[:, :n], self.norm_BR.new_zeros(new_BT.shape)], 1)
        w_BTS = self._weigh(birth_BS[:, None], norm_BS[:, None], after_BT[..., None], torch.float64)
        ring = self.overflow == "evict"
        if ring and (tokens > 1 or max(self.events) % self.capacity == 0):  # once per turn, so that no error adds up
            dead_BS1 = (birth_BS < 0)[..., None]
            U_BSO, K_BSI = torch.cat([U_BRO, new.U_BTO], 1), torch.cat([K_BRI, new.K_BTI], 1)
            return norms(U_BSO.masked_fill(dead_BS1, 0), K_BSI.masked_fill(dead_BS1, 0), w_BTS)
        square_B = self._norm_now().square()
        if ring and max(self.events) >= self.rank:  # ‖D − y‖² = ‖D‖² − ⟨D + (D − y), y⟩ for the y that leaves
            w_BR = self._weigh(birth_BR, self.norm_BR[:, :n], before_B1, torch.float64)
            leaves_BR = (birth_BR >= 0) & (birth_BR == before_B1 - self.rank)
            slot_B11 = leaves_BR.int().argmax(1)[:, None, None]
            dot_BR = inner(U_BRO.take_along_dim(slot_B11, 1), K_BRI.take_along_dim(slot_B11, 1), U_BRO, K_BRI)[:, 0]
            w_y_B1 = w_BR.masked_fill(~leaves_BR, 0).sum(1, keepdim=True)
            both_BR = w_BR + w_BR.masked_fill(leaves_BR, 0)
            square_B = square_B - (w_y_B1 * both_BR * dot_BR.masked_fill(w_BR == 0, 0)).sum(1)
        own_BTT = inner(new.U_BTO, new.K_BTI, new.U_BTO, new.K_BTI)
        dot_BTS = torch.cat([inner(new.U_BTO, new.K_BTI, U_BRO, K_BRI), own_BTT], 2)
        w_BTS = w_BTS.masked_fill(birth_BS[:, None] == new_BT[..., None], 0)  # what an event finds, faded by it
        found_BT = (w_BTS * dot_BTS.masked_fill(w_BTS == 0, 0)).sum(-1)
        more_BT = 2 * found_BT + own_BTT.diagonal(dim1=1, dim2=2)
        return grown(square_B, more_BT, new.write_BT, (1 - self.decay) ** 2)

    def _norm_now(self) -> Tensor:
        """‖ΔW‖_F of every row as it is now, [B] float64; only with a budget."""
        assert self.norm_BR is not None
        assert self.budget is not None
        last_BR = (self.birth_BR >= 0) & (self.birth_BR == self.now() - 1)
        return torch.where(last_BR, self.norm_BR.clamp(max=self.budget.limit), 0).amax(1)

    def write(self, new: Events) -> None:
        """Writes events that `measured` and `check` have passed."""
        if self.archive is not None:
            self.archive.write(new.to(torch.device("cpu")))
        self._append(new)

    def reserve(self, counts: Sequence[int]) -> None:
        """Makes room for events that a kernel puts into their slots itself."""
        if self.overflow == "grow" and max(self.events) + max(counts) > self.capacity:
            self._reserve(max(n + c for n, c in zip(self.events, counts, strict=True)))

    def next_slot(self) -> int | None:
        """Where a kernel may put the next event of every row by itself; None: rows differ, or there is more to do."""
        rows = len(self.events)
        alike = self.archive is None and self.budget is None and self.events.count(self.events[0]) == rows
        return self.slots.next(self.events[0]) if alike and self.fits([1] * rows) else None

    def landed(self, counts: Sequence[int]) -> None:
        """Counts the finite events, at most one a row, that a kernel has put into the next slot; folds full rows.

        Of logs without a budget.
        """
        if self.archive is not None:
            each, slot = torch.arange(len(counts)), self.slots.slot(torch.tensor(self.events))
            U, K, bias = (buffer[each, slot][:, None].cpu() for buffer in (self.U_BRO, self.K_BRI, self.bias_BR))
            self.archive.write(Events(U, K, bias, torch.tensor(counts)[:, None] > 0))
        self.events = [n + c for n, c in zip(self.events, counts, strict=True)]
        if self.overflow == "compress":
            for row, (n, count) in enumerate(zip(self.events, counts, strict=True)):
                if count and self.slots.last_fold(n) == n:
                    self._fold(row)

    def _count_scaled(self, new: Events) -> None:
        if self.budget is not None and new.norm_BT is not None:
            more = (new.write_BT & (new.norm_BT > self.budget.limit)).sum(1).tolist()
            self.scaled = [n + m for n, m in zip(self.scaled, more, strict=True)]

    def _append(self, new: Events) -> None:
        self._count_scaled(new)
        if new.whole and len(set(self.events)) == 1 and self.fits(new.counts):
            return self._write_whole(new)
        for start, end in self.segments(new.write_BT):
            before = self.events
            self._write(new.part(start, end))
            for row, (n, was) in enumerate(zip(self.events, before, strict=True)):
                if n != was and self.slots.last_fold(n) == n:
                    self._fold(row)

    def _write_whole(self, new: Events) -> None:
        """Every token of every row, into slots that lie side by side: what a decode step does."""
        n, tokens = self.events[0], new.write_BT.shape[1]
        if self.overflow == "grow":
            self._reserve(n + tokens, n + tokens)
        first = self.slots.next(n)
        slots = slice(first, first + tokens)
        self.U_BRO[:, slots], self.K_BRI[:, slots] = new.U_BTO, new.K_BTI
        if new.bias_BT is not None:
            self.bias_BR[:, slots] = new.bias_BT
        if self.norm_BR is not None and new.norm_BT is not None:
            self.norm_BR[:, slots] = new.norm_BT
        self.birth_BR[:, slots] = torch.arange(n, n + tokens, device=self.birth_BR.device)
        self.events = [n + tokens] * len(self.events)

    def _write(self, new: Events) -> None:
        """The events of one segment."""
        counts = new.counts
        row, token = new.write_BT.nonzero(as_tuple=True)
        event = torch.tensor(self.events, device=row.device)[row] + (new.write_BT.cumsum(1) - 1)[row, token]
        self.events = [n + c for n, c in zip(self.events, counts, strict=True)]
        if self.overflow == "grow":
            self._reserve(max(self.events))
        slot = self.slots.slot(event)
        self.U_BRO[row, slot] = new.U_BTO[row, token].to(self.dtype)
        self.K_BRI[row, slot] = new.K_BTI[row, token].to(self.dtype)
        if new.bias_BT is not None:
            self.bias_BR[row, slot] = new.bias_BT[row, token].to(self.dtype)
        if self.norm_BR is not None and new.norm_BT is not None:
            self.norm_BR[row, slot] = new.norm_BT[row, token]
        self.birth_BR[row, slot] = event

    def _fold(self, row: int) -> None:
        """Keeps the best of a full row: E ← what decay and scalings since the last fold leave of E, + what is lost."""
        n, kept = self.events[row], self.slots.kept
        norm_R = None if self.norm_BR is None else self.norm_BR[row]
        w_R = self._weigh(self.birth_BR[row], norm_R, n, torch.float64)
        try:
            best = fold(self.U_BRO[row], self.K_BRI[row], self.bias_BR[row], w_R, kept)
        except ValueError as error:
            raise ValueError(f"event {n} of {self.name} (row {row}) fills its log, and {error}") from None
        fade = self._fade(row, self.slots.last_fold(n - 1))
        self.errors[row] = (fade * self.errors[row][0] + best.error_2, fade * self.errors[row][1] + best.error_F)
        self.U_BRO[row, :kept], self.K_BRI[row, :kept], self.bias_BR[row, :kept] = best.U_RO, best.K_RI, best.bias_R
        self.birth_BR[row] = -1
        self.birth_BR[row, :kept] = n - 1  # weight 1 now; later decay applies to the sum as a whole
        if norm_R is not None and self.budget is not None:
            w_11R = w_R.new_ones(1, 1, kept)
            norm = norms(best.U_RO[None], best.K_RI[None], w_11R)[0, 0]
            norm_R[:kept] = norm.clamp(max=self.budget.limit)  # a fold rounds, it is not scaled

    def _fade(self, row: int, fold: int) -> float:
        """What decay and scalings have left of a row's last fold, at event count `fold`: slot 0 is part of it."""
        fade, n = (1.0 - self.decay) ** (self.events[row] - fold), self.events[row]
        if self.budget is None or self.norm_BR is None or not self.scaled[row]:
            return fade
        return fade * float(self.budget.left(self.birth_BR[row], self.norm_BR[row], n)[0])

    def _reserve(self, slots: int, written: int = 0) -> None:
        """Makes room; U and K of new slots below `written` are left to the caller, who is about to write them."""
        if slots <= self.capacity:
            return
        n, slots = self.capacity, max(slots, 2 * self.capacity)
        for name, old in self._buffers().items():
            larger = old.new_empty(old.shape[0], slots, *old.shape[2:])
            empty = max(n, written) if name in ("U", "K") else n
            larger[:, :n], larger[:, empty:] = old, -1 if name == "birth" else 0
            setattr(self, BUFFERS[name], larger)

    # ---- other moments

    def oldest_exact_moment(self, row: int) -> int:
        """The earliest event count n whose ΔW_n can be formed exactly from what is kept: see `Slots.oldest_moment`.

        Under "compress" that is ΔW_n as the log held it then; with an archive any n is, and without folding error.
        """
        return 0 if self.archive is not None else self.slots.oldest_moment(self.events[row])

    def oldest_event(self, row: int) -> int:
        """The oldest event (from 0) whose own u and k are kept; older ones cannot be looked at or left out."""
        return 0 if self.archive is not None else self.slots.oldest_event(self.events[row])

    def moment_factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U [B, slots, O], K [B, slots, I], bias keys and birth [B, slots]: what `weights_at` weighs; views.

        Of the archive (on the CPU) where there is one, of the log itself otherwise.
        """
        known = self.archive or self
        return *known.factors(), known.birth_BR[:, : known.used]

    def weights_at(self, moments: Sequence[int], row: int = 0) -> Tensor:
        """w [M, slots] that give one row's ΔW after each of `moments` events from `moment_factors`.

        Raises:
            ValueError: a moment that is no longer exact, or that has not come yet.
        """
        oldest, newest = self.oldest_exact_moment(row), self.events[row]
        for moment in moments:
            if not oldest <= moment <= newest:
                raise ValueError(
                    f"{self.name}: ΔW of row {row} after event {moment} is not kept, expected a moment from "
                    f"{oldest} (the oldest that is exact) to {newest}"
                )
        known = self.archive or self
        birth_R = known.birth_BR[row, : known.used]
        norm_R = None if known.norm_BR is None else known.norm_BR[row, : known.used]
        return self._weigh(birth_R, norm_R, torch.tensor(list(moments), device=birth_R.device)[:, None], self.dtype)

    def rewind(self, events: Sequence[int]) -> None:
        """Forgets the events after `events` [B]: the log as if they had never been written.

        Raises:
            ValueError: it would take events that are folded or evicted and in no archive; nothing changes then.
        """
        events = list(events)
        if len(events) != len(self.events) or any(not 0 <= e <= n for e, n in zip(events, self.events, strict=True)):
            raise ValueError(f"{self.name}: rewind({events}), expected {len(self.events)} counts up to {self.events}")
        lost = [row for row, n in enumerate(events) if n < self.slots.oldest_moment(self.events[row])]
        if lost and self.archive is None:
            row = lost[0]
            raise ValueError(
                f"{self.name}: row {row} cannot go back to event {events[row]}, its oldest exact moment is "
                f'{self.oldest_exact_moment(row)} of {self.events[row]} (overflow="{self.overflow}" without an archive)'
            )
        self.roll_back(events)
        if self.archive is not None:
            self._replay(lost)

    def roll_back(self, events: Sequence[int]) -> None:
        """Takes back events that `fits` said fit: unlike `rewind`, it does not ask what came before them."""
        gone_BR = self.birth_BR >= torch.tensor(list(events), device=self.birth_BR.device)[:, None]
        if self.budget is not None and self.norm_BR is not None:
            fewer = (gone_BR & (self.norm_BR > self.budget.limit)).sum(1).tolist()
            self.scaled = [n - f for n, f in zip(self.scaled, fewer, strict=True)]
        self.birth_BR.masked_fill_(gone_BR, -1)
        self.events = list(events)
        if self.archive is not None:
            self.archive.roll_back(events)

    def clear(self) -> None:
        """Forgets every event; the buffers stay."""
        self.birth_BR.fill_(-1)
        rows = len(self.events)
        self.events, self.scaled, self.errors = [0] * rows, [0] * rows, [(0.0, 0.0)] * rows
        if self.archive is not None:
            self.archive.clear()

    def _replay(self, rows: list[int]) -> None:
        """Writes the archived events of some rows again, from the first: the same folds, the same bits."""
        assert self.archive is not None
        if not rows:
            return
        self.birth_BR[rows] = -1
        for row in rows:
            self.events[row], self.errors[row], self.scaled[row] = 0, (0.0, 0.0), 0
        live_BR = self.archive.birth_BR >= 0
        chosen_BR = torch.zeros_like(live_BR)
        chosen_BR[rows] = live_BR[rows]
        past = self.archive
        everything = Events(past.U_BRO, past.K_BRI, past.bias_BR, chosen_BR, norm_BT=past.norm_BR)
        for start in range(0, self.archive.used, self.capacity):  # by parts: the archive may be larger than the device
            self._append(everything.part(start, start + self.capacity).to(self.U_BRO.device))

    def clone(self) -> EventLog:
        other = object.__new__(EventLog)
        for key, value in self.__dict__.items():
            other.__dict__[key] = value.clone() if isinstance(value, (Tensor, EventLog)) else value
        other.events, other.errors, other.scaled = list(self.events), list(self.errors), list(self.scaled)
        return other

    def become(self, other: EventLog) -> None:
        """Takes over all that a log of the same form holds, in place: the buffers keep their addresses if they can."""
        slots = other.capacity
        self._reserve(slots)
        self.birth_BR[:, slots:] = -1
        for key, buffer in self._buffers().items():
            buffer[:, :slots] = other._buffers()[key]
        self.events, self.errors, self.scaled = list(other.events), list(other.errors), list(other.scaled)
        if self.archive is not None and other.archive is not None:
            self.archive.become(other.archive)

    def rows(self, chosen: Sequence[int]) -> EventLog:
        """A copy whose row n is row `chosen[n]` of this log."""
        other = self.clone()
        for name, buffer in self._buffers().items():
            setattr(other, BUFFERS[name], buffer[list(chosen)])
        other.events, other.errors = [self.events[r] for r in chosen], [self.errors[r] for r in chosen]
        other.scaled = [self.scaled[r] for r in chosen]
        other.archive = None if self.archive is None else self.archive.rows(chosen)
        return other

    # ---- looking

    def delta_weight(self, row: int, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW of one row, dense [O, I], computed in `dtype` (the log's own unless given)."""
        U_RO, K_RI, _ = self._weighted(row, dtype or self.dtype)
        return U_RO.T @ K_RI

    def delta_norm(self, row: int) -> float:
        """‖ΔW‖_F of one row, from the factors alone."""
        return float(self.spectrum(row).norm())

    def delta_bias(self, row: int, dtype: torch.dtype | None = None) -> Tensor:
        """Δb of one row, [O], computed in `dtype` (the log's own unless given)."""
        U_RO, _, bias_R = self._weighted(row, dtype or self.dtype)
        return bias_R @ U_RO

    def certificate(self, row: int) -> tuple[float, float]:
        """(error_2, error_F) of one row: ‖[ΔW | Δb]_exact − [ΔW | Δb]‖₂ ≤ error_2, and ‖·‖_F ≤ error_F.

        Exact is the sum over the events as they were given, in the log's dtype ("evict": over those of the window,
        so 0); what is bounded is the sum over the factors as they are stored, in exact arithmetic.
        """
        fade = self._fade(row, self.slots.last_fold(self.events[row]))
        return fade * self.errors[row][0], fade * self.errors[row][1]

    def effective_rank(self, row: int) -> float:
        """exp of the entropy of the normalised singular values of ΔW of one row; 0 where ΔW is zero."""
        return effective_rank(self.spectrum(row))

    def spectrum(self, row: int) -> Tensor:
        """The singular values of ΔW of one row, descending, float64; as many as it has slots, at most."""
        U_RO, K_RI, _ = self._weighted(row, torch.float64)
        return spectrum(U_RO, K_RI)

    def event_norms(self, row: int) -> Tensor:
        """‖u‖‖k‖ of every event of one row as it was written, [events] float64; NaN before `oldest_event`."""
        U_RO, K_RI, _, birth_R = (factor[row] for factor in self.moment_factors())
        own_R = birth_R >= self.oldest_event(row)  # what a fold made is born before that
        norm = torch.full((self.events[row],), float("nan"), dtype=torch.float64)
        norm[birth_R[own_R].cpu()] = (U_RO[own_R].double().norm(dim=1) * K_RI[own_R].double().norm(dim=1)).cpu()
        return norm

    # ---- saving

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that moves: tensors (copies of the used slots), and values that JSON holds exactly."""
        n = self.used
        tensors = {key: buffer[:, :n].clone() for key, buffer in self._buffers().items()}
        meta = {**self.form(), "events": list(self.events), "errors": [list(pair) for pair in self.errors]}
        if self.budget is not None:
            meta["scaled"] = list(self.scaled)
        if self.archive is not None:
            saved, meta["archive"] = self.archive.state_dict()
            tensors |= {f"archive.{key}": t for key, t in saved.items()}
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over, bit for bit, what `state_dict` gave.

        Raises:
            ValueError: it is of another linear, shape, policy or dtype, or incomplete; nothing changes then.
        """
        self._check_state(tensors, meta)
        slots = tensors["U"].shape[1]
        if self.overflow == "grow":
            self._reserve(slots)
        self.birth_BR.fill_(-1)
        for key, buffer in self._buffers().items():
            buffer[:, :slots] = tensors[key]
        self.events = [int(n) for n in meta["events"]]
        self.errors = [(float(error_2), float(error_F)) for error_2, error_F in meta["errors"]]
        self.scaled = [int(n) for n in meta.get("scaled", [0] * len(self.events))]
        if self.archive is not None:
            self.archive.load_state_dict(_without_prefix(tensors), meta["archive"])

    def check_form(self, form: Mapping[str, Any], saved: str) -> None:
        """Refuses a log, by its `form`, that this one could not `become`; `saved` names it."""
        for key, wanted in self.form().items():
            if form.get(key) != wanted:
                raise ValueError(f"{self.name}: the {saved} log has {key} {form.get(key)!r}, expected {wanted!r}")

    def _check_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self.check_form(meta, "saved")
        if (self.archive is None) != ("archive" not in meta):
            raise ValueError(
                f"{self.name}: the saved log has {'an' if 'archive' in meta else 'no'} archive, "
                f"expected {'none' if self.archive is None else 'one'}"
            )
        slots = max(self.slots.filled(int(n)) for n in meta["events"])
        for key, buffer in self._buffers().items():
            wanted = ([len(meta["events"]), slots, *buffer.shape[2:]], buffer.dtype)
            found = (list(tensors[key].shape), tensors[key].dtype) if key in tensors else "missing"
            if found != wanted:
                raise ValueError(f"{self.name}: the saved {key} is {found}, expected {wanted}")
        if self.archive is not None:
            self.archive._check_state(_without_prefix(tensors), meta["archive"])

    def _buffers(self) -> dict[str, Tensor]:
        every = {name: getattr(self, attribute) for name, attribute in BUFFERS.items()}
        return {name: buffer for name, buffer in every.items() if buffer is not None}

    def form(self) -> dict[str, Any]:
        """What a saved log must have in common with the one that loads it."""
        size = {"rows": len(self.events), "out_features": self.U_BRO.shape[2], "in_features": self.K_BRI.shape[2]}
        policy = {"rank": self.rank, "overflow": self.overflow, "decay": self.decay, "dtype": str(self.dtype)[6:]}
        return {"name": self.name, **size, **policy, "budget": None if self.budget is None else asdict(self.budget)}

    # ---- weights

    def _weigh(self, birth: Tensor, norm: Tensor | None, events: Tensor | int, dtype: torch.dtype) -> Tensor:
        """w of slots born at event `birth`, after `events` events; [..., R], broadcasts."""
        age = events - 1 - birth
        alive = (birth >= 0) & (age >= 0)
        if self.overflow == "evict":
            alive &= age < self.rank
        # float64: a power with thousands of events in the exponent
        w = alive if self.decay == 0 else alive * torch.pow(1.0 - self.decay, age.clamp(min=0).double())
        if self.budget is not None and norm is not None and any(self.scaled):
            w = w * self.budget.left(birth, norm, events)
        return w.to(dtype)

    def _weighted(self, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """w ⊙ U, K and bias keys of one row as it is now, all 0 in slots of weight 0, which may hold anything."""
        n = self.used
        norm_R = None if self.norm_BR is None else self.norm_BR[row, :n]
        w_R = self._weigh(self.birth_BR[row, :n], norm_R, self.events[row], torch.float64).to(dtype)
        U_RO, K_RI, bias_R = (factor[row].to(dtype) for factor in self.factors())
        dead_R = w_R == 0
        U_RO, K_RI = (factor.masked_fill(dead_R[:, None], 0) for factor in (U_RO, K_RI))
        return U_RO * w_R[:, None], K_RI, bias_R.masked_fill(dead_R, 0)


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("archive."): t for key, t in tensors.items() if key.startswith("archive.")}
