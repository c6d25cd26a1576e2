"""A budget on what the events of one linear may add up to: ‖ΔW‖_F ≤ share · ‖W‖_F, after every event and in every row.

    ΔW′ = (1 − decay) ΔW + u kᵀ      f = min(1, limit / ‖ΔW′‖_F)      ΔW ← f ΔW′, Δb ← f Δb′

Nothing that was written is rewritten. Each slot keeps ‖ΔW′‖_F of its event, so f is known. An event weighs the product
of its own f and all later ones. The norm comes from the factors:

    ‖D + u kᵀ‖² = ‖D‖² + 2 Σ_j w_j (u_j·u) (k_j·k) + ‖u‖² ‖k‖²

Products of factors are in the factors' dtype, everything else is in float64.
Shape suffixes: B rows, T tokens, R and S slots, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .events import Events
from .slots import Slots

OVER_BUDGET = ("scale", "stop")


class OneByOne(Exception):
    """An event of a pass over several tokens is over a budget: the pass must be undone and repeated token by token."""


@dataclass(frozen=True)
class Budget:
    """The budget of one linear.

    Args:
        share: largest ‖ΔW‖_F as a share of ‖W‖_F.
        over: what an event that goes over it does, "scale" or "stop".
        limit: share · ‖W‖_F.
    """

    share: float
    over: str
    limit: float

    def left(self, birth: Tensor, norm: Tensor, events: Tensor | int) -> Tensor:
        """The share of each slot that the scalings up to event number `events` leave; birth and norm [..., R]."""
        log = torch.where(birth >= 0, self.limit / norm.clamp(min=self.limit), 1).log()
        order = birth.argsort(dim=-1)
        ordered = log.gather(-1, order)
        before = torch.empty_like(log).scatter_(-1, order, ordered.cumsum(-1) - ordered)
        until = torch.where(birth < events, log, 0).sum(-1, keepdim=True)
        return (until - before).clamp(max=0).exp()  # above 0 where a slot is not born yet

    def scaled(self, norm: Tensor, written: Tensor) -> list[int]:
        """How many of the written events were scaled, per row; norm and written [B, ...]."""
        return (written & (norm > self.limit)).sum(1).tolist()


@dataclass(frozen=True)
class Held:
    """What a log holds, as far as the norms of its next events depend on it; at least one slot, which may be empty."""

    U_BRO: Tensor
    K_BRI: Tensor
    birth_BR: Tensor
    norm_BR: Tensor  # ‖ΔW′‖_F of each slot's event
    counts: list[int]  # events so far, per row
    slots: Slots
    decay: float
    limit: float
    weigh: Callable[[Tensor, Tensor, Tensor], Tensor]  # (birth, norm, events) → w of slots, float64

    def norm_now(self) -> Tensor:
        """‖ΔW‖_F of every row, [B] float64."""
        last_BR = (self.birth_BR >= 0) & (self.birth_BR == self._counts_B1() - 1)
        return torch.where(last_BR, self.norm_BR.clamp(max=self.limit), 0).amax(1)

    def norms_after(self, new: Events) -> Tensor:
        """‖ΔW‖_F after each event of one pass if none of them is scaled, [B, T] float64; any number if not written."""
        after_BT = self._counts_B1() + new.write_BT.cumsum(1)
        new_BT = torch.where(new.write_BT, after_BT - 1, -1)
        birth_BS = torch.cat([self.birth_BR, new_BT], 1)
        norm_BS = torch.cat([self.norm_BR, self.norm_BR.new_zeros(new_BT.shape)], 1)
        w_BTS = self.weigh(birth_BS[:, None], norm_BS[:, None], after_BT[..., None])
        ring = self.slots.overflow == "evict"
        # a ring is summed up anew once per round, so that no rounding error adds up
        if ring and (new.write_BT.shape[1] > 1 or max(self.counts) % self.slots.capacity == 0):
            dead_BS1 = (birth_BS < 0)[..., None]
            U_BSO, K_BSI = torch.cat([self.U_BRO, new.U_BTO], 1), torch.cat([self.K_BRI, new.K_BTI], 1)
            return norms(U_BSO.masked_fill(dead_BS1, 0), K_BSI.masked_fill(dead_BS1, 0), w_BTS)
        square_B = self.norm_now().square()
        if ring and max(self.counts) >= self.slots.window:
            square_B = square_B - self._leaving()
        own_BTT = inner(new.U_BTO, new.K_BTI, new.U_BTO, new.K_BTI)
        dot_BTS = torch.cat([inner(new.U_BTO, new.K_BTI, self.U_BRO, self.K_BRI), own_BTT], 2)
        w_BTS = w_BTS.masked_fill(birth_BS[:, None] == new_BT[..., None], 0)  # what an event finds, faded by it
        found_BT = (w_BTS * dot_BTS.masked_fill(w_BTS == 0, 0)).sum(-1)
        more_BT = 2 * found_BT + own_BTT.diagonal(dim1=1, dim2=2)
        return grown(square_B, more_BT, new.write_BT, (1 - self.decay) ** 2)

    def _leaving(self) -> Tensor:
        """What ‖ΔW‖² loses as the oldest event y leaves a full ring, [B]: ‖D‖² − ‖D − y‖² = ⟨D + (D − y), y⟩."""
        counts_B1 = self._counts_B1()
        w_BR = self.weigh(self.birth_BR, self.norm_BR, counts_B1)
        leaves_BR = (self.birth_BR >= 0) & (self.birth_BR == counts_B1 - self.slots.window)
        slot_B11 = leaves_BR.int().argmax(1)[:, None, None]
        y_U, y_K = self.U_BRO.take_along_dim(slot_B11, 1), self.K_BRI.take_along_dim(slot_B11, 1)
        dot_BR = inner(y_U, y_K, self.U_BRO, self.K_BRI)[:, 0]
        w_y_B1 = w_BR.masked_fill(~leaves_BR, 0).sum(1, keepdim=True)
        both_BR = w_BR + w_BR.masked_fill(leaves_BR, 0)
        return (w_y_B1 * both_BR * dot_BR.masked_fill(w_BR == 0, 0)).sum(1)

    def _counts_B1(self) -> Tensor:
        return torch.tensor(self.counts, device=self.birth_BR.device)[:, None]


def inner(U_BTO: Tensor, K_BTI: Tensor, V_BSO: Tensor, L_BSI: Tensor) -> Tensor:
    """⟨u_t k_tᵀ, v_s l_sᵀ⟩ = (u_t·v_s) (k_t·l_s), [B, T, S] float64; the two products in the factors' own dtype."""
    return (U_BTO @ V_BSO.mT).double() * (K_BTI @ L_BSI.mT)


def norms(U_BSO: Tensor, K_BSI: Tensor, w_BTS: Tensor) -> Tensor:
    """‖Σ_s w_s u_s k_sᵀ‖_F for each weight row, [B, T]."""
    return ((w_BTS @ inner(U_BSO, K_BSI, U_BSO, K_BSI)) * w_BTS).sum(-1).clamp(min=0).sqrt()


def grown(square_B: Tensor, more_BT: Tensor, write_BT: Tensor, keep: float) -> Tensor:
    """The norms after each event, [B, T]: ‖·‖² ← keep ‖·‖² + more where one is written; `square_B` before the first."""
    norm_BT: list[list[float]] = []
    for square, row in zip(square_B.tolist(), zip(more_BT.tolist(), write_BT.tolist(), strict=True), strict=True):
        norm_BT.append([])
        for more, write in zip(*row, strict=True):
            square = keep * square + more if write else square
            norm_BT[-1].append(math.sqrt(max(square, 0.0)))  # NaN stays NaN in this order
    return torch.tensor(norm_BT, dtype=torch.float64, device=more_BT.device)
