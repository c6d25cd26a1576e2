"""The plastic side of the fused step: C reads every ΔW on its way, the rules run on what it saw, in a few calls.

Linears of one rule, activation and shape form a stack; to the rule they are one more leading dimension N.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kernels.decode import FAST, put
from .passes import Pass, Site
from .plastic import ACTIVATIONS, PlasticLinear
from .rules import Local, event_value, key_scale, value_of
from .state import EventLog
from .state.events import Events
from .state.factors import BUFFERS


@dataclass(frozen=True)
class Stack:
    """What C leaves of N linears, float32: their inputs, ‖h‖², W h + b, and that with ΔW h."""

    linears: list[PlasticLinear]
    here: slice  # of all records
    row_NB1: Tensor  # the row of the episode
    h_NB1I: Tensor
    square_NB1: Tensor
    frozen_NB1O: Tensor
    a_NB1O: Tensor

    def value(self, position_B1: Tensor, scale_NB1: Tensor) -> Tensor:
        """u [N, B, 1, O] of this token, by the rule; its key is k = scale · h."""
        rule, activation = self.linears[0].rule, self.linears[0].activation
        at = Local(self.frozen_NB1O, activation, position_B1.expand(len(self.linears), -1, -1), self.row_NB1)
        norm_NB1 = scale_NB1 if rule.clip is None else self.square_NB1.sqrt() * scale_NB1
        u_NB1O = event_value(rule, value_of(rule, self.a_NB1O, activation, at), norm_NB1, self.row_NB1)
        return u_NB1O.contiguous()


class Stacks:
    """The buffers of one episode's plastic linears, and the records that tell C of them."""

    def __init__(self, linears: Mapping[Site, PlasticLinear], rows: int, layers: int):
        groups: dict[tuple, list[PlasticLinear]] = {}
        for linear in linears.values():
            key = (id(linear.rule), linear.activation.name, linear.out_features, linear.in_features)
            groups.setdefault(key, []).append(linear)
        self.rows = rows
        self.linears = [linear for group in groups.values() for linear in group]  # in the order of the records
        self.rules = [linear.rule for linear in self.linears]
        self.records = np.zeros(len(self.linears), FAST)
        self.which = np.full((layers, 3), -1)
        for n, linear in enumerate(self.linears):
            self.which[linear.site[0], list(ACTIVATIONS).index(linear.site[1])] = n
        self.square_LB1 = torch.empty(len(self.linears), rows, 1)
        self.records["square"] = addresses(self.square_LB1)
        self.stacks, start = [], 0
        for group in groups.values():
            I, O, here = group[0].in_features, group[0].out_features, slice(start, start + len(group))
            h, frozen, a = (torch.empty(len(group), rows, 1, size) for size in (I, O, O))
            self.records["I"][here], self.records["O"][here] = I, O
            for name, buffer in (("h", h), ("frozen", frozen), ("a", a)):
                self.records[name][here] = addresses(buffer)
            row_NB1 = torch.arange(rows)[:, None].expand(len(group), -1, -1)
            self.stacks.append(Stack(group, here, row_NB1, h, self.square_LB1[here], frozen, a))
            start = here.stop
        # where the events of each stack are to be named, and how far apart they lie
        self.events = [
            (self.records[name][stack.here], np.arange(len(stack.linears), dtype=np.uint64) * (rows * width * 4))
            for stack in self.stacks
            for name, width in (("u", stack.a_NB1O.shape[3]), ("scale", 1))
        ]
        self.buffers: list[Tensor] = []  # U of every log that the records name; its other buffers come and go with it
        self.kinds: list[int] = []  # logs of one kind and event count have the same slots in use, and weights
        self.facts: list[tuple[int, Tensor | None, int | None]] = []  # slots in use, weights, where the event belongs

    def stands(self) -> bool:
        """Whether every linear still has the rule it was stacked by."""
        return all(linear.rule is rule for linear, rule in zip(self.linears, self.rules, strict=True))

    def take(self, now: Pass) -> bool:
        """Whether C can read these logs, and this pass's rules can work on what it leaves."""
        # C reads a ΔW per row: rows that share one go through the modules
        known = all(log.dtype == torch.float32 and len(log.event_counts) == self.rows for log in now.logs.values())
        if now.weights is not None or not known:
            return False
        for linear in self.linears:
            if linear.backend != "torch" or (now.write_BT is not None and not linear.rule.neuron_local):
                return False
        return True

    def read(self, now: Pass) -> tuple[np.ndarray, np.ndarray]:
        """What C is to read: the records, and which linear each belongs to."""
        logs = [now.logs[linear.site] for linear in self.linears]
        if now.write_BT is not None:
            for log in logs:
                log.reserve(now.counts)
        self._point_at(logs)
        known: dict[tuple, tuple[int, Tensor | None, int | None]] = {}
        self.facts = []
        for kind, log in zip(self.kinds, logs, strict=True):
            key = (kind, *log.event_counts)
            if key not in known:
                w_BR = None if log.all_alive(1) or not log.used else log.slot_weights(log.now())[:, 0].contiguous()
                known[key] = log.used, w_BR, log.next_slot() if now.whole else None
            self.facts.append(known[key])
        self.records["n"] = [used for used, _, _ in self.facts]
        self.records["w"] = [0 if w is None else w.data_ptr() for _, w, _ in self.facts]
        return self.records, self.which

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
        self.scratch = torch.empty(len(logs), self.rows, max(log.capacity for log in logs))
        self.records["c"] = addresses(self.scratch)

    def write(self, now: Pass, position_B1: Tensor) -> dict[Site, Events]:
        """Writes the events directly when every log has a free slot; otherwise returns them for `EventLog.write`."""
        scales: dict[int, Tensor] = {}  # by rule
        events = []
        for stack in self.stacks:
            rule = stack.linears[0].rule
            if id(rule) not in scales:
                scales[id(rule)] = key_scale(rule, self.square_LB1)
            scale_NB1 = scales[id(rule)][stack.here]
            events.append((stack.value(position_B1, scale_NB1), scale_NB1))
        slots = [slot for _, _, slot in self.facts]
        if None in slots:
            return self._events(now, events)
        made = [tensor for event in events for tensor in event]
        for (named, steps), tensor in zip(self.events, made, strict=True):
            np.add(steps, tensor.data_ptr(), out=named)
        self.records["slot"] = slots
        self.records["event"] = [now.logs[linear.site].event_counts[0] for linear in self.linears]
        if not put(self.records, self.rows):
            return self._events(now, events)  # `write` will name it
        for linear in self.linears:
            now.logs[linear.site].count_written(now.counts)
        return {}

    def _events(self, now: Pass, events: list[tuple[Tensor, Tensor]]) -> dict[Site, Events]:
        assert now.write_BT is not None
        made = {}
        for stack, (u_NB1O, scale_NB1) in zip(self.stacks, events, strict=True):
            u_NB1O = u_NB1O.masked_fill(~now.write_BT[..., None], 0)
            k_NB1I = stack.h_NB1I * scale_NB1[..., None]
            for linear, u, k, key in zip(stack.linears, u_NB1O, k_NB1I, scale_NB1, strict=True):
                made[linear.site] = Events(u, k, key if linear.rule.bias else None, now.write_BT, now.whole)
        return made


def addresses(tensor: Tensor) -> np.ndarray:
    """Where each entry of the first dimension begins."""
    return np.arange(len(tensor), dtype=np.uint64) * (tensor.stride(0) * tensor.element_size()) + tensor.data_ptr()
