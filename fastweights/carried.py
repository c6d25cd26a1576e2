"""The events of one linear whose graph is kept, and the state that they came upon: what a feed with a graph reads.

Shape suffixes: B rows, T tokens of this pass, S tokens of earlier ones, R slots, O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.adjoint import faded
from .kernels.gram import before
from .kernels.read import read
from .state import EventLog
from .state.reads import Reads


@dataclass(frozen=True)
class Carried:
    """What one linear has written since the last cut, with its graph.

    U, K and bias have an entry for every token of the feeds that wrote. index_BS: how many events of its row came
    between the cut and it; −1: it is not written.
    """

    state: Reads | None  # at the cut, a copy; None: there were no events
    counts: list[int]  # events since the cut, per row
    U_BSO: Tensor | None = None
    K_BSI: Tensor | None = None
    bias_BS: Tensor | None = None
    index_BS: Tensor | None = None  # on the CPU

    @classmethod
    def begin(cls, log: EventLog) -> Carried:
        """Nothing since now."""
        return cls(Reads.of(log).copied() if log.used else None, [0] * len(log.event_counts))

    def read(
        self, h_BTI: Tensor, write_BT: Tensor | None, decay: Tensor | float, bias: bool, width: int = 1
    ) -> Tensor | None:
        """ΔW h (+ Δb) of what was written before this pass, as it weighs while the pass writes; None: nothing was.

        write [B, T] on the CPU; None: nothing is written. The state's own history has no graph, but its decay since the
        cut has.
        """
        since_BT = torch.tensor(self.counts, device="cpu")[:, None]
        if write_BT is not None:
            since_BT = since_BT + before(write_BT, width)
        parts = []
        if self.state is not None:
            U_BRO, K_BRI, bias_BR, w_BTR = self.state
            left_BT1 = faded(since_BT.to(h_BTI.device), decay, U_BRO.dtype)[..., None]
            w_BTR = left_BT1.expand(-1, -1, U_BRO.shape[1]) if w_BTR is None else w_BTR * left_BT1
            parts.append(read(h_BTI, U_BRO, K_BRI, bias_BR if bias else None, w_BTR))
        if self.U_BSO is not None and self.K_BSI is not None and self.index_BS is not None:
            passed_BTS = since_BT[..., None] - 1 - self.index_BS[:, None]
            w_BTS = faded(passed_BTS.to(h_BTI.device), decay, self.U_BSO.dtype)
            w_BTS = w_BTS.masked_fill(self.index_BS[:, None].to(h_BTI.device) < 0, 0)
            parts.append(read(h_BTI, self.U_BSO, self.K_BSI, self.bias_BS, w_BTS))
        return sum(parts[1:], parts[0]) if parts else None

    def joined(self, u_BTO: Tensor, k_BTI: Tensor, bias_BT: Tensor | None, write_BT: Tensor) -> Carried:
        """With the events of one pass as well; write is on the CPU."""
        counts_B1 = torch.tensor(self.counts, device="cpu")[:, None]
        index_BT = (counts_B1 + write_BT.cumsum(1) - 1).masked_fill(~write_BT, -1)
        more: tuple[Tensor | None, ...] = (u_BTO, k_BTI, bias_BT, index_BT)
        if self.U_BSO is not None:
            earlier = (self.U_BSO, self.K_BSI, self.bias_BS, self.index_BS)
            pairs = zip(earlier, more, strict=True)
            more = tuple(None if x is None or y is None else torch.cat((x, y), 1) for x, y in pairs)
        counts = [n + c for n, c in zip(self.counts, write_BT.sum(1).tolist(), strict=True)]
        return Carried(self.state, counts, *more)
