"""What one forward pass is: the tokens it reads, and what the plastic linears may read and write in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from .cache import Positions
from .carried import Carried
from .episode_state import Address
from .kernels.gram import Gram
from .state import EventLog
from .state.events import Events
from .state.reads import Reads


@dataclass(frozen=True)
class Tokens:
    """What one pass reads: some columns of a feed. All tensors are on the CPU.

    logits: "all" or "last", which of the logits are wanted. graph: whether with their graph.
    """

    ids_BT: Tensor
    positions: Positions
    write_BT: Tensor  # bool: which tokens make an event
    logits: str = "all"
    graph: bool = False

    @cached_property
    def counts(self) -> list[int]:
        """Tokens to be written, per row."""
        return self.write_BT.sum(1).tolist()

    @property
    def single(self) -> bool:
        """True if this is one token of each row."""
        return self.ids_BT.shape[1] == 1


@dataclass(frozen=True)
class SharedKeys:
    """The keys of one input, for every linear that reads the same input under rules whose keys are alike."""

    h_BTI: Tensor  # the input itself, before any cast; with its graph where a pass has one
    version: int  # of h, which an edit in place raises
    form: tuple  # (mu, bias, decay, clip) of the rule
    k_BTI: Tensor
    scale_BT: Tensor  # k = scale · h
    bias_BT: Tensor | None
    norm_BT: Tensor | None  # ‖k‖, where the rule clips
    grams: dict[tuple[int, int], Gram]  # of the tokens t0 to t1
    graph_BTT: list[Tensor]  # the Gram of all tokens with its graph, once it is made


@dataclass(frozen=True)
class OnCpu:
    """What a target that lies on the CPU is asked by: nothing then waits for the device."""

    position_BT: Tensor
    row_BT: Tensor | None


@dataclass
class Pass:
    """One forward pass over all plastic linears: what they read and write.

    Events are written during the pass. If it fails they are rolled back; logs that would fold on the way are copied
    first, see `EpisodeState.attempt`.

    Where B rows share one ΔW, positions, mask and events are those of one row of T · B tokens, see `side_by_side`.
    """

    logs: Mapping[Address, EventLog]
    position_BT: Tensor
    write_BT: Tensor | None = None  # on the CPU, where the host may look at it; None: read only
    counts: Sequence[int] = ()  # events to come, per ΔW
    write_events: Callable[[Address, Events], None] | None = None  # their door, see `EpisodeState.write`
    all_written: bool = False  # every token of every row makes an event
    rows_per_column: int = 1  # tokens side by side: B where the rows share one ΔW
    row_BT: Tensor | None = None  # the row of the episode that each of them belongs to
    on_cpu: OnCpu | None = None  # position_BT and row_BT as they are on the CPU
    slot_weights: dict[Address, Tensor] | None = None  # a probe's own w: [E, rows per ΔW, slots]
    reads: Mapping[Address, Reads] = field(default_factory=dict)  # of linears that are read where these lie
    # gradient rules: (a, h) of this token, a with its graph; None: no graph is wanted
    taped: dict[Address, tuple[Tensor, Tensor]] | None = None
    keys: SharedKeys | None = None  # of the linear that ran last: gate and up read the same input
    carried: dict[Address, Carried] | None = None  # a graph is wanted, and what each linear reads with it; else None
