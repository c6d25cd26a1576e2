"""One feed: checks at the door, the plan of its passes, and all of it or nothing.

A feed is one pass, or one pass per column: token after token where a gradient rule writes or an event goes over its
budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .engine.choose import Engine
from .episode_state import Address, EpisodeState
from .inputs import Update, written
from .model import Llama
from .passes import Tokens
from .plastic import PlasticLinear
from .probes.capture import check_events
from .probes.places import Reading
from .probes.taps import Bound, Taps
from .rules import ContextPatch
from .state.budget import OneByOne
from .waiting import settle
from .watch import Watch

CPU = torch.device("cpu")


class Reader:
    """Reads tokens for one episode."""

    def __init__(self, model: Llama, state: EpisodeState):
        self.engine, self.state = Engine(model, state), state
        self.linears = self.engine.linears

    @torch.no_grad()
    def read(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        update: Update,
        generated: bool,
        logits: str,
        edits: Sequence[Bound] = (),
        graph: bool | str = False,
    ) -> Tensor:
        """The logits of these tokens; ids and mask are on the CPU, as `inputs.tokens` gives them.

        edits: of this feed, after those that stand in this thread. graph: see `Episode.feed`.

        Raises:
            ValueError: the tokens, the update, an edit or an event is refused; nothing has changed then.
        """
        state, binding = self.state, self.engine.model.binding
        watch = self.engine.check()
        positions = state.cache.positions((ids_BT.shape[0], ids_BT.shape[1]), mask_BT, CPU)
        for address, linear in self.linears.items():
            if linear.learned:
                linear.renew(state.logs[address])
        write_BT = written(update, ids_BT, positions.position_BT, generated)
        if positions.real_BT is not None:
            write_BT = write_BT & positions.real_BT
        if self.linears and all(isinstance(linear.rule, ContextPatch) for linear in self.linears.values()):
            write_BT = torch.zeros_like(write_BT)
        check_targets(self.linears, state.batch_size, positions.position_BT, write_BT)
        tokens = Tokens(ids_BT, positions, write_BT, logits, bool(graph))
        self._check_graph(tokens, graph)
        by_column = self._check_room(tokens)
        if not edits and not binding.taps:
            return self._passes(tokens, watch, by_column, None, Taps(), graph)
        own = Taps(edits, reading=Reading.of(ids_BT, positions, generated))
        with binding.tapped(own):
            taps = self._taps(own, tokens)
            by_column = by_column or (any(tokens.counts) and taps.plastic(self.engine.model))
            return self._passes(tokens, watch, by_column, own, taps, graph)

    def _taps(self, own: Taps, tokens: Tokens) -> Taps:
        """The taps of this feed and those around it; refuses edits that cannot be made on its tokens."""
        taps = Taps.together([call.what for call in self.engine.model.binding.taps])
        assert own.reading is not None
        taps.begin(own.reading)
        for bound in taps.edits if any(tokens.counts) else ():
            check_events(bound.edit.places, self.linears)
        return taps

    def _passes(
        self, tokens: Tokens, watch: Watch, by_column: bool, own: Taps | None, taps: Taps, graph: bool | str
    ) -> Tensor:
        """All of the feed or nothing, in one pass or in one per column.

        own: the taps of this feed, which are told the column; None: no edit or capture. taps: all that stand.
        """
        state = self.state
        state.cache.reserve(tokens.positions.end)
        try:
            with state.attempt(), taps.attempt():
                if graph:
                    state.carry()
                out_BTV = self._columns(tokens, own) if by_column else self._whole(tokens, watch)
                if graph is True:
                    state.cut()
                return out_BTV
        except OneByOne:
            with state.attempt(), taps.attempt():
                return self._columns(tokens, own)

    def _whole(self, tokens: Tokens, watch: Watch) -> Tensor:
        """All tokens in one pass."""
        positions = tokens.positions
        if self.state.waiting:
            real_BT = positions.real_or_all_BT
            first_B1 = real_BT.int().argmax(1, keepdim=True)
            settle(self.engine, tokens.ids_BT.gather(1, first_B1)[:, 0], real_BT.any(1))
        out_BTV = self.engine.run(tokens, watch)
        self._remember(tokens, out_BTV if out_BTV.shape[1] == 1 else positions.last(out_BTV))
        return out_BTV

    def _columns(self, tokens: Tokens, own: Taps | None) -> Tensor:
        """One pass per column; each sees the gradient events that its tokens made known."""
        state, real_BT, columns = self.state, tokens.positions.real_or_all_BT, []
        for t in range(tokens.ids_BT.shape[1]):
            if own is not None:
                own.column = t
            column = slice(t, t + 1)
            settle(self.engine, tokens.ids_BT[:, t], real_BT[:, t])
            here = state.cache.positions((state.batch_size, 1), real_BT[:, column], CPU)
            part = Tokens(tokens.ids_BT[:, column], here, tokens.write_BT[:, column], graph=tokens.graph)
            columns.append(self.engine.run(part))
        with torch.set_grad_enabled(tokens.graph):
            out_BTV = torch.cat(columns, dim=1)
            last_B1V = tokens.positions.last(out_BTV)
        self._remember(tokens, last_B1V)
        return out_BTV if tokens.logits == "all" else last_B1V

    def _remember(self, tokens: Tokens, last_B1V: Tensor) -> None:
        """Keeps the tokens, and the logits after the last of each row."""
        state, real_BT, last_BV = self.state, tokens.positions.real_BT, last_B1V[:, 0]
        if state.logits_BV is not None and real_BT is not None:
            last_BV = torch.where(real_BT.any(1, keepdim=True).to(last_BV.device), last_BV, state.logits_BV)
        state.logits_BV = last_BV.detach().clone()  # a caller may change, or drop, what a feed returns
        for row, (seen, ids) in enumerate(zip(state.token_ids, tokens.ids_BT, strict=True)):
            seen.extend((ids if real_BT is None else ids[real_BT[row]]).tolist())

    def _check_graph(self, tokens: Tokens, graph: bool | str) -> None:
        """Refuses a graph that could not be made, and a feed that would tear one that is carried."""
        state = self.state
        if state.carried is not None and graph != "carry":
            raise ValueError(
                'this episode carries a graph: expected feed(graph="carry"), which goes on with it, or cut() first'
            )
        if not graph:
            return
        if torch.is_inference_mode_enabled():
            raise ValueError(f"feed(graph={graph!r}) is called inside torch.inference_mode(), where no graph is made")
        for address, log in state.logs.items():
            linear = self.linears[address]
            rule, asked = linear.rule, f"feed(graph={graph!r}): {linear.name}"
            if not rule.neuron_local:
                raise ValueError(
                    f"{asked} has the gradient rule {type(rule).__name__}, whose events are not differentiated: "
                    "expected neuron-local rules"
                )
            if linear.budget is not None:
                raise ValueError(
                    f"{asked} has a budget, whose scalings are not differentiated: expected linears without one"
                )
            if not log.keeps_all(state.per_delta(tokens.counts)):
                raise ValueError(
                    f"{asked} would overflow (rank {log.rank}, overflow={log.overflow!r}), and what is lost then is "
                    'not differentiated: attach with a larger rank or overflow="grow"'
                )

    def _check_room(self, tokens: Tokens) -> bool:
        """Refuses what the logs could not take; returns whether the tokens must go through column by column."""
        if not self.linears:
            return False
        state, counts = self.state, tokens.counts
        later, by_column = counts, False
        if not all(linear.rule.neuron_local for linear in self.linears.values()):
            real_BT = tokens.positions.real_or_all_BT
            # a gradient event waits for the next token: the last token's is not written in this feed
            followed_BT = real_BT.flip(1).cumsum(1).flip(1) > 1
            known_B = real_BT.any(1)
            due = [sum(bool(one.rows_B[row] & known_B[row]) for one in state.waiting) for row in range(len(counts))]
            later = [d + c for d, c in zip(due, (tokens.write_BT & followed_BT).sum(1).tolist(), strict=True)]
            # rows that share ΔW see each other's waiting events: none may come before its column
            late_B = known_B & ~real_BT[:, 0]
            by_column = any(counts) or (
                state.shared and any(bool((one.rows_B & late_B).any()) for one in state.waiting)
            )
        for address, log in state.logs.items():
            if log.overflow == "error":
                log.check_room(state.per_delta(counts if self.linears[address].rule.neuron_local else later))
        return by_column


def check_targets(linears: Mapping[Address, PlasticLinear], rows: int, position_BT: Tensor, write_BT: Tensor) -> None:
    """Refuses written positions and rows that a rule's target does not reach."""
    for plastic in linears.values():
        target = getattr(plastic.rule, "target", None)
        if not isinstance(target, Tensor) or target.dim() == 1 or not write_BT.any():
            continue
        last = int(position_BT[write_BT].max())
        if last >= target.shape[-2] or (target.dim() == 3 and len(target) != rows):
            raise ValueError(
                f"{plastic.name}: the rule's target has shape {list(target.shape)}, "
                f"but position {last} of {rows} rows is to be written"
            )
