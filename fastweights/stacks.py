"""The plastic side of the fused step: C reads every ΔW on its way, the rules run on what it saw, in a few calls.

Linears of one rule, activation and shape form a stack; to the rule they are one more leading dimension N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels.decode import Fast
from .plastic import Pass, PlasticLinear, Site
from .rules import Local, event_value, key_scale
from .state import EventLog, Events


@dataclass(frozen=True)
class Stack:
    """What C leaves of N linears: their inputs, W h + b, and that with ΔW h, float32."""

    linears: list[PlasticLinear]
    h_NB1I: Tensor
    frozen_NB1O: Tensor
    a_NB1O: Tensor

    def events(self, position_B1: Tensor, write_B1: Tensor, whole: bool) -> dict[Site, Events]:
        """Each linear's event of this token, by its rule."""
        rule, activation = self.linears[0].rule, self.linears[0].activation
        at = Local(self.frozen_NB1O, activation, position_B1.expand(len(self.linears), -1, -1))
        scale_NB1 = key_scale(rule, self.h_NB1I)
        k_NB1I = self.h_NB1I * scale_NB1[..., None]
        norm_NB1 = scale_NB1 if rule.clip is None else k_NB1I.norm(dim=-1)
        u_NB1O = event_value(rule, rule.value(self.a_NB1O, activation(self.a_NB1O), at), norm_NB1)
        if not whole:
            u_NB1O = u_NB1O.masked_fill(~write_B1[..., None], 0)
        bias_NB1 = scale_NB1 if rule.bias else [None] * len(self.linears)
        each = zip(self.linears, u_NB1O, k_NB1I, bias_NB1, strict=True)
        return {linear.site: Events(u, k, bias, write_B1, whole) for linear, u, k, bias in each}


class Stacks:
    """The buffers of one episode's plastic linears, and the records that tell C of them."""

    def __init__(self, linears: Mapping[Site, PlasticLinear], rows: int):
        self.linears, self.rows = linears, rows
        groups: dict[tuple, list[PlasticLinear]] = {}
        for linear in linears.values():
            key = (id(linear.rule), linear.activation.name, linear.out_features, linear.in_features)
            groups.setdefault(key, []).append(linear)
        self.stacks, self.records = [], {}
        for group in groups.values():
            sizes = (group[0].in_features, group[0].out_features, group[0].out_features)
            buffers = [torch.empty(len(group), rows, 1, size) for size in sizes]
            self.stacks.append(Stack(group, *buffers))
            for n, linear in enumerate(group):
                h, frozen, a = (buffer[n].data_ptr() for buffer in buffers)
                self.records[linear.site] = Fast(h=h, frozen=frozen, a=a)
        self.scratch = torch.empty(0)
        self.weights: dict[tuple, Tensor] = {}  # alive while C reads them

    def take(self, now: Pass) -> bool:
        """Whether C can read these logs, and this pass's rules can work on what it leaves."""
        if now.weights is not None or any(log.dtype != torch.float32 for log in now.logs.values()):
            return False
        for linear in self.linears.values():
            target = getattr(linear.rule, "target", None)
            each_row = isinstance(target, Tensor) and target.dim() == 3  # the stack has no rows of its own to give it
            if linear.backend != "torch" or (now.write_BT is not None and (each_row or not linear.rule.neuron_local)):
                return False
        return True

    def read(self, now: Pass) -> dict[Site, Fast]:
        """What C is to read, and where to leave what the rules need."""
        most = max((log.used for log in now.logs.values()), default=0)
        if self.scratch.numel() < 3 * self.rows * most:
            self.scratch = torch.empty(3, self.rows * most)
        self.weights = {}
        records = {}
        for (layer, name), log in now.logs.items():
            if log.used or now.write_BT is not None:
                records[layer, name] = self._record((layer, name), log)
        return records

    def _record(self, site: Site, log: EventLog) -> Fast:
        record, lane = self.records[site], ("gate_proj", "up_proj", "down_proj").index(site[1])
        record.n, record.R = log.used, log.capacity
        record.U, record.K = log.U_BRO.data_ptr(), log.K_BRI.data_ptr()
        record.bias = log.bias_BR.data_ptr() if self.linears[site].rule.bias else None
        record.c = self.scratch.data_ptr() + lane * self.scratch.stride(0) * 4
        record.w = None
        if record.n and not log.plain(1):
            key = (log.slots, log.decay, tuple(log.events))  # what the weights are a function of
            if key not in self.weights:
                self.weights[key] = log.weights(log.now())[:, 0].contiguous()
            record.w = self.weights[key].data_ptr()
        return record

    def events(self, now: Pass, position_B1: Tensor) -> dict[Site, Events]:
        """The event of every linear, when the token is written."""
        if now.write_BT is None:
            return {}
        stacked: dict[Site, Events] = {}
        for stack in self.stacks:
            stacked |= stack.events(position_B1, now.write_BT, now.whole)
        return stacked
