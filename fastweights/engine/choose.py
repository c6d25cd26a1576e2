"""The one place where the path of a pass is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ..backward import Slope, backward
from ..episode_state import Address, EpisodeState, Taped
from ..model import Llama
from ..passes import Tokens
from ..plastic import PlasticLinear, plastic_linears
from ..state.reads import Reads
from ..watch import Watch, standing
from .cpu import Cpu
from .cuda import Cuda, graphed
from .gradient import Gradient
from .modules import Modules


class Path(Protocol):
    """One way to run a pass. All of them give the same numbers, to rounding."""

    name: str

    def refuses(self, tokens: Tokens, watch: Watch) -> str | None:
        """Why this path does not take the pass, in words; None if it does. Changes nothing."""

    def run(self, tokens: Tokens, watch: Watch) -> Tensor:
        """The logits; the events are in the logs afterwards, and the tokens in the cache."""


class Engine:
    """Runs the passes of one episode, each on the first path that takes it.

    Attributes:
        path: the name of the path that the last pass took: "modules", "cpu" or "cuda"; None before the first.
        why: the paths before it, and why they did not take that pass.
    """

    def __init__(self, model: Llama, state: EpisodeState):
        self.model, self.state = model, state
        self.linears = plastic_linears(model)
        record = graphed if model.device.type == "cuda" else None
        self.gradient = Gradient(model, self.linears, state, record)
        self.paths: list[Path] = [  # the fastest first; `gradient` in place of the first where a rule asks for it
            Cuda(model, self.linears, state, record),
            Cpu(model, self.linears, state),
            Modules(model, self.linears, state),
        ]
        self.path: str | None = None
        self.why: dict[str, str] = {}
        self.watch: Watch | None = None  # under which the linears were last looked at

    def check(self) -> Watch:
        """The model's watch.

        Raises:
            ValueError: the plastic linears, the dtype or the device are no longer those that the episode began with.
        """
        if self.watch is not None and self.watch.stands():  # also where somebody detached and attached the same again
            return self.watch
        watch = standing(self.model)
        if watch is not self.watch:
            _check_linears(self.linears, self.model)
            began, now = ((t.dtype, t.device) for t in (self.state.cache.keys[0], self.model.lm_head.weight))
            if began != now:
                raise ValueError(
                    f"this episode began with a model in {began[0]} on {began[1]}, which is in {now[0]} on {now[1]} "
                    "now: make a new one"
                )
            self.watch = watch
        return watch

    def run(self, tokens: Tokens, watch: Watch | None = None) -> Tensor:
        """The logits of one pass, [B, T, V] or, if only the last are wanted, [B, 1, V].

        watch: what `check` gave just now; None: it is asked here.
        """
        watch, why = watch or self.check(), dict[str, str]()
        by_gradient = not all(linear.rule.neuron_local for linear in self.linears.values())
        for path in (self.gradient if by_gradient else self.paths[0], *self.paths[1:]):
            reason = path.refuses(tokens, watch)
            if reason is None and tokens.graph and not isinstance(path, Modules):
                reason = "a graph is made by the modules"
            if reason is None:
                self.path, self.why = path.name, why
                return path.run(tokens, watch)
            why[path.name] = reason
        raise AssertionError("the modules take every pass")

    @torch.no_grad()
    def slopes(self, how: Taped, rows_B: Tensor, next_B: Tensor) -> dict[Address, Slope]:
        """∂ log p(next token) / ∂a of a token that waits, in some rows; all tensors but the slopes are on the CPU."""
        model, state = self.model, self.state
        recorded = self.gradient.slopes(how, rows_B, next_B, self.watch or self.check())
        if recorded is not None:
            return recorded
        next_B, rows_B = next_B.to(model.device), rows_B.to(model.device)
        position_B = torch.tensor(state.lengths, device=model.device).clamp(min=1) - 1
        reads = {a: Reads.of(log) for a, log in state.logs.items() if a[0] >= how.first} | how.reads
        token = (how.tape_BN, how.first, how.addresses, next_B, rows_B, position_B)
        return backward(model, *token, state.cache, state.cache.length, reads)


def _check_linears(linears: Mapping[Address, PlasticLinear], model: Llama) -> None:
    if linears != plastic_linears(model):
        raise ValueError("attach() or detach() changed this model after the episode was made: make a new one")
