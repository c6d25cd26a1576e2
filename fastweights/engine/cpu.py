"""The path of one token on a CPU: C reads every weight and every ΔW once, then the rules run on what C saw.

Linears of one rule, activation and shape form a group; to the rule they are one more leading dimension N, so a rule
runs in a few calls for all of its linears.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backward import unable
from ..episode_state import Address, EpisodeState, Taped, Waiting
from ..kernels.decode import FAST, put
from ..model import Llama
from ..passes import Tokens
from ..plastic import PlasticLinear
from ..rules import Key, Local, event_value, key_of, value_of
from ..state import EventLog
from ..state.events import Events
from ..state.factors import BUFFERS
from ..watch import Watch
from .table import IN_ONE, LINEARS, refusal, run, table_of


class Cpu:
    """One token of each row in one call of C, for a float32 or bfloat16 model on a CPU."""

    name = "cpu"

    def __init__(self, model: Llama, linears: Mapping[Address, PlasticLinear], state: EpisodeState):
        self.model, self.linears, self.state = model, linears, state
        self.groups: Groups | None = None

    def refuses(self, tokens: Tokens, watch: Watch) -> str | None:
        if not tokens.single:
            return "the pass has more than one token of each row"
        if any(self.state.cache.first):
            return "a row begins at a later position, and the places before it are never seen"
        if (reason := refusal(self.model, self.state.batch_size, watch)) is not None:
            return reason
        if self.state.shared and self.state.batch_size > 1 and self.linears:
            return "the rows share one ΔW"
        if any(linear.backend != "torch" for linear in self.linears.values()):
            return "a linear runs on backend 'triton'"
        if any(log.dtype != torch.float32 for log in self.state.logs.values()):
            return "a log holds float64 factors"
        gradient = any(not linear.rule.neuron_local for linear in self.linears.values())
        if any(tokens.counts) and gradient and (reason := unable(self.model)) is not None:
            return reason
        if any(tokens.counts) and len({linear.rule.neuron_local for linear in self.linears.values()}) > 1:
            return "some rules that write this token are neuron-local, and some are not"
        return None

    def run(self, tokens: Tokens, watch: Watch) -> Tensor:
        model, state = self.model, self.state
        gradient = any(tokens.counts) and not all(linear.rule.neuron_local for linear in self.linears.values())
        writes, first = any(tokens.counts) and not gradient, min(self.linears)[0] if gradient else None
        if self.groups is None or not self.groups.stand():
            self.groups = Groups(self.linears, state, len(model.model.layers))
        groups, table = self.groups, table_of(model, watch)
        if writes:
            for address in self.linears:
                state.keep(address, tokens.counts)
        with model.binding.bound(None, state):
            records = groups.read(tokens, writes) if self.linears else table.frozen
            where = (tokens.ids_BT, tokens.positions, state.cache)
            out_B1V, tape_BN = run(model, table, *where, records[0], records[1], first)
            if tape_BN is not None and first is not None:
                how = Taped(tape_BN, first, tuple(self.linears), {})
                state.waiting.append(Waiting(how, tokens.write_BT[:, 0], state.event_counts))
            state.cache.advance(tokens.positions)
            if writes and self.linears:
                groups.write(tokens)
        return out_B1V


class LogFacts(NamedTuple):
    """What C must know of a log besides its buffers."""

    used: int  # slots that hold anything
    w_BR: Tensor | None  # their weights; None: 1
    slot: int | None  # where the event of every row belongs; None: Python must write it


@dataclass(frozen=True)
class Group:
    """What C leaves of N linears, float32: their inputs, W h + b, and that with ΔW h."""

    linears: list[PlasticLinear]
    here: slice  # of all records
    row_NB1: Tensor  # the row of the episode
    h_NB1I: Tensor
    frozen_NB1O: Tensor
    a_NB1O: Tensor

    def value(self, position_B1: Tensor, norm_NB1: Tensor | None) -> Tensor:
        """u [N, B, 1, O] of this token, by the rule; norm is ‖k‖, where it clips."""
        rule, activation = self.linears[0].rule, self.linears[0].activation
        at = Local(self.frozen_NB1O, activation, position_B1.expand(len(self.linears), -1, -1), self.row_NB1)
        u_NB1O = event_value(rule, value_of(rule, self.a_NB1O, activation, at), norm_NB1, self.row_NB1)
        return u_NB1O.contiguous()


class Groups:
    """The buffers of one episode's plastic linears, and the records that tell C of them."""

    def __init__(self, linears: Mapping[Address, PlasticLinear], state: EpisodeState, layers: int):
        alike: dict[tuple, list[PlasticLinear]] = {}
        for linear in linears.values():
            key = (id(linear.rule), linear.activation.name, linear.out_features, linear.in_features)
            alike.setdefault(key, []).append(linear)
        self.state, self.rows = state, state.batch_size
        self.linears = [linear for group in alike.values() for linear in group]  # in the order of the records
        self.rules = [linear.rule for linear in self.linears]
        self.records = np.zeros(len(self.linears), FAST)
        self.record_of = np.full((layers, len(LINEARS)), -1)  # of each layer's linears; -1: frozen
        for n, linear in enumerate(self.linears):
            columns = [0, 1] if linear.role == IN_ONE else LINEARS.index(linear.role)
            self.record_of[linear.address[0], columns] = n
        self.square_LB1 = torch.empty(len(self.linears), self.rows, 1, device="cpu")
        self.records["square"] = addresses(self.square_LB1)
        self.groups, start = [], 0
        for linears_N in alike.values():
            self.groups.append(self._group(linears_N, slice(start, start + len(linears_N))))
            start += len(linears_N)
        # where the events of each group are to be named, and how far apart they lie
        self.named = [
            (self.records[name][group.here], np.arange(len(group.linears), dtype=np.uint64) * (self.rows * width * 4))
            for group in self.groups
            for name, width in (("u", group.a_NB1O.shape[3]), ("scale", 1))
        ]
        self.buffers: list[Tensor] = []  # U of every log that the records name; its other buffers come and go with it
        self.kinds: list[int] = []  # logs of one kind and event count have the same slots in use, and weights
        self.facts: list[LogFacts] = []

    def _group(self, linears: list[PlasticLinear], here: slice) -> Group:
        I, O = linears[0].in_features, linears[0].out_features
        h, frozen, a = (torch.empty(len(linears), self.rows, 1, size, device="cpu") for size in (I, O, O))
        self.records["I"][here], self.records["O"][here] = I, O
        for name, buffer in (("h", h), ("frozen", frozen), ("a", a)):
            self.records[name][here] = addresses(buffer)
        row_NB1 = torch.arange(self.rows, device="cpu")[:, None].expand(len(linears), -1, -1)
        return Group(linears, here, row_NB1, h, frozen, a)

    def stand(self) -> bool:
        """True if every linear still has the rule it was grouped by."""
        return all(linear.rule is rule for linear, rule in zip(self.linears, self.rules, strict=True))

    def read(self, tokens: Tokens, writes: bool) -> tuple[np.ndarray, np.ndarray]:
        """What C is to read: the records, and the record of each layer's linears."""
        logs = [self.state.logs[linear.address] for linear in self.linears]
        if writes:
            for log in logs:
                log.reserve(tokens.counts)
        self._point_at(logs)
        all_written, known = sum(tokens.counts) == self.rows, dict[tuple, LogFacts]()
        self.facts = []
        for kind, log in zip(self.kinds, logs, strict=True):
            key = (kind, *log.event_counts)
            if key not in known:
                w_BR = None if log.all_alive(1) or not log.used else log.slot_weights(log.now())[:, 0].contiguous()
                known[key] = LogFacts(log.used, w_BR, log.next_slot() if all_written else None)
            self.facts.append(known[key])
        self.records["n"] = [facts.used for facts in self.facts]
        self.records["w"] = [0 if facts.w_BR is None else facts.w_BR.data_ptr() for facts in self.facts]
        return self.records, self.record_of

    def _point_at(self, logs: list[EventLog]) -> None:
        buffers = [log.U_BRO for log in logs]
        if self.buffers and all(map(operator.is_, buffers, self.buffers)):
            return
        self.buffers = buffers
        for name in ("U", "K", "birth"):
            self.records[name] = [getattr(log, BUFFERS[name]).data_ptr() for log in logs]
        biased = [linear.rule.bias for linear in self.linears]
        self.records["bias"] = [log.bias_BR.data_ptr() if b else 0 for log, b in zip(logs, biased, strict=True)]
        self.records["R"] = [log.capacity for log in logs]
        # with a budget each log is of its own kind: it is scaled by itself
        kinds = [
            (log.slots, log.decay, log.archive is None, None if log.budget is None else n) for n, log in enumerate(logs)
        ]
        self.kinds = [kinds.index(kind) for kind in kinds]
        self.scratch = torch.empty(len(logs), self.rows, max(log.capacity for log in logs), device="cpu")
        self.records["c"] = addresses(self.scratch)

    def write(self, tokens: Tokens) -> None:
        """Writes this token's events: C puts them into their slots if every log has one free, else Python does."""
        keys: dict[int, Key] = {}  # by rule
        events = []
        for group in self.groups:
            rule = group.linears[0].rule
            if id(rule) not in keys:
                keys[id(rule)] = key_of(rule, self.square_LB1)
            scale_LB1, norm_LB1 = keys[id(rule)]
            norm_NB1 = None if norm_LB1 is None else norm_LB1[group.here]
            events.append((group.value(tokens.positions.position_BT, norm_NB1), scale_LB1[group.here]))
        slots = [facts.slot for facts in self.facts]
        if None not in slots and self._put(events, slots):
            for linear in self.linears:
                self.state.logs[linear.address].count_written(tokens.counts)
            return
        for group, (u_NB1O, scale_NB1) in zip(self.groups, events, strict=True):
            u_NB1O = u_NB1O.masked_fill(~tokens.write_BT[..., None], 0)
            k_NB1I = group.h_NB1I * scale_NB1[..., None]
            for linear, u, k, key in zip(group.linears, u_NB1O, k_NB1I, scale_NB1, strict=True):
                bias = key if linear.rule.bias else None
                self.state.write(linear.address, Events(u, k, bias, tokens.write_BT, sum(tokens.counts) == self.rows))

    def _put(self, events: list[tuple[Tensor, Tensor]], slots: list[int | None]) -> bool:
        """Has C put the events into their slots; False, and nothing is put, if one of them is not finite."""
        made = [tensor for event in events for tensor in event]
        for (named, steps), tensor in zip(self.named, made, strict=True):
            np.add(steps, tensor.data_ptr(), out=named)
        self.records["slot"] = slots
        self.records["event"] = [self.state.logs[linear.address].event_counts[0] for linear in self.linears]
        return put(self.records, self.rows)


def addresses(tensor: Tensor) -> np.ndarray:
    """Where each entry of the first dimension begins."""
    return np.arange(len(tensor), dtype=np.uint64) * (tensor.stride(0) * tensor.element_size()) + tensor.data_ptr()
