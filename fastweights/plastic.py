"""PlasticLinear: a frozen linear plus the fast weights of whichever episode runs in this thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .activations import Activation
from .binding import Binding
from .episode_state import Address
from .kernels import adjoint, values
from .kernels.gram import Gram, before
from .kernels.linear import linear
from .kernels.read import read
from .kernels.scan import Known, scan
from .model import Llama
from .numbers import NUMBERS, as_float, by_row, check_form, same, tensors_of
from .passes import Pass, SharedKeys
from .rules import Local, Rule, check_rule, event_value, key_of, modulation_of, target_at, twin_of, value_of
from .state import EventLog
from .state.budget import Budget
from .state.events import Events, as_rows, side_by_side
from .watch import touched


class PlasticLinear(nn.Module):
    """Stands in for an nn.Linear of the MLP: y = W h + b + ΔW h (+ Δb) while an episode runs, W h + b otherwise.

    It registers the frozen linear's own parameters under their own names, so the model's state dict is
    that of the frozen model and `base` can be put back as the same object.
    """

    def __init__(
        self,
        base: nn.Linear,
        address: Address,
        role: str,
        activation: Activation,
        rule: Rule,
        rank: int,
        overflow: str,
        backend: str,
        archive: bool,
        binding: Binding,
        budget: Budget | None,
        factor_dtype: torch.dtype,
    ):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        object.__setattr__(self, "base", base)  # not a submodule: its parameters are already registered
        self.address, self.role, self.activation = address, role, activation
        self.rank, self.overflow = rank, overflow
        self.backend, self.archive = backend, archive
        self.budget, self.factor_dtype = budget, factor_dtype
        self.rule = rule
        self.binding = binding
        self.adapter: Events | None = None  # [1, events] float64: what ΔW of every new log begins with, see `initial`

    base: nn.Linear
    rule: Rule
    learned: bool  # the rule has numbers that are tensors

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "rule":  # one that is a module is no part of the model: its parameters are not among the model's
            object.__setattr__(self, name, value)
            self.learned = bool(tensors_of(value))
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rule={self.rule}, rank={self.rank}"

    @property
    def name(self) -> str:
        return f"layers.{self.address[0]}.mlp.{self.address[1]}"

    def new_log(self, rows: int) -> EventLog:
        size, policy = (
            (rows, self.out_features, self.in_features, self.rank),
            (self.overflow, as_float(self.rule.decay)),
        )
        place = (self.factor_dtype, self.weight.device)
        return EventLog(self.name, *size, *policy, *place, self.archive, self.budget)

    def initial(self, events: int) -> Events:
        """The adapter as the first `events` [1, events] of a log; zeros stand before it where it has fewer.

        Decay loses a share of ΔW at each of them, so the values are as much larger: their sum is the adapter.
        """
        U, K, bias = (
            torch.zeros(1, events, *width, dtype=torch.float64, device="cpu")
            for width in ((self.out_features,), (self.in_features,), ())
        )
        if self.adapter is not None:
            count = self.adapter.write_BT.shape[1]
            age_T1 = torch.arange(count - 1, -1, -1, dtype=torch.float64, device="cpu")[:, None]
            left_T1 = (1 - as_float(self.rule.decay)) ** age_T1
            U[:, -count:], K[:, -count:] = self.adapter.U_BTO / left_T1, self.adapter.K_BTI
            bias[:, -count:] = 0 if self.adapter.bias_BT is None else self.adapter.bias_BT
        U, K, bias = (factor.to(self.weight.device, self.factor_dtype) for factor in (U, K, bias))
        every = torch.ones(1, events, dtype=torch.bool, device="cpu")
        return Events(U, K, bias if self.rule.bias else None, every, all_written=True)

    def check_rows(self, rows: int, shared: bool) -> None:
        """Refuses numbers that are not one per row of an episode, and what a shared ΔW cannot have."""
        if shared and rows > 1 and self.budget is not None:
            raise ValueError(
                f"{self.name} has a budget, which is kept event by event, but the rows of a shared episode write "
                "side by side: expected shared=False or a linear without a budget"
            )
        rate, rule = self.rule.rate, type(self.rule).__name__
        for number in NUMBERS:
            if (given := getattr(self.rule, number, None)) is not None:
                check_form(f"{self.name}: {rule}", number, given, rows, self.out_features)
        if isinstance(rate, tuple) and shared and self.backend == "triton":
            raise ValueError(
                f"{self.name}: {rule} has a rate per row, which a shared episode cannot run on backend='triton': "
                "attach with backend='torch'"
            )

    def renew(self, log: EventLog) -> None:
        """Looks at the rule's numbers that are tensors once more: whoever learns them has changed them in place.

        Raises:
            ValueError: one makes no sense any more, or events were written under another decay.
        """
        check_rule(self.rule)
        decay = as_float(self.rule.decay)
        if decay != log.decay and max(log.event_counts):
            raise ValueError(
                f"{self.name}: the rule's decay is {decay:g} now, but the {max(log.event_counts)} events of this "
                f"episode decay by {log.decay:g}: expected the same until reset() (with an adapter, in a new episode)"
            )
        for part in log.parts:
            part.decay = decay

    def forward(self, h_BTI: Tensor) -> Tensor:
        now = self.binding.now
        if now is None:
            return linear(h_BTI, self.weight, self.bias)
        log = now.logs[self.address]
        if self.address in now.reads:
            frozen_BTO = linear(h_BTI, self.weight, self.bias)
            U_BRO, K_BRI, bias_BR, w_BTR = now.reads[self.address]
            fast_BTO = read(h_BTI.to(log.dtype), U_BRO, K_BRI, bias_BR, w_BTR, self.backend)
            return (frozen_BTO.to(log.dtype) + fast_BTO).to(frozen_BTO.dtype)
        writes = now.write_BT is not None and self.rule.neuron_local
        frozen_BTO = linear(h_BTI, self.weight, self.bias)
        if log.used == 0 and now.write_BT is None and self.binding.tap is None:
            return frozen_BTO
        # The fast read is added, and the rule applied, in the log's precision; only the sum is cast back.
        if writes:
            return self._write(now, log, frozen_BTO, h_BTI)
        a_BTO = frozen_BTO.to(log.dtype)
        read_BTO = None
        if now.slot_weights is not None:
            read_BTO = self._read_moments(now.slot_weights[self.address], log, h_BTI)
        else:
            read_BTO = self._read(now, log, h_BTI, None)
        if self.binding.tap is not None:
            read_BTO = self._tapped("read", read_BTO, a_BTO, 1)
        if read_BTO is not None:
            a_BTO = a_BTO + read_BTO
        if now.taped is not None:  # a gradient rule: its event is made when the next token is known
            if not a_BTO.requires_grad:
                a_BTO = a_BTO.detach().requires_grad_()
            now.taped[self.address] = (a_BTO, h_BTI.detach().to(log.dtype))
        return a_BTO.to(frozen_BTO.dtype)

    def _tapped(self, part: str, x: Tensor | None, like: Tensor, width: int) -> Any:
        """ "read", "key" or "value" after edits and captures that name it; x is None where nothing is read yet.

        A fused linear gives gate and up side by side, and writes both with one key.

        width: how many rows' tokens stand side by side in x.
        """
        tap, layer = self.binding.tap, self.address[0]
        sites = [f"{name}.{part}" for name in self.role.removesuffix("_proj").split("_")]
        if not tap.wants(*sites, layer=layer):
            return x
        x = torch.zeros_like(like) if x is None else x
        x = x if width == 1 else as_rows(x, width)
        if part == "key":
            for site in sites:
                x = tap(site, layer, x)
        else:
            halves = [tap(site, layer, half) for site, half in zip(sites, x.chunk(len(sites), -1), strict=True)]
            x = halves[0] if len(halves) == 1 else torch.cat(halves, -1)
        return x if width == 1 else side_by_side(x)

    def _read(self, now: Pass, log: EventLog, h_BTI: Tensor, write_BT: Tensor | None, width: int = 1) -> Tensor | None:
        """ΔW h (+ Δb) of the log's events, as they weigh while tokens write more; None: there are none.

        write [B, T] is on the CPU.
        """
        if now.carried is not None:
            h = h_BTI.to(log.dtype)
            return now.carried[self.address].read(h, write_BT, self.rule.decay, self.rule.bias, width)
        if not log.used:
            return None
        U_BRO, K_BRI, bias_BR = log.factors()
        if h_BTI.requires_grad:  # a graph must not hold buffers that later events are written into
            U_BRO, K_BRI = U_BRO.clone(), K_BRI.clone()
        w_BTR = None
        if not log.all_alive(h_BTI.shape[1]):
            events_BT = torch.tensor(log.event_counts, device="cpu")[:, None]
            if write_BT is not None and h_BTI.shape[1] > 1:
                events_BT = events_BT + before(write_BT, width)
            w_BTR = log.slot_weights(events_BT)
        return read(h_BTI, U_BRO, K_BRI, bias_BR if self.rule.bias else None, w_BTR, self.backend)

    def _read_moments(self, w_EMR: Tensor, log: EventLog, h_BTI: Tensor) -> Tensor:
        """Rows that share one episode row's factors and differ in w; they stand E apart."""
        U_ERO, K_ERI, bias_ER, _ = (factor.to(h_BTI.device) for factor in log.moment_factors())
        rows = len(w_EMR)
        y_BTO = U_ERO.new_empty(*h_BTI.shape[:2], self.out_features)
        for row in range(rows):
            one, bias = slice(row, row + 1), bias_ER[row : row + 1] if self.rule.bias else None
            w_MR = w_EMR[row][:, None].to(h_BTI.device)
            y_BTO[row::rows] = read(h_BTI[row::rows], U_ERO[one], K_ERI[one], bias, w_MR, self.backend)
        return y_BTO

    def _write(self, now: Pass, log: EventLog, frozen_BTO: Tensor, h_BTI: Tensor) -> Tensor:
        """a of every token, each with the events of the tokens before it, in frozen's dtype; writes the events.

        If the log overflows inside this prompt, the prompt is processed in segments that end at each fold (or before
        the ring wraps).
        """
        assert now.write_BT is not None
        assert now.write_events is not None
        keys, dtype, width = self._keys(now, h_BTI, log.dtype), frozen_BTO.dtype, now.rows_per_column
        if width > 1:
            frozen_BTO, h_BTI = side_by_side(frozen_BTO), side_by_side(h_BTI)
        graph = now.carried is not None
        if self.backend == "torch" or self.binding.tap is not None or graph:  # a kernel casts what it loads
            frozen_BTO = frozen_BTO.to(log.dtype)
        parts = []
        whole = [(0, h_BTI.shape[1])]
        for t0, t1 in whole if log.fits(now.counts) else log.segments(now.write_BT, width):
            write_BC = now.write_BT[:, t0:t1]
            a_BCO = frozen_BTO[:, t0:t1]
            read_BCO = self._read(now, log, h_BTI[:, t0:t1], write_BC, width)
            k_BCI = keys.k_BTI[:, t0:t1]
            if self.binding.tap is not None:  # a feed whose edits name reading or writing goes token by token
                read_BCO = self._tapped("read", read_BCO, a_BCO, width)
            if read_BCO is not None:
                a_BCO = a_BCO + read_BCO
            a_BCO, u_BCO = self._solve(now, keys, a_BCO, frozen_BTO if graph else frozen_BTO.detach(), t0, t1)
            if self.binding.tap is not None:
                event = (("key", k_BCI), ("value", u_BCO))
                k_BCI, u_BCO = (self._tapped(part, x, x, width) for part, x in event)
            bias_BC = None if keys.bias_BT is None else keys.bias_BT[:, t0:t1]
            events = Events(u_BCO, k_BCI, bias_BC, write_BC, now.all_written)
            now.write_events(self.address, events.detached() if graph else events)
            if now.carried is not None:
                now.carried[self.address] = now.carried[self.address].joined(u_BCO, k_BCI, bias_BC, write_BC)
            parts.append(a_BCO.to(dtype))
        a_BTO = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return a_BTO if width == 1 else as_rows(a_BTO, width)

    def _solve(
        self, now: Pass, keys: SharedKeys, a_BCO: Tensor, frozen_BTO: Tensor, t0: int, t1: int
    ) -> tuple[Tensor, Tensor]:
        """a and u of tokens t0 to t1, given a without each other's events."""
        assert now.write_BT is not None
        dtype, graph = keys.k_BTI.dtype, now.carried is not None

        def value(a: Tensor, c0: int, c1: int) -> Tensor:
            here = slice(t0 + c0, t0 + c1)
            row_BT = None if now.row_BT is None else now.row_BT[:, here]
            at = Local(frozen_BTO[:, here].to(dtype), self.activation, now.position_BT[:, here], row_BT)
            norm_BC = None if keys.norm_BT is None else keys.norm_BT[:, here]
            return event_value(self.rule, value_of(self.rule, a, self.activation, at), norm_BC, row_BT)

        if t1 - t0 == now.rows_per_column:
            # a token of a gradient rule has a graph as well, which is not that of its event
            u_B1O = value((a_BCO if graph else a_BCO.detach()).to(dtype), 0, now.rows_per_column)
            if not now.all_written:
                write_B1 = now.write_BT[:, t0:t1, None].to(u_B1O.device, non_blocking=True)
                u_B1O = u_B1O.masked_fill(~write_B1, 0)
            return a_BCO, u_B1O
        part = slice(t0, t1)
        if not graph and (t0, t1) not in keys.grams:
            h_BTI = keys.h_BTI if now.rows_per_column == 1 else side_by_side(keys.h_BTI)
            own = (h_BTI[:, part], keys.scale_BT[:, part], self.rule.bias, now.write_BT[:, part])
            keys.grams[t0, t1] = Gram(*own, as_float(self.rule.decay), width=now.rows_per_column)
        known = self.kernel_form(now, a_BCO, part)
        if known is not None:
            norm_BC = None if keys.norm_BT is None else keys.norm_BT[:, part]
            known = replace(known, norm_BT=norm_BC, frozen_BTO=frozen_BTO[:, part])
        if not graph:
            return scan(a_BCO, keys.grams[t0, t1], value, known, self.backend)
        h_BTI, width = keys.h_BTI.to(dtype), now.rows_per_column
        h_BTI = h_BTI if width == 1 else side_by_side(h_BTI)
        if not keys.graph_BTT:
            of = (h_BTI, keys.k_BTI, keys.bias_BT, now.write_BT, self.rule.decay, width)
            keys.graph_BTT.append(adjoint.gram(*of))
        # kernels have no graph; what they are given besides a is looked at through `value` on the way back
        return adjoint.scan_with_graph(a_BCO, keys.graph_BTT[0], h_BTI, now.write_BT, value, known, self.backend)

    def kernel_form(self, now: Pass, a_BCO: Tensor, part: slice) -> Known | None:
        """The rule as the scan's kernels know it, for these tokens; None: they do not."""
        twin, target_BCO = twin_of(self.rule, learned=True), None
        if twin is None or self.activation.name not in values.ACTIVATIONS:
            return None
        # in C a rate belongs to a row of the batch, not to a row of a column
        if self.backend == "torch" and now.row_BT is not None and (by_row(twin.rate) or by_row(twin.gamma)):
            return None
        target = getattr(self.rule, "target", None)
        if isinstance(target, Tensor):
            # positions are looked up where the target lies: nothing waits for the device
            there = now if target.device == a_BCO.device or now.on_cpu is None else now.on_cpu
            row_BC = None if there.row_BT is None else there.row_BT[:, part]
            target_BCO = target_at(target, there.position_BT[:, part], row_BC)
            target_BCO = target_BCO.to(a_BCO.device, torch.float32, non_blocking=True).expand(a_BCO.shape)
        clip = None if self.rule.clip is None else as_float(self.rule.clip)
        return Known(twin.name, self.activation.name, twin.rate, twin.gamma, clip, target=target_BCO)

    def _keys(self, now: Pass, h_BTI: Tensor, dtype: torch.dtype) -> SharedKeys:
        """The keys of this input: those of the linear before if it read the same, and nobody could edit it since."""
        rule, shared = self.rule, now.keys
        weighs = None if modulation_of(rule) is None else id(rule)
        form = (rule.mu, rule.bias, rule.decay, rule.clip, weighs)
        version = 0 if h_BTI.is_inference() else h_BTI._version
        if (
            shared is not None
            and (shared.h_BTI.data_ptr(), shared.version) == (h_BTI.data_ptr(), version)
            and all(map(same, shared.form, form))
            and not touched(self)
        ):
            return shared
        if now.carried is None:
            h_BTI = h_BTI.detach()
        h = (h_BTI if now.rows_per_column == 1 else side_by_side(h_BTI)).to(dtype)
        key = key_of(rule, h.square().sum(-1), h)
        bias_BT = key.scale if rule.bias else None
        k_BTI = h * key.scale[..., None]
        now.keys = SharedKeys(h_BTI, version, form, k_BTI, key.scale, bias_BT, key.norm, {}, [])
        return now.keys


