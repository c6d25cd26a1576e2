"""A budget on what the events of one linear may add up to: ‖ΔW‖_F ≤ share · ‖W‖_F, after every event and in every row.

    ΔW′ = (1 − decay) ΔW + u kᵀ      f = min(1, limit / ‖ΔW′‖_F)      ΔW ← f ΔW′, Δb ← f Δb′

Nothing that was written is rewritten: a slot keeps ‖ΔW′‖_F of its event, so f is known, and an event weighs the
product of its own f and all later ones. The norm comes from the factors:

    ‖D + u kᵀ‖² = ‖D‖² + 2 Σ_j w_j (u_j·u) (k_j·k) + ‖u‖² ‖k‖²

Products of factors are in the factors' dtype, everything else is in float64.
Shape suffixes: B rows, T tokens, R and S slots, O out, I in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OVER_BUDGET = ("scale", "stop")


class OneByOne(Exception):
    """An event inside a pass of several tokens is over a budget: the pass must be taken back and go token by token."""


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
        """What the scalings up to `events` leave of each slot; birth and norm [..., R], broadcasts with `events`."""
        log = torch.where(birth >= 0, self.limit / norm.clamp(min=self.limit), 1).log()
        order = birth.argsort(dim=-1)
        ordered = log.gather(-1, order)
        before = torch.empty_like(log).scatter_(-1, order, ordered.cumsum(-1) - ordered)
        until = torch.where(birth < events, log, 0).sum(-1, keepdim=True)
        return (until - before).clamp(max=0).exp()  # above 0 where a slot is not born yet


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
