"""The event log of one plastic linear: low-rank factors, their weights, and what happens when it is full.

    ΔW_n = Σ_j w_j u_j k_jᵀ      w_j = (1 − decay)^(n − 1 − birth_j), 0 for an empty slot
    Δb_n = Σ_j w_j s_j u_j       s_j = the bias key of event j (0 for rules without bias)

Decay lives in the weights alone: nothing that was written is ever rewritten. Knows nothing of modules.
Shape suffixes: B rows, T tokens, R slots, O out, I in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OVERFLOW = ("grow", "error")


@dataclass(frozen=True)
class Events:
    """What one pass wants to write: one candidate event per token of every row."""

    U_BTO: Tensor
    K_BTI: Tensor
    bias_BT: Tensor | None
    write_BT: Tensor  # bool: which of them are written


class EventLog:
    """Factors of B rows, slot-major, in float32 for their whole life (float64 for a float64 model).

    Args:
        rank: slots allocated at the start.
        overflow: "grow" doubles the buffers when they are full; "error" refuses the write that does not fit.
        decay: share of ΔW lost at each event.
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
    ):
        self.name, self.rank, self.overflow, self.decay = name, rank, overflow, decay
        self.U_BRO = torch.zeros(rows, rank, out_features, dtype=dtype, device=device)
        self.K_BRI = torch.zeros(rows, rank, in_features, dtype=dtype, device=device)
        self.bias_BR = torch.zeros(rows, rank, dtype=dtype, device=device)
        self.birth_BR = torch.full((rows, rank), -1, dtype=torch.int64, device=device)  # -1: empty
        self.events = [0] * rows  # events so far, per row

    @property
    def dtype(self) -> torch.dtype:
        return self.U_BRO.dtype

    @property
    def capacity(self) -> int:
        return self.U_BRO.shape[1]

    @property
    def used(self) -> int:
        """Slots that hold anything, longest row."""
        return min(max(self.events), self.capacity)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [B, used, O], K [B, used, I], bias keys [B, used]: views."""
        n = self.used
        return self.U_BRO[:, :n], self.K_BRI[:, :n], self.bias_BR[:, :n]

    def weights(self, events_BT: Tensor) -> Tensor:
        """w [B, T, used] as seen after `events_BT` events of each row (int64)."""
        birth_B1R = self.birth_BR[:, None, : self.used]
        age_BTR = events_BT[..., None] - 1 - birth_B1R
        alive = (birth_B1R >= 0) & (age_BTR >= 0)
        if self.decay == 0:
            return alive.to(self.U_BRO.dtype)
        # float64: a power with thousands of events in the exponent
        weight = torch.pow(1.0 - self.decay, age_BTR.clamp(min=0).double())
        return (alive * weight).to(self.U_BRO.dtype)

    def now(self) -> Tensor:
        """Events so far as a tensor [B, 1], for `weights`."""
        return torch.tensor(self.events, device=self.U_BRO.device)[:, None]

    def check_room(self, counts: Sequence[int]) -> None:
        """Refuses, before anything has changed, what `append` could not take; counts [B] events to come."""
        need = max(n + c for n, c in zip(self.events, counts, strict=True))
        if self.overflow == "error" and need > self.rank:
            raise ValueError(
                f"{self.name}: {need} events do not fit its rank of {self.rank} ({max(self.events)} are written); "
                f'attach with a larger rank or overflow="grow"'
            )

    def append(self, new: Events) -> None:
        """Writes the events of one pass, in token order; rows may write different numbers of them."""
        counts = new.write_BT.sum(1).tolist()
        self.check_room(counts)
        self._reserve(max(n + c for n, c in zip(self.events, counts, strict=True)))
        row, token = new.write_BT.nonzero(as_tuple=True)
        before = torch.tensor(self.events, device=row.device)[row]
        slot = before + (new.write_BT.cumsum(1) - 1)[row, token]
        self.U_BRO[row, slot] = new.U_BTO[row, token].to(self.U_BRO.dtype)
        self.K_BRI[row, slot] = new.K_BTI[row, token].to(self.K_BRI.dtype)
        if new.bias_BT is not None:
            self.bias_BR[row, slot] = new.bias_BT[row, token].to(self.bias_BR.dtype)
        self.birth_BR[row, slot] = slot
        self.events = [n + c for n, c in zip(self.events, counts, strict=True)]

    def rewind(self, events: Sequence[int]) -> None:
        """Forgets the events after `events` [B]: the log as it was then."""
        keep = torch.tensor(list(events), device=self.birth_BR.device)[:, None]
        self.birth_BR[self.birth_BR >= keep] = -1
        self.events = list(events)

    def clone(self) -> EventLog:
        other = object.__new__(EventLog)
        other.__dict__.update(
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in self.__dict__.items()}
        )
        other.events = list(self.events)
        return other

    def delta_weight(self, row: int) -> Tensor:
        """ΔW of one row, dense [O, I]."""
        U_BRO, K_BRI, _ = self.factors()
        return (U_BRO[row] * self.weights(self.now())[row, 0, :, None]).T @ K_BRI[row]

    def delta_norm(self, row: int) -> float:
        """‖ΔW‖_F of one row, from the factors alone: ‖Σ u kᵀ‖² = Σ_ij (u_i·u_j)(k_i·k_j)."""
        U_BRO, K_BRI, _ = self.factors()
        U, K = (U_BRO[row] * self.weights(self.now())[row, 0, :, None]).double(), K_BRI[row].double()
        return float(((U @ U.T) * (K @ K.T)).sum().clamp(min=0).sqrt())

    def delta_bias(self, row: int) -> Tensor:
        """Δb of one row, [O]."""
        U_BRO, _, bias_BR = self.factors()
        return (self.weights(self.now())[row, 0] * bias_BR[row]) @ U_BRO[row]

    def _reserve(self, slots: int) -> None:
        if slots <= self.capacity:
            return
        extra = max(slots, 2 * self.capacity) - self.capacity
        for name, fill in (("U_BRO", 0), ("K_BRI", 0), ("bias_BR", 0), ("birth_BR", -1)):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_full((old.shape[0], extra, *old.shape[2:]), fill)], dim=1))
