"""place: where the next event of each row goes, and what the events before it weigh, by one launch of Triton.

`state.slots` and `Factors.weigh` are the definition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from .products import announce, chained, wait
from .values import jit, tl, triton


@jit
def _place(
    event_ptr, birth_ptr, slot_ptr, w_ptr, R, birth_sb, first, free, kept, window,
    LOG2_KEEP: tl.constexpr, BR: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    announce(PDL)
    wait(PDL)
    b = tl.program_id(0).to(tl.int64)
    event = tl.load(event_ptr + b)
    tl.store(slot_ptr + b, tl.where(event < first, event, kept + (event - first) % free))
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        birth = tl.load(birth_ptr + b * birth_sb + r, mask=r < R, other=-1)
        age = event - 1 - birth
        w = tl.full([BR], 1.0, tl.float64)
        if LOG2_KEEP != 0:  # float64: a power with thousands of events in the exponent
            w = tl.exp2(tl.maximum(age, 0).to(tl.float64) * LOG2_KEEP)
        w = tl.where((birth >= 0) & (age >= 0) & (age < window), w, 0.0)
        tl.store(w_ptr + b * R + r, w.to(tl.float32), mask=r < R)


class Turns(NamedTuple):
    """Where the events of a log go, in whole numbers, and how their weights fade: `state.slots` says why.

    Event j lies in slot j while j < first, then in slot kept + (j − first) mod free. It weighs (1 − decay)^age while
    its age is below window.
    """

    first: int
    free: int
    kept: int
    window: int
    decay: float


def launch_place(event_B: Tensor, birth_BR: Tensor, turns: Turns, slot_B: Tensor, w_BR: Tensor) -> None:
    """The slot of the next event of each row, and the weights of the events before it, by one launch of Triton.

    event [B] int64: its number; birth [B, R] int64; slot [B] int64 and w [B, R] float32, contiguous, are filled.
    """
    (B, R), (*whole, decay) = birth_BR.shape, turns
    log2_keep = math.log2(1 - decay) if decay < 1 else -1074.0  # 2^-1074 is the smallest number there is
    options = {"LOG2_KEEP": log2_keep, "BR": min(256, triton.next_power_of_2(R)), **chained(event_B.device)}
    _place[(B,)](event_B, birth_BR, slot_B, w_BR, R, birth_BR.stride(0), *whole, **options)
