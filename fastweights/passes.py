"""What one forward pass is to the plastic linears: what they may read, and how they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .kernels.scan import Gram
from .kernels.step import StepInputs as Turn
from .state import EventLog

Site = tuple[int, str]  # (layer, linear)


@dataclass(frozen=True)
class Keys:
    """What the events of one input have in common, whatever the linear."""

    h_BTI: Tensor  # the input itself, before any cast: identity tells whether another linear may share
    form: tuple  # (mu, bias, decay, clip) of the rule
    k_BTI: Tensor
    bias_BT: Tensor | None
    norm_BT: Tensor  # ‖k‖, where the rule clips
    grams: dict[tuple[int, int], Gram]  # of the tokens t0 to t1


@dataclass
class Pass:
    """One forward pass over all plastic linears: what they read and write.

    A linear writes its events as the pass goes by. Should the pass fail, the episode takes them back: it has a copy of
    every log that could not do that by itself.

    Where B rows share one log, positions, mask and events are those of one row of T · B tokens, see `side_by_side`.
    """

    logs: Mapping[Site, EventLog]
    position_BT: Tensor
    write_BT: Tensor | None = None  # None: read only
    counts: Sequence[int] = ()  # events to come, per row
    whole: bool = False  # every token of every row is written
    width: int = 1  # tokens side by side: B where the rows share one log
    row_BT: Tensor | None = None  # the row of the episode that each of them belongs to
    weights: dict[Site, Tensor] | None = None  # a probe's own w: [E, rows per ΔW, slots]
    turns: Mapping[Site, Turn] = field(default_factory=dict)  # linears that write their event into its slot themselves
    pairs: frozenset[int] = frozenset()  # layers whose gate and up do that in one kernel
    # gradient rules: (a, h) of this token, a with its graph
    taped: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keys: Keys | None = None  # of the linear that ran last: gate and up see the same h and share them


@dataclass
class Binding:
    """Which pass is running: one for all plastic linears of a model. Set by `bound`, None otherwise."""

    now: Pass | None = None
