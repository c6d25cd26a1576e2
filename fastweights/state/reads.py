"""What one token reads of a log: its factors, and the weight of every slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .log import EventLog


class Reads(NamedTuple):
    """ΔW as one token of each row sees it: Σ_j w_j u_j k_jᵀ, and Δb; arguments of `kernels.read.read`.

    bias_BR: None: no fast bias. w_BTR: [B, 1, R]; None where every slot weighs 1.
    """

    U_BRO: Tensor
    K_BRI: Tensor
    bias_BR: Tensor | None
    w_BTR: Tensor | None

    @classmethod
    def of(cls, log: EventLog) -> Reads:
        """Those of the next token: views of the log, good until it changes."""
        return cls(*log.factors(), None if log.all_alive(1) else log.slot_weights(log.now()))

    def to(self, device: torch.device) -> Reads:
        """The same on another device."""
        return Reads(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def copied(self) -> Reads:
        """A copy that stays as it is whatever happens to the log."""
        return Reads(*(None if part is None else part.clone() for part in self))  # type: ignore[arg-type]
