"""The event log of one plastic linear: the live factors, where asked every event on the CPU as well, and any moment.

`EventLog.write` is the one door for events. A kernel that writes its event into a slot itself asks `next_slot` where,
calls `reserve` before it and `count_written` after it, or `refuse`.
Shape suffixes: B rows, T tokens, R slots, O out, I in, M moments.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .budget import Budget, Held, OneByOne
from .compress import effective_rank, spectrum
from .events import Events
from .factors import Factors
from .unseen import Unseen

if TYPE_CHECKING:
    from typing_extensions import Self


class EventLog(Factors):
    """The events of B rows at one plastic linear, as the factors that the model reads.

    Args:
        rank: slots allocated at the start.
        overflow: what happens when the slots of a row are full:
            "compress" keeps the best `rank` rank-1 terms of `rank` + max(8, `rank` / 2) slots and bounds what was
            lost (`certificate`); exact until they are full;
            "evict" forgets the oldest event: ΔW is exactly the sum over the last `rank` events;
            "grow" doubles the buffers;
            "error" refuses the write that does not fit.
        decay: share of ΔW lost at each event.
        dtype: of the factors, torch.float32 or torch.float64.
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
        size = (rows, out_features, in_features, rank)
        super().__init__(name, *size, overflow, decay, dtype, device, budget)
        self.archive: Factors | None = None
        if archive and overflow in ("compress", "evict"):
            self.archive = Factors(name, *size, "grow", decay, dtype, torch.device("cpu"), budget)
        self.initial: Events | None = None  # [1, events]: what every row begins with, see `begin`

    @property
    def began(self) -> int:
        """The number of events that every row began with."""
        return 0 if self.initial is None else self.initial.write_BT.shape[1]

    @property
    def every(self) -> Factors:
        """The factors that hold the most events: the archive where there is one, otherwise this log."""
        return self.archive or self

    @property
    def parts(self) -> list[Factors]:
        """This log, and its archive if it has one."""
        return [self] if self.archive is None else [self, self.archive]

    @property
    def bytes(self) -> int:
        """Memory of the buffers, the archive's included."""
        return super().bytes + (self.archive.bytes if self.archive else 0)

    def all_alive(self, tokens: int) -> bool:
        """Whether every used slot of every row weighs 1 for the next `tokens` tokens, whatever they write."""
        full = self.overflow == "evict" and (tokens > 1 or self.used == self.capacity)
        return self.decay == 0 and len(set(self.event_counts)) == 1 and not full and not any(self.scaled)

    # ---- writing

    def begin(self, events: Events) -> None:
        """Begins with the events of one row [1, events] in every row; so does every life after a `clear`.

        Only for a log without events. They are events as any other, but `undo` does not go below them.
        """
        self.initial = events
        self.write(events.repeated(len(self.event_counts)))

    def segments(self, write_BT: Tensor, rows_per_column: int = 1) -> list[tuple[int, int]]:
        """Token ranges to read and write one after the other, so that one pass equals token by token.

        The `rows_per_column` tokens of one column stay together: all of them read before any of them writes.
        """
        return self.slots.segments(self.event_counts, write_BT, rows_per_column)

    def fits(self, counts: Sequence[int]) -> bool:
        """True if so many more events [B] only fill empty slots; then `roll_back` can remove them."""
        return self.slots.fits(self.event_counts, counts)

    def keeps_all(self, counts: Sequence[int]) -> bool:
        """True if so many more events [B] change no event before them, but for its decay: none is folded or leaves."""
        pairs = [(n, c) for n, c in zip(self.event_counts, counts, strict=True) if c]
        inside = self.overflow != "evict" or all(n + c <= self.slots.window for n, c in pairs)
        return inside and (self.overflow == "error" or self.fits(counts))

    def check_room(self, counts: Sequence[int]) -> None:
        """Refuses, before anything has changed, what `write` could not take; counts [B] events to come."""
        if self.overflow != "error":
            return
        need = max(n + c for n, c in zip(self.event_counts, counts, strict=True))
        if need > self.rank:
            raise ValueError(
                f"{self.name}: {need} events do not fit its rank of {self.rank} ({max(self.event_counts)} are "
                f'written); attach with a larger rank or overflow="grow"'
            )

    def write(self, new: Events, unseen: Unseen | None = None) -> None:
        """Writes the events of one pass, in token order; rows may write different numbers of them.

        unseen: where the caller will look whether they are finite, once for all logs; the pass must be undone if they
            are not. None: it is looked at here, before anything is written. A budget and a fold need to know it here.

        Raises:
            ValueError: for events that do not fit ("error"), are not finite, or are over a budget that stops;
                nothing is written then. Also for a fold that does not fit the dtype; then the events before it are
                written, and a copy of the log must be put back.
            OneByOne: an event is over the budget, and later tokens of the pass must see its scaling; nothing is
                written then.
        """
        new = new.to(self.device)
        before, fits = list(self.event_counts), self.fits(new.counts)
        if unseen is not None and (self.budget is not None or (self.overflow == "compress" and not fits)):
            unseen.look()  # what was written before is named first
            unseen = None
        self.check_room(new.counts)
        if self.budget is not None:
            new = self._measured(new, self.budget)
        if unseen is None:
            self._check(new)
        else:  # a ring may lose events before anybody looks: then they are kept by themselves
            unseen.add(new.total(), partial(self._refuse_kept, before) if fits else partial(self._refuse, new, before))
        if self.archive is not None:
            self.archive.put(new.to(self.archive.device))
        self.put(new)

    def _measured(self, new: Events, budget: Budget) -> Events:
        """The same events, with ‖ΔW‖_F after each; refuses those that are over a budget that stops."""
        write_BT = new.write_BT.to(self.device)
        norm_BT = self.held().norms_after(replace(new, write_BT=write_BT))
        over_BT = write_BT & ~(norm_BT <= budget.limit)  # NaN is over as well
        if over_BT.any():
            if new.write_BT.shape[1] > 1:
                raise OneByOne
            self._check(new)
            row = int(over_BT.nonzero()[0, 0])
            norm = float(norm_BT[row, 0])
            if budget.over == "stop" or not math.isfinite(norm):
                raise ValueError(
                    f"event {self.event_counts[row] + 1} of {self.name} (row {row}) makes ‖ΔW‖ {norm:.6g}, over its "
                    f"budget of {budget.share:g} · ‖W‖ = {budget.limit:.6g}; nothing of this feed is written (a "
                    f'smaller rate, more decay or over_budget="scale" may help)'
                )
        return replace(new, norm_BT=norm_BT)

    def held(self) -> Held:
        """What the budget needs to know of the slots in use; only with a budget."""
        assert self.norm_BR is not None
        assert self.budget is not None
        used = slice(0, max(1, self.used))
        buffers = (self.U_BRO[:, used], self.K_BRI[:, used], self.birth_BR[:, used], self.norm_BR[:, used])
        return Held(*buffers, self.event_counts, self.slots, self.decay, self.budget.limit, self.weigh)

    def _check(self, new: Events) -> None:
        """Refuses, before anything has changed, events that are not finite."""
        if not math.isfinite(float(new.total())):  # one look for all of them; a sum may overflow by itself
            self._refuse(new, self.event_counts)

    def _refuse(self, new: Events, before: Sequence[int]) -> None:
        """Refuses the first of these events that is not finite, if there is one; `before` [B] events came before."""
        bad_BT = new.write_BT & ~new.finite_BT().cpu()
        if bad_BT.any():
            row, token = bad_BT.nonzero()[0].tolist()
            self.refuse(row, before[row] + int(new.write_BT[row, : token + 1].sum()))

    def _refuse_kept(self, before: Sequence[int]) -> None:
        """The same of the events after the first `before` [B], which are all in their slots."""
        U_BRO, K_BRI, bias_BR = self.factors()
        finite_BR = U_BRO.isfinite().all(-1) & K_BRI.isfinite().all(-1) & bias_BR.isfinite()
        birth_BR = self.birth_BR[:, : self.used].masked_fill(finite_BR, -1).cpu()
        for row, (events, first) in enumerate(zip(birth_BR, before, strict=True)):
            bad = events[events >= first]
            if len(bad):
                self.refuse(row, int(bad.min()) + 1)

    def refuse(self, row: int, event: int) -> NoReturn:
        """Refuses an event that is not finite, by its number from 1."""
        raise ValueError(
            f"event {event} of {self.name} (row {row}) has a non-finite factor, expected finite ones; nothing of "
            f"this feed is written (a smaller rate, a clip or mu > 0 may help)"
        )

    # ---- for kernels that write their event into a slot themselves

    def reserve(self, counts: Sequence[int]) -> None:
        """Makes room for `counts` [B] more events; buffers may move."""
        if self.overflow == "grow" and max(self.event_counts) + max(counts) > self.capacity:
            self.make_room(max(n + c for n, c in zip(self.event_counts, counts, strict=True)))

    def next_slot(self) -> int | None:
        """The slot that a kernel may write directly. None if rows use different slots, or an archive, budget or fold
        needs Python."""
        rows = len(self.event_counts)
        alike = self.archive is None and self.budget is None and self.event_counts.count(self.event_counts[0]) == rows
        return self.slots.next(self.event_counts[0]) if alike and self.fits([1] * rows) else None

    def count_written(self, counts: Sequence[int]) -> None:
        """Counts the finite events, at most one per row, that a kernel has put into the next slot; folds full rows.

        Only for logs without a budget.
        """
        before, counts = self.event_counts, [int(count) for count in counts]
        if self.archive is not None:
            each, slot = torch.arange(len(before), device="cpu"), self.slots.slot(torch.tensor(before, device="cpu"))
            U, K, bias = (buffer[each, slot][:, None].cpu() for buffer in (self.U_BRO, self.K_BRI, self.bias_BR))
            self.archive.put(Events(U, K, bias, torch.tensor(counts, device="cpu")[:, None] > 0))
        self.event_counts = [n + c for n, c in zip(before, counts, strict=True)]
        self.fold_full_rows(before)

    # ---- other moments

    def oldest_exact_moment(self, row: int) -> int:
        """The smallest event count n whose ΔW_n can be formed exactly from what is kept: see `Slots.oldest_moment`.

        Under "compress" that is ΔW_n as the log held it then. With an archive it is 0, and moments have no folding
        error.
        """
        return 0 if self.archive is not None else self.slots.oldest_moment(self.event_counts[row])

    def oldest_event(self, row: int) -> int:
        """The oldest event (from 0) whose own u and k are kept; older ones cannot be looked at or left out."""
        return 0 if self.archive is not None else self.slots.oldest_event(self.event_counts[row])

    def moment_factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U [B, slots, O], K [B, slots, I], bias keys and birth [B, slots]: what `weights_at` weighs; views.

        Of the archive (on the CPU) where there is one, of the log itself otherwise.
        """
        return *self.every.factors(), self.every.birth_BR[:, : self.every.used]

    def weights_at(self, moments: Sequence[int], row: int = 0) -> Tensor:
        """w [M, slots] that give one row's ΔW after each of `moments` events from `moment_factors`.

        Raises:
            ValueError: a moment that is no longer exact, or that has not come yet.
        """
        moments = [int(moment) for moment in moments]
        oldest, newest = self.oldest_exact_moment(row), self.event_counts[row]
        for moment in moments:
            if not oldest <= moment <= newest:
                raise ValueError(
                    f"{self.name}: ΔW of row {row} after event {moment} is not kept, expected a moment from "
                    f"{oldest} (the oldest that is exact) to {newest}"
                )
        every = self.every
        birth_R = every.birth_BR[row, : every.used]
        norm_R = None if every.norm_BR is None else every.norm_BR[row, : every.used]
        return self.weigh(birth_R, norm_R, torch.tensor(moments, device=birth_R.device)[:, None], self.dtype)

    def rewind(self, counts: Sequence[int]) -> None:
        """Removes the events after `counts` [B]: the log as if they had never been written.

        Raises:
            ValueError: it would remove events that are folded or evicted and in no archive; nothing changes then.
        """
        counts = [int(n) for n in counts]
        now = self.event_counts
        if len(counts) != len(now) or any(not 0 <= count <= n for count, n in zip(counts, now, strict=True)):
            raise ValueError(f"{self.name}: rewind({counts}), expected {len(now)} counts up to {now}")
        lost = [row for row, n in enumerate(counts) if n < self.slots.oldest_moment(now[row])]
        if lost and self.archive is None:
            row = lost[0]
            raise ValueError(
                f"{self.name}: row {row} cannot go back to event {counts[row]}, its oldest exact moment is "
                f'{self.oldest_exact_moment(row)} of {now[row]} (overflow="{self.overflow}" without an archive)'
            )
        self.roll_back(counts)
        if self.archive is not None and lost:
            self._replay(self.archive, lost)

    def _replay(self, every: Factors, rows: list[int]) -> None:
        """Puts the archived events of some rows in again, from the first: the same folds, the same bits."""
        self.clear_rows(rows)
        live_BR = every.birth_BR >= 0
        chosen_BR = torch.zeros_like(live_BR)
        chosen_BR[rows] = live_BR[rows]
        past = Events(every.U_BRO, every.K_BRI, every.bias_BR, chosen_BR, norm_BT=every.norm_BR)
        for start in range(0, every.used, self.capacity):  # by parts: the archive may be larger than the device
            self.put(past.part(start, start + self.capacity).to(self.device))

    # ---- removing and copying: the same of the archive

    def roll_back(self, counts: Sequence[int]) -> None:
        super().roll_back(counts)
        if self.archive is not None:
            self.archive.roll_back(counts)

    def clear(self) -> None:
        super().clear()
        if self.archive is not None:
            self.archive.clear()
        if self.initial is not None:
            self.begin(self.initial)

    def rows(self, chosen: Sequence[int]) -> Self:
        other = super().rows(chosen)
        other.archive = None if self.archive is None else self.archive.rows(chosen)
        return other

    def copy_from(self, other: Factors) -> None:
        super().copy_from(other)
        if self.archive is not None and isinstance(other, EventLog) and other.archive is not None:
            self.archive.copy_from(other.archive)
        self.initial = other.initial if isinstance(other, EventLog) else None

    # ---- saving

    def form(self) -> dict[str, Any]:
        return {**super().form(), "archive": self.archive is not None}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state_dict()
        del meta["archive"]
        if self.initial is not None:
            meta["initial"] = _digest(self.initial)
        if self.archive is not None:
            saved, meta["archive"] = self.archive.state_dict()
            tensors |= {f"archive.{key}": t for key, t in saved.items()}
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().load_state_dict(tensors, meta)
        if self.archive is not None:
            self.archive.load_state_dict(_of_archive(tensors), meta["archive"])

    def check_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().check_state(tensors, {**meta, "archive": "archive" in meta})
        if meta.get("initial") != (here := _digest(self.initial)):
            raise ValueError(
                f"{self.name}: the saved log began with adapter {meta.get('initial')}, but a new one begins with "
                f"{here} (import_peft)"
            )
        if self.archive is not None:
            self.archive.check_state(_of_archive(tensors), meta["archive"])

    # ---- looking

    def delta_norm(self, row: int) -> float:
        """‖ΔW‖_F of one row, from the factors alone."""
        return float(self.spectrum(row).norm())

    def effective_rank(self, row: int) -> float:
        """exp of the entropy of the normalised singular values of ΔW of one row; 0 where ΔW is zero."""
        return effective_rank(self.spectrum(row))

    def spectrum(self, row: int) -> Tensor:
        """The singular values of ΔW of one row, descending, float64; as many as it has slots, at most."""
        U_RO, K_RI, _ = self.weighted(row, torch.float64)
        return spectrum(U_RO, K_RI)

    def event_norms(self, row: int) -> Tensor:
        """‖u‖‖k‖ of every event of one row as it was written, [events] float64; NaN before `oldest_event`."""
        U_RO, K_RI, _, birth_R = (factor[row] for factor in self.moment_factors())
        own_R = birth_R >= self.oldest_event(row)  # the result of a fold is born before that
        norm = torch.full((self.event_counts[row],), float("nan"), dtype=torch.float64, device="cpu")
        norm[birth_R[own_R].cpu()] = (U_RO[own_R].double().norm(dim=1) * K_RI[own_R].double().norm(dim=1)).cpu()
        return norm


def _digest(initial: Events | None) -> str | None:
    """Tells what logs begin with apart; None: with nothing."""
    if initial is None:
        return None
    digest = hashlib.sha256()
    for factor in (initial.U_BTO, initial.K_BTI, initial.bias_BT):
        digest.update(b"" if factor is None else factor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _of_archive(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("archive."): t for key, t in tensors.items() if key.startswith("archive.")}
