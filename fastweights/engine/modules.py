"""The path that takes every pass: the model's own modules. It is the slow twin of the others."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..episode_state import Address, EpisodeState, Waiting
from ..model import Llama
from ..passes import OnCpu, Pass, Tokens
from ..plastic import PlasticLinear
from ..state.events import side_by_side
from ..state.unseen import Unseen
from ..watch import Watch


class Modules:
    """Calls the model. Linears read and write as the pass goes by; a gradient rule's token leaves a graph behind."""

    name = "modules"

    def __init__(self, model: Llama, linears: Mapping[Address, PlasticLinear], state: EpisodeState):
        self.model, self.linears, self.state = model, linears, state

    def refuses(self, tokens: Tokens, watch: Watch) -> str | None:
        return None

    def run(self, tokens: Tokens, watch: Watch) -> Tensor:
        model, state = self.model, self.state
        positions, before = tokens.positions.to(model.device), state.event_counts
        writes = any(tokens.counts)
        taping = writes and any(not linear.rule.neuron_local for linear in self.linears.values())
        unseen = Unseen()
        now = self._pass(tokens, positions.position_BT, writes, unseen)
        with model.binding.bound(now, state), torch.set_grad_enabled(taping):
            ids_BT = tokens.ids_BT.to(model.device)
            out_BTV = model(ids_BT, cache=state.cache, logits=tokens.logits, positions=positions)
            unseen.look()
            if now.taped:
                logprob_BV = out_BTV[:, -1].log_softmax(-1, dtype=torch.promote_types(out_BTV.dtype, torch.float32))
                under_edits = any(call.what.edits for call in model.binding.taps)
                state.waiting.append(Waiting(logprob_BV, now.taped, tokens.write_BT[:, 0], before, under_edits))
        state.cache.advance(tokens.positions)
        return out_BTV.detach()

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
