"""Events that are written before anybody has looked whether they are finite.

A look waits for the device. So a pass looks once, at its end, at the events of all linears; whoever then finds one that
is not finite refuses it by name, and the attempt around the pass takes everything back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Unseen:
    """What one pass has written."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # finite if all numbers of some events are; a sum may overflow by itself
        self.refusals: list[Callable[[], None]] = []  # in the order of the writes

    def add(self, total: Tensor, refuse: Callable[[], None]) -> None:
        """Notes the sum of some events, [], and what refuses the first of them that is not finite."""
        self.sums.append(total)
        self.refusals.append(refuse)

    def look(self) -> None:
        """Looks at all of them, once.

        Raises:
            ValueError: an event is not finite.
        """
        sums, self.sums = self.sums, []
        refusals, self.refusals = self.refusals, []
        if not sums or math.isfinite(float(torch.stack(sums).sum())):
            return
        for refuse in refusals:
            refuse()
