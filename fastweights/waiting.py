"""Gradient events: made when the next token is known, and made again after a fork or a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .backward import Slope
from .engine.choose import Engine
from .episode_state import Address, EpisodeState, Graph, Taped, Waiting
from .passes import Tokens
from .plastic import PlasticLinear
from .rules import event
from .state.events import Events


def settle(engine: Engine, next_B: Tensor, known_B: Tensor) -> None:
    """Writes the gradient events whose next token is known now; next [B] ids, known [B] bool, on the CPU."""
    state, still = engine.state, []
    events: dict[Address, Events] = {}
    for waiting in state.waiting:
        rows_B = waiting.rows_B & known_B
        if rows_B.any():
            for address, new in _events(engine, waiting, rows_B, next_B).items():
                events[address] = events[address].joined(new) if address in events else new
        if (waiting.rows_B & ~known_B).any():
            still.append(replace(waiting, rows_B=waiting.rows_B & ~known_B))
    for address, new in events.items():
        state.write(address, new.side_by_side() if state.shared else new)
    state.waiting = still


def _events(engine: Engine, waiting: Waiting, rows_B: Tensor, next_B: Tensor) -> dict[Address, Events]:
    """The events of one token in some rows."""
    device, how = engine.model.device, waiting.how
    if isinstance(how, Graph):
        slopes = _by_graph(how, rows_B.to(device), next_B.to(device))
    else:
        _check_logs(engine.state, waiting, how, rows_B)
        slopes = engine.slopes(how, rows_B, next_B)
    every, write_B1, events = bool(rows_B.all()), rows_B[:, None].to(device), {}
    for address, slope in slopes.items():
        a_B1O, h_B1I = (part[:, None].to(engine.state.logs[address].dtype) for part in slope)
        events[address] = Events(*event(engine.linears[address].rule, h_B1I, a_B1O), write_B1, every)
    return events


def _check_logs(state: EpisodeState, waiting: Waiting, how: Taped, rows_B: Tensor) -> None:
    for address, log in state.logs.items():
        if address in how.reads or address[0] < how.first:
            continue
        for row, (now, then) in enumerate(zip(log.event_counts, waiting.event_counts[address], strict=True)):
            if now != then and rows_B[row]:
                raise ValueError(
                    f"a gradient event of row {row} waits for its next token, and {log.name} was changed since, from "
                    f"{then} to {now} events, by something else than this episode: restore a snapshot, or reset"
                )


def _by_graph(graph: Graph, rows_B: Tensor, next_B: Tensor) -> dict[Address, Slope]:
    row = rows_B.nonzero()[:, 0]
    with torch.enable_grad():
        logprob = graph.logprob_BV[row, next_B[row]].sum()
    at = [a_BTO for a_BTO, _ in graph.taped.values()]
    if logprob.requires_grad:
        # the graph is retained, because a snapshot or fork may hold the same one
        grads = torch.autograd.grad(logprob, at, retain_graph=True, allow_unused=True, materialize_grads=True)
    else:  # an edit has cut the logits off from every linear, as others may cut off one
        grads = tuple(map(torch.zeros_like, at))
    inputs = (h_BTI for _, h_BTI in graph.taped.values())
    return {a: Slope(grad[:, 0], h[:, 0]) for a, grad, h in zip(graph.taped, grads, inputs, strict=True)}


def check_waiting(state: EpisodeState, linears: Mapping[Address, PlasticLinear]) -> None:
    """Refuses where `read_again` would not see the weights that the waiting token was read with."""
    for waiting in state.waiting:
        if waiting.edited and waiting.rows_B.any():
            raise ValueError(
                "a gradient event waits for its next token, and its own token was read under edits, which are not read "
                "again: feed the next token first"
            )
        for row, count in enumerate(state.per_delta(waiting.rows_B.long().tolist())):
            for address, log in state.logs.items():
                then = waiting.event_counts[address][row]
                own = count if linears[address].rule.neuron_local else 0
                if count and (log.event_counts[row] != then + own or then < log.oldest_exact_moment(row)):
                    since = "an undo, an overflow" + (", another row's event" if state.shared else "")
                    raise ValueError(
                        f"a gradient event of row {row} waits for its next token, and {log.name} no longer holds "
                        f"the weights it was read with ({since} since): feed the next token first"
                    )


@torch.no_grad()
def read_again(engine: Engine, waits: Sequence[bool], own: Sequence[int]) -> None:
    """Reads the last token of the rows that wait once more, as it was read before its `own` events, for its graph."""
    state, linears = engine.state, engine.linears
    before, waits_B = state.clone(), torch.tensor(list(waits), device="cpu")
    for address, log in state.logs.items():
        if linears[address].rule.neuron_local:
            log.rewind([n - c for n, c in zip(log.event_counts, own, strict=True)])
    state.cache.rewind([n - int(w) for n, w in zip(state.lengths, waits, strict=True)])
    last_B1 = torch.tensor([[ids[-1]] if ids else [0] for ids in state.token_ids], device="cpu")
    positions = state.cache.positions((state.batch_size, 1), waits_B[:, None], torch.device("cpu"))
    # what was read under edits is refused, see `check_waiting`: so none may act now, and no capture sees it twice
    with engine.model.binding.untapped(), state.attempt():
        engine.run(Tokens(last_B1, positions, waits_B[:, None]))
        waiting = state.waiting
    state.copy_from(before)
    state.waiting = waiting
