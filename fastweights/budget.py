"""A budget on what the events of one linear may add up to: ‖ΔW‖_F ≤ share · ‖W‖_F, after every event and in every row.

    ΔW′ = (1 − decay) ΔW + u kᵀ      f = min(1, limit / ‖ΔW′‖_F)      ΔW ← f ΔW′, Δb ← f Δb′

Nothing that was written is rewritten: a slot keeps ‖ΔW′‖_F of its event, so f is known, and an event weighs the
product of its own f and all later ones. The norm comes from the factors:

    ‖D + x‖² = ‖D‖² + 2 ⟨D, x⟩ + ‖x‖²       ⟨Σ_j w_j u_j k_jᵀ, u kᵀ⟩ = Σ_j w_j (u_j·u) (k_j·k)

Everything here is float64. Shape suffixes: B rows, T tokens, R slots, O out, I in.
"""

from __future__ import annotations

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


def norms(U_BRO: Tensor, K_BRI: Tensor, w_BTR: Tensor) -> Tensor:
    """‖Σ_j w_j u_j k_jᵀ‖_F for each weight row, [B, T]: ‖·‖² = Σ_ij w_i w_j (u_i·u_j) (k_i·k_j)."""
    gram_BRR = (U_BRO @ U_BRO.mT) * (K_BRI @ K_BRI.mT)
    return ((w_BTR @ gram_BRR) * w_BTR).sum(-1).clamp(min=0).sqrt()


def inner(U_BRO: Tensor, K_BRI: Tensor, w_BR: Tensor, u_BO: Tensor, k_BI: Tensor) -> Tensor:
    """⟨Σ_j w_j u_j k_jᵀ, u kᵀ⟩ of each row, [B]; a slot of weight 0 may hold anything."""
    dot_BR = (U_BRO @ u_BO[..., None] * (K_BRI @ k_BI[..., None]))[..., 0]
    return (w_BR * dot_BR.masked_fill(w_BR == 0, 0)).sum(-1)
