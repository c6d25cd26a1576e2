"""The path that takes every pass: the model's own modules. It is the slow twin of the others.

A gradient rule's token leaves a tape behind. Under hooks, edits or captures, and with modules of one's own in the
model, it leaves a graph of autograd instead, which knows what they did. A feed that wants a graph gets one of
all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..backward import Tape, forward, overwritten, unable
from ..episode_state import Address, EpisodeState, Graph, Taped, Waiting
from ..model import Llama
from ..passes import OnCpu, Pass, Tokens
from ..plastic import PlasticLinear
from ..state.events import side_by_side
from ..state.unseen import Unseen
from ..watch import Watch
from .table import table_of


class Modules:
    """Calls the model. Linears read and write as the pass goes by."""

    name = "modules"

    def __init__(self, model: Llama, linears: Mapping[Address, PlasticLinear], state: EpisodeState):
        self.model, self.linears, self.state = model, linears, state

    def refuses(self, tokens: Tokens, watch: Watch) -> str | None:
        return None

    def run(self, tokens: Tokens, watch: Watch) -> Tensor:
        model, state, writes = self.model, self.state, any(tokens.counts)
        positions, before = tokens.positions.to(model.device), state.event_counts
        ids_BT = tokens.ids_BT.to(model.device)
        gradient = tuple(a for a, linear in self.linears.items() if writes and not linear.rule.neuron_local)
        graph = bool(gradient) and (
            bool(model.binding.taps)
            or watch.hooked()
            or table_of(model, watch).stranger is not None
            or unable(model) is not None
        )
        unseen = Unseen()
        now = self._pass(tokens, positions.position_BT, writes, unseen)
        how: Taped | Graph | None = None
        if tokens.graph:
            now.carried = state.carried
        with model.binding.bound(now, state), torch.set_grad_enabled(graph or tokens.graph):
            if gradient and not graph:
                first = min(gradient)[0]
                reads = overwritten(state, self.linears, first)
                tape_BN = forward(model, ids_BT, positions, state.cache, first)
                how = Taped(tape_BN, first, gradient, reads)
                out_BTV = Tape.of(model, tape_BN, first).logits_BV[:, None]
                unseen.look()
            else:
                now.taped = {} if graph else None
                out_BTV = model(ids_BT, cache=state.cache, logits=tokens.logits, positions=positions)
                unseen.look()
                if now.taped:
                    dtype = torch.promote_types(out_BTV.dtype, torch.float32)
                    how = Graph(out_BTV[:, -1].log_softmax(-1, dtype=dtype), now.taped)
        if how is not None:
            under_edits = any(call.what.edits for call in model.binding.taps)
            state.waiting.append(Waiting(how, tokens.write_BT[:, 0], before, under_edits))
        state.cache.advance(tokens.positions)
        return out_BTV if tokens.graph else out_BTV.detach()

    def _pass(self, tokens: Tokens, position_BT: Tensor, writes: bool, unseen: Unseen) -> Pass:
        state = self.state
        if not writes:
            return Pass(state.logs, position_BT)
        now = Pass(
            state.logs,
            position_BT,
            tokens.write_BT,
            counts=state.per_delta(tokens.counts),
            write_events=partial(state.write, unseen=unseen),
            all_written=sum(tokens.counts) == tokens.write_BT.numel(),
            on_cpu=OnCpu(tokens.positions.position_BT, None),
        )
        if state.states < state.batch_size:
            now.rows_per_column = rows = state.batch_size
            row_BT, row_here_BT = (
                torch.arange(rows, device=device)[:, None].expand(position_BT.shape)
                for device in ("cpu", position_BT.device)
            )
            now.on_cpu = OnCpu(side_by_side(tokens.positions.position_BT), side_by_side(row_BT))
            now.row_BT, now.position_BT, now.write_BT = map(side_by_side, (row_here_BT, position_BT, tokens.write_BT))
        return now