def plastic_linears(model: Llama) -> dict[Address, PlasticLinear]:
    """Every plastic linear of the model, in the order in which a forward pass meets them."""
    found: dict[Address, PlasticLinear] = {}
    mlp, names = model.names["mlp"], model.config.family.linears
    # straight at the registries: this runs before every token, and nn.Module's attribute look-up is slow
    for layer, block in enumerate(model.model.layers._modules.values()):
        linears = block._modules[mlp]._modules
        for name in names:
            if type(linear := linears.get(name)) is PlasticLinear:  # an MLP of one's own may have others
                found[layer, name] = linear
    return found


def new_logs(linears: Mapping[Address, PlasticLinear], rows: int) -> dict[Address, EventLog]:
    """An empty log for each linear; where one has an adapter, all begin with as many events as the largest of them.

    So event n is the same moment in every linear.
    """
    logs = {address: linear.new_log(rows) for address, linear in linears.items()}
    first = max(
        (linear.adapter.write_BT.shape[1] for linear in linears.values() if linear.adapter is not None), default=0
    )
    for address, log in logs.items() if first else ():
        log.begin(linears[address].initial(first))
    return logs


def weight_norm(linear: nn.Linear | PlasticLinear) -> float:
    """‖W‖_F, summed in float64."""
    return float(torch.linalg.vector_norm(linear.weight.detach(), dtype=torch.float64))
