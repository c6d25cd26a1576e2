"""Low-rank factors of one plastic linear, for B rows: events are put into slots, folded, removed again, and copied.

    ΔW_n = Σ_j w_j u_j k_jᵀ      w_j = (1 − decay)^(n − 1 − birth_j), 0 for an empty slot
    Δb_n = Σ_j w_j s_j u_j       s_j = the bias key of event j (0 for rules without bias)

Decay, and the scalings of a budget (one more factor of w_j), change the weights w alone. Only a fold rewrites a slot.
`slots` says where an event lies, `compress` how slots are folded, `budget` how ΔW is kept from growing.
Shape suffixes: B rows, T tokens, R slots, O out, I in, M moments.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .budget import Budget, norms
from .compress import fold_
from .events import Events
from .slots import OVERFLOW, Slots

if TYPE_CHECKING:
    from typing_extensions import Self

BUFFERS = {"U": "U_BRO", "K": "K_BRI", "bias": "bias_BR", "birth": "birth_BR", "norm": "norm_BR"}
COUNTS = ("event_counts", "errors", "scaled")  # one entry per row


class Factors:
    """U, K, bias keys and birth of every slot of B rows; float32 for their whole life (float64 for a float64 model).

    event_counts: events so far, per row. errors: (error_2, error_F) per row, as of its last fold. scaled: how many
    events the budget scaled, per row. birth_BR: the event in each slot, numbered from 0; -1: the slot is empty.
    norm_BR: ‖ΔW‖_F after the event of each slot, before the budget scaled it; None without a budget.

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
        budget: Budget | None = None,
    ):
        if overflow not in OVERFLOW:
            raise ValueError(f"{name}: overflow={overflow!r}, expected one of {', '.join(map(repr, OVERFLOW))}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: factors in {dtype} would stop moving, expected torch.float32 or torch.float64")
        self.name, self.rank, self.overflow, self.decay, self.budget = name, rank, overflow, decay, budget
        self.slots = Slots.of(overflow, rank, out_features, in_features)
        slots = self.slots.capacity
        self.U_BRO = torch.zeros(rows, slots, out_features, dtype=dtype, device=device)
        self.K_BRI = torch.zeros(rows, slots, in_features, dtype=dtype, device=device)
        self.bias_BR = torch.zeros(rows, slots, dtype=dtype, device=device)
        self.birth_BR = torch.full((rows, slots), -1, dtype=torch.int64, device=device)
        self.norm_BR = None if budget is None else torch.zeros(rows, slots, dtype=torch.float64, device=device)
        self.event_counts, self.errors, self.scaled = [0] * rows, [(0.0, 0.0)] * rows, [0] * rows

    @property
    def dtype(self) -> torch.dtype:
        return self.U_BRO.dtype

    @property
    def device(self) -> torch.device:
        return self.U_BRO.device

    @property
    def capacity(self) -> int:
        return self.U_BRO.shape[1]

    @property
    def used(self) -> int:
        """Slots that hold anything, in the row with the most."""
        return max(self.slots.filled(n) for n in self.event_counts)

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers().values())

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [B, used, O], K [B, used, I], bias keys [B, used]: views."""
        n = self.used
        return self.U_BRO[:, :n], self.K_BRI[:, :n], self.bias_BR[:, :n]

    def now(self) -> Tensor:
        """Events so far as a tensor [B, 1], for `slot_weights`."""
        return torch.tensor(self.event_counts, device="cpu").to(self.device, non_blocking=True)[:, None]

    def slot_weights(self, events_BT: Tensor, slots: int | None = None) -> Tensor:
        """w [B, T, `slots` or used] as seen after `events_BT` events of each row (int64), the last fold or later."""
        slots = slots or self.used
        norm = None if self.norm_BR is None else self.norm_BR[:, None, :slots]
        events_BT1 = events_BT.to(self.device, non_blocking=True)[..., None]
        return self.weigh(self.birth_BR[:, None, :slots], norm, events_BT1, self.dtype)

    def weigh(
        self, birth: Tensor, norm: Tensor | None, events: Tensor | int, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """w of slots born at event `birth` and of norm `norm`, both [..., R], after `events` events; broadcasts."""
        age = events - 1 - birth
        alive = (birth >= 0) & (age >= 0)
        if self.overflow == "evict":
            alive &= age < self.rank
        # float64: a power with thousands of events in the exponent
        w = alive if self.decay == 0 else alive * torch.pow(1.0 - self.decay, age.clamp(min=0).double())
        if self.budget is not None and norm is not None and any(self.scaled):
            w = w * self.budget.left(birth, norm, events)
        return w.to(dtype)

    # ---- looking

    def delta_weight(self, row: int, dtype: torch.dtype | None = None) -> Tensor:
        """ΔW of one row, dense [O, I], computed in `dtype` (the log's own unless given)."""
        U_RO, K_RI, _ = self.weighted(row, dtype or self.dtype)
        return U_RO.T @ K_RI

    def delta_bias(self, row: int, dtype: torch.dtype | None = None) -> Tensor:
        """Δb of one row, [O], computed in `dtype` (the log's own unless given)."""
        U_RO, _, bias_R = self.weighted(row, dtype or self.dtype)
        return bias_R @ U_RO

    def weighted(self, row: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """w ⊙ U, K and bias keys of one row as it is now; slots of weight 0, which may hold anything, become 0."""
        n = self.used
        norm_R = None if self.norm_BR is None else self.norm_BR[row, :n]
        w_R = self.weigh(self.birth_BR[row, :n], norm_R, self.event_counts[row]).to(dtype)
        U_RO, K_RI, bias_R = (factor[row].to(dtype) for factor in self.factors())
        dead_R = w_R == 0
        U_RO, K_RI = (factor.masked_fill(dead_R[:, None], 0) for factor in (U_RO, K_RI))
        return U_RO * w_R[:, None], K_RI, bias_R.masked_fill(dead_R, 0)

    # ---- writing

    def put(self, new: Events) -> None:
        """Puts finite events of this device into their slots, and folds each row whenever it is full.

        Raises:
            ValueError: a fold does not fit the dtype; the events before it are written then.
        """
        if self.budget is not None and new.norm_BT is not None:
            more = self.budget.scaled(new.norm_BT, new.write_BT.to(new.norm_BT.device))
            self.scaled = [n + m for n, m in zip(self.scaled, more, strict=True)]
        tokens = new.write_BT.shape[1]
        alike = new.all_written and len(set(self.event_counts)) == 1
        whole = alike and self.slots.side_by_side(self.event_counts[0], tokens)
        for start, end in [(0, tokens)] if whole else self.slots.segments(self.event_counts, new.write_BT):
            before, part = self.event_counts, new.part(start, end)
            if alike and self.slots.side_by_side(before[0], end - start):
                self._put_side_by_side(part)
            else:
                self._put_segment(part)
            self.fold_full_rows(before)

    def _put_side_by_side(self, new: Events) -> None:
        """Every token of every row, into slots that lie side by side: what a decode step does."""
        n, tokens = self.event_counts[0], new.write_BT.shape[1]
        if self.overflow == "grow":
            self.make_room(n + tokens, n + tokens)
        first = self.slots.next(n)
        slots = slice(first, first + tokens)
        self.U_BRO[:, slots], self.K_BRI[:, slots] = new.U_BTO, new.K_BTI
        if new.bias_BT is not None:
            self.bias_BR[:, slots] = new.bias_BT
        if self.norm_BR is not None and new.norm_BT is not None:
            self.norm_BR[:, slots] = new.norm_BT
        self.birth_BR[:, slots] = torch.arange(n, n + tokens, device=self.device)
        self.event_counts = [n + tokens] * len(self.event_counts)

    def _put_segment(self, new: Events) -> None:
        """The events of one segment (`Slots.segments`); rows may write different numbers of them."""
        row, token = new.write_BT.nonzero(as_tuple=True)
        event = torch.tensor(self.event_counts, device="cpu")[row] + (new.write_BT.cumsum(1) - 1)[row, token]
        places = torch.stack([row, token, self.slots.slot(event), event])  # worked out on the CPU
        row, token, slot, event = places.to(self.device, non_blocking=True)
        self.event_counts = [n + c for n, c in zip(self.event_counts, new.counts, strict=True)]
        if self.overflow == "grow":
            self.make_room(max(self.event_counts))
        self.U_BRO[row, slot] = new.U_BTO[row, token].to(self.dtype)
        self.K_BRI[row, slot] = new.K_BTI[row, token].to(self.dtype)
        if new.bias_BT is not None:
            self.bias_BR[row, slot] = new.bias_BT[row, token].to(self.dtype)
        if self.norm_BR is not None and new.norm_BT is not None:
            self.norm_BR[row, slot] = new.norm_BT[row, token]
        self.birth_BR[row, slot] = event

    def fold_full_rows(self, before: Sequence[int]) -> None:
        """Folds the rows that were filled since they had `before` events."""
        if self.overflow != "compress":
            return
        for row, (n, was) in enumerate(zip(self.event_counts, before, strict=True)):
            if n != was and self.slots.last_fold(n) == n:
                self._fold(row)

    def _fold(self, row: int) -> None:
        """Replaces a full row by its best rank-k approximation.

        New error = old error × what decay and scalings since the last fold leave of it + what this fold loses.
        """
        n, kept = self.event_counts[row], self.slots.kept
        norm_R = None if self.norm_BR is None else self.norm_BR[row]
        w_R = self.weigh(self.birth_BR[row], norm_R, n)
        try:
            error_2, error_F = fold_(self.U_BRO[row], self.K_BRI[row], self.bias_BR[row], w_R, kept)
        except ValueError as error:
            raise ValueError(f"event {n} of {self.name} (row {row}) fills its log, and {error}") from None
        left = self._left_of_fold(row, self.slots.last_fold(n - 1))
        self.errors[row] = (left * self.errors[row][0] + error_2, left * self.errors[row][1] + error_F)
        self.birth_BR[row] = -1
        self.birth_BR[row, :kept] = n - 1  # weight 1 now; later decay applies to the sum as a whole
        if norm_R is not None and self.budget is not None:
            w_11R = w_R.new_ones(1, 1, kept)
            norm = norms(self.U_BRO[row, None, :kept], self.K_BRI[row, None, :kept], w_11R)[0, 0]
            norm_R[:kept] = norm.clamp(max=self.budget.limit)  # a fold rounds, it is not scaled

    def certificate(self, row: int) -> tuple[float, float]:
        """(error_2, error_F) of one row: ‖[ΔW | Δb]_exact − [ΔW | Δb]‖₂ ≤ error_2, and ‖·‖_F ≤ error_F.

        Exact is the sum over the events as they were given, in the log's dtype ("evict": over those of the window,
        so 0); what is bounded is the sum over the factors as they are stored, in exact arithmetic.
        """
        left = self._left_of_fold(row, self.slots.last_fold(self.event_counts[row]))
        return left * self.errors[row][0], left * self.errors[row][1]

    def _left_of_fold(self, row: int, fold: int) -> float:
        """The share that decay and scalings have left of a row's fold at event count `fold`; slot 0 is part of it."""
        n = self.event_counts[row]
        left = (1.0 - self.decay) ** (n - fold)
        if self.budget is None or self.norm_BR is None or not self.scaled[row]:
            return left
        return left * float(self.budget.left(self.birth_BR[row], self.norm_BR[row], n)[0])

    def make_room(self, slots: int, written: int = 0) -> None:
        """Grows the buffers to `slots` or more; the caller fills U and K of new slots below `written`."""
        if slots <= self.capacity:
            return
        n, slots = self.capacity, max(slots, 2 * self.capacity)
        grown = {}
        for name, old in self._buffers().items():
            larger = old.new_empty(old.shape[0], slots, *old.shape[2:])
            empty = max(n, written) if name in ("U", "K") else n
            larger[:, :n], larger[:, empty:] = old, -1 if name == "birth" else 0
            grown[BUFFERS[name]] = larger
        self.__dict__.update(grown)  # at once: an interrupt must not leave buffers of two sizes

    # ---- removing and copying

    def roll_back(self, counts: Sequence[int]) -> None:
        """Removes the newest events of each row, down to `counts` [B].

        Only valid if `Slots.fits` was true before they were written: `EventLog.rewind` checks that, this does not.
        """
        counts = [int(n) for n in counts]
        gone_BR = self.birth_BR >= torch.tensor(counts, device=self.device)[:, None]
        if self.budget is not None and self.norm_BR is not None:
            fewer = self.budget.scaled(self.norm_BR, gone_BR)
            self.scaled = [n - f for n, f in zip(self.scaled, fewer, strict=True)]
        self.birth_BR.masked_fill_(gone_BR, -1)
        self.event_counts = counts

    def clear(self) -> None:
        """Removes every event; the buffers stay."""
        self.clear_rows(range(len(self.event_counts)))

    def clear_rows(self, rows: Sequence[int]) -> None:
        self.birth_BR[list(rows)] = -1
        for row in rows:
            self.event_counts[row], self.errors[row], self.scaled[row] = 0, (0.0, 0.0), 0

    def rows(self, chosen: Sequence[int]) -> Self:
        """A copy whose row n is row `chosen[n]` of this one."""
        other, chosen = copy.copy(self), [int(row) for row in chosen]
        for name, buffer in self._buffers().items():
            setattr(other, BUFFERS[name], buffer[chosen])
        for name in COUNTS:
            setattr(other, name, [getattr(self, name)[row] for row in chosen])
        return other

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return self.rows(range(len(self.event_counts)))

    def copy_from(self, other: Factors) -> None:
        """Takes over all that factors of the same form hold, on any device; buffers that are large enough stay."""
        self.make_room(other.capacity)
        self._take(other._buffers())
        for name in COUNTS:
            setattr(self, name, list(getattr(other, name)))

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        slots = tensors["birth"].shape[1]
        self.birth_BR[:, slots:] = -1
        for name, buffer in self._buffers().items():
            buffer[:, :slots] = tensors[name]

    # ---- saving

    def form(self) -> dict[str, Any]:
        """What other factors must have in common with these for `copy_from` and `load_state_dict`."""
        size = {"rows": len(self.event_counts), "out_features": self.U_BRO.shape[2], "in_features": self.K_BRI.shape[2]}
        policy = {"rank": self.rank, "overflow": self.overflow, "decay": self.decay, "dtype": str(self.dtype)[6:]}
        return {"name": self.name, **size, **policy, "budget": None if self.budget is None else asdict(self.budget)}

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that moves: tensors (copies of the used slots), and values that JSON holds exactly."""
        n = self.used
        tensors = {key: buffer[:, :n].clone() for key, buffer in self._buffers().items()}
        meta = {**self.form(), "events": list(self.event_counts), "errors": [list(pair) for pair in self.errors]}
        if self.budget is not None:
            meta["scaled"] = list(self.scaled)
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over, bit for bit, what `state_dict` gave; the tensors may lie on any device.

        Raises:
            ValueError: it is of another linear, shape, policy or dtype, or incomplete; nothing changes then.
        """
        self.check_state(tensors, meta)
        if self.overflow == "grow":
            self.make_room(tensors["U"].shape[1])
        self._take(tensors)
        self.event_counts = [int(n) for n in meta["events"]]
        self.errors = [(float(error_2), float(error_F)) for error_2, error_F in meta["errors"]]
        self.scaled = [int(n) for n in meta.get("scaled", [0] * len(self.event_counts))]

    def check_form(self, form: Mapping[str, Any], whose: str) -> None:
        """Refuses a log, by its `form`, that `copy_from` could not take over; `whose` names it."""
        for key, wanted in self.form().items():
            if form.get(key) != wanted:
                raise ValueError(f"{self.name}: the {whose} log has {key} {form.get(key)!r}, expected {wanted!r}")

    def check_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Refuses what `load_state_dict` could not take over."""
        self.check_form(meta, "saved")
        slots = max(self.slots.filled(int(n)) for n in meta["events"])
        for key, buffer in self._buffers().items():
            wanted = ([len(meta["events"]), slots, *buffer.shape[2:]], buffer.dtype)
            found = (list(tensors[key].shape), tensors[key].dtype) if key in tensors else "missing"
            if found != wanted:
                raise ValueError(f"{self.name}: the saved {key} is {found}, expected {wanted}")

    def _buffers(self) -> dict[str, Tensor]:
        every = {name: getattr(self, attribute) for name, attribute in BUFFERS.items()}
        return {name: buffer for name, buffer in every.items() if buffer is not None}
