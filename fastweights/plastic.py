"""PlasticLinear: a frozen linear plus the fast weights of whichever episode is running; attach and detach."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .kernels.linear import linear
from .kernels.read import read
from .kernels.scan import Gram, Known, before, scan
from .kernels.step import Factors, Frozen, StepInputs, StepLinear, StepRule, step_, step_gated_
from .model import Llama
from .options import backend_of, budget_of, check_target, factor_dtype_of
from .passes import Binding, Keys, Pass, Site, Turn
from .rules import (
    IDENTITY,
    SILU,
    Activation,
    Local,
    Rule,
    check_rule,
    event_value,
    key_scale,
    target_at,
    twin_event,
    twin_of,
    value_of,
)
from .state import OVERFLOW, EventLog
from .state.budget import Budget
from .state.events import Events, as_rows, side_by_side
from .watch import touched

if TYPE_CHECKING:
    from .episode import Episode

ACTIVATIONS = {"gate_proj": SILU, "up_proj": IDENTITY, "down_proj": IDENTITY}


class PlasticLinear(nn.Module):
    """Stands in for an nn.Linear of the MLP: y = W h + b + ΔW h (+ Δb) while an episode runs, W h + b otherwise.

    It registers the frozen linear's own parameters under their own names, so the model's state dict is
    that of the frozen model and `base` can be put back as the same object.
    """

    def __init__(
        self,
        base: nn.Linear,
        site: Site,
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
        self.site, self.rank, self.overflow = site, rank, overflow
        self.backend, self.archive = backend, archive
        self.budget, self.factor_dtype = budget, factor_dtype
        self.activation: Activation = ACTIVATIONS[site[1]]
        self.rule = rule
        self.binding = binding

    base: nn.Linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rule={self.rule}, rank={self.rank}"

    @property
    def rule(self) -> Rule:
        return self._rule

    @rule.setter
    def rule(self, rule: Rule) -> None:
        self._rule, twin = rule, twin_of(rule)
        # made here, because a compiled step must not look at the rate: that may change from token to token
        self._step_rule = twin and StepRule(twin.name, self.activation.name, rule.mu, rule.clip, _event)

    @property
    def name(self) -> str:
        return f"layers.{self.site[0]}.mlp.{self.site[1]}"

    @property
    def plain(self) -> bool:
        """Whether it gives W h + b at the moment: no episode runs."""
        return self.binding.now is None

    def new_log(self, rows: int) -> EventLog:
        size, policy = (rows, self.out_features, self.in_features, self.rank), (self.overflow, self.rule.decay)
        place = (self.factor_dtype, self.weight.device)
        return EventLog(self.name, *size, *policy, *place, self.archive, self.budget)

    def forward(self, h_BTI: Tensor) -> Tensor:
        now = self.binding.now
        if now is None:
            return linear(h_BTI, self.weight, self.bias)
        log = now.logs[self.site]
        if self.site in now.turns:
            return self._step(now.turns[self.site], log, h_BTI, now.position_BT)
        writes = now.write_BT is not None and self.rule.neuron_local
        frozen_BTO = linear(h_BTI, self.weight, self.bias)
        if log.used == 0 and now.write_BT is None:
            return frozen_BTO
        # The fast read is added, and the rule applied, in the log's precision; only the sum is cast back.
        if writes:
            return self._write(now, log, frozen_BTO.to(log.dtype), h_BTI).to(frozen_BTO.dtype)
        a_BTO = frozen_BTO.to(log.dtype)
        if now.weights is not None:
            a_BTO = a_BTO + self._read_moments(now.weights[self.site], log, h_BTI.to(log.dtype))
        elif log.used:
            a_BTO = a_BTO + self._read(log, h_BTI.to(log.dtype), None)
        if now.write_BT is not None:  # a gradient rule: its event is made when the next token is known
            if not a_BTO.requires_grad:
                a_BTO = a_BTO.detach().requires_grad_()
            now.taped[self.site] = (a_BTO, h_BTI.detach().to(log.dtype))
        return a_BTO.to(frozen_BTO.dtype)

    def _read(self, log: EventLog, h_BTI: Tensor, write_BT: Tensor | None, width: int = 1) -> Tensor:
        """ΔW h (+ Δb) of the log's events, as they weigh while tokens write more."""
        U_BRO, K_BRI, bias_BR = log.factors()
        if h_BTI.requires_grad:  # a graph must not hold buffers that later events are written into
            U_BRO, K_BRI = U_BRO.clone(), K_BRI.clone()
        w_BTR = None
        if not log.all_alive(h_BTI.shape[1]):
            events_BT = log.now()
            if write_BT is not None and h_BTI.shape[1] > 1:
                events_BT = events_BT + before(write_BT, width)
            w_BTR = log.slot_weights(events_BT)
        return read(h_BTI, U_BRO, K_BRI, bias_BR if self.rule.bias else None, w_BTR, self.backend)

    def _read_moments(self, w_EMR: Tensor, log: EventLog, h_BTI: Tensor) -> Tensor:
        """Rows that share one episode row's factors and differ in w; they stand E apart."""
        U_ERO, K_ERI, bias_ER, _ = (factor.to(h_BTI.device) for factor in log.moment_factors())
        rows = len(w_EMR)
        y_BTO = h_BTI.new_empty(*h_BTI.shape[:2], self.out_features)
        for row in range(rows):
            one, bias = slice(row, row + 1), bias_ER[row : row + 1] if self.rule.bias else None
            w_MR = w_EMR[row][:, None].to(h_BTI.device)
            y_BTO[row::rows] = read(h_BTI[row::rows], U_ERO[one], K_ERI[one], bias, w_MR, self.backend)
        return y_BTO

    def _write(self, now: Pass, log: EventLog, frozen_BTO: Tensor, h_BTI: Tensor) -> Tensor:
        """a of every token, each with the events of the tokens before it; writes the events.

        A log that overflows on the way is read and written from one fold or turn of the ring to the next. Should the
        pass fail later, the episode takes the events back.
        """
        assert now.write_BT is not None
        keys = self._keys(now, h_BTI, log.dtype)
        if now.width > 1:
            frozen_BTO, h_BTI = side_by_side(frozen_BTO), side_by_side(h_BTI)
        h_BTI = h_BTI.to(log.dtype)
        parts = []
        for t0, t1 in [(0, h_BTI.shape[1])] if log.fits(now.counts) else log.segments(now.write_BT, now.width):
            write_BC = now.write_BT[:, t0:t1]
            a_BCO = frozen_BTO[:, t0:t1]
            if log.used:
                a_BCO = a_BCO + self._read(log, h_BTI[:, t0:t1], write_BC, now.width)
            a_BCO, u_BCO = self._solve(now, keys, a_BCO, frozen_BTO.detach(), t0, t1)
            bias_BC = None if keys.bias_BT is None else keys.bias_BT[:, t0:t1]
            log.write(Events(u_BCO, keys.k_BTI[:, t0:t1], bias_BC, write_BC, now.whole))
            parts.append(a_BCO)
        a_BTO = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return a_BTO if now.width == 1 else as_rows(a_BTO, now.width)

    def _solve(
        self, now: Pass, keys: Keys, a_BCO: Tensor, frozen_BTO: Tensor, t0: int, t1: int
    ) -> tuple[Tensor, Tensor]:
        """a and u of tokens t0 to t1, given a without each other's events."""
        assert now.write_BT is not None

        def value(a: Tensor, c0: int, c1: int) -> Tensor:
            here = slice(t0 + c0, t0 + c1)
            row_BT = None if now.row_BT is None else now.row_BT[:, here]
            at = Local(frozen_BTO[:, here], self.activation, now.position_BT[:, here], row_BT)
            return event_value(self.rule, value_of(self.rule, a, self.activation, at), keys.norm_BT[:, here], row_BT)

        if t1 - t0 == now.width:
            # the only token that may carry a graph: gradient rules go token by token
            u_B1O = value(a_BCO.detach(), 0, now.width)
            return a_BCO, u_B1O if now.whole else u_B1O.masked_fill(~now.write_BT[:, t0:t1, None], 0)
        if (t0, t1) not in keys.grams:
            part = slice(t0, t1)
            bias_BC = None if keys.bias_BT is None else keys.bias_BT[:, part]
            h_BTI = keys.h_BTI if now.width == 1 else side_by_side(keys.h_BTI)
            own = (h_BTI[:, part].to(a_BCO.dtype), keys.k_BTI[:, part], bias_BC, now.write_BT[:, part])
            keys.grams[t0, t1] = Gram(*own, self.rule.decay, width=now.width)
        row_BC = None if now.row_BT is None else now.row_BT[:, t0:t1]
        known = self.kernel_form(a_BCO, now.position_BT[:, t0:t1], row_BC)
        if known is not None:
            known = replace(known, norm_BT=keys.norm_BT[:, t0:t1], frozen_BTO=frozen_BTO[:, t0:t1])
        return scan(a_BCO, keys.grams[t0, t1], value, known, self.backend)

    def kernel_form(self, a_BCO: Tensor, position_BC: Tensor, row_BC: Tensor | None) -> Known | None:
        """The rule as the scan's kernels know it; None: they do not."""
        twin, target_BCO = twin_of(self.rule), None
        # in C a rate belongs to a row of the batch, not to a row of a column
        if twin is None or (self.backend == "torch" and row_BC is not None and isinstance(self.rule.rate, tuple)):
            return None
        target = getattr(self.rule, "target", None)
        if isinstance(target, Tensor):
            target_BCO = target_at(target, position_BC, row_BC).to(device=a_BCO.device, dtype=torch.float32)
            target_BCO = target_BCO.expand(a_BCO.shape)
        return Known(twin.name, self.activation.name, twin.rate, twin.gamma, self.rule.clip, target=target_BCO)

    def _step(self, turn: Turn, log: EventLog, h_B1I: Tensor, position_B1: Tensor) -> Tensor:
        """One token by the fused kernels, which write its event into the next slot of the log themselves."""
        assert self._step_rule is not None
        linear = self.step_linear(turn, log, position_B1, len(h_B1I))
        return step_(h_B1I[:, 0], linear, self._step_rule, self.backend)[:, None]

    def gate_and_up(self, up: nn.Module, h_B1I: Tensor) -> Tensor | None:
        """SiLU(this linear) ⊙ up of one token, by one kernel that writes both events; None: call them one by one."""
        now = self.binding.now
        if (
            now is None
            or self.site[0] not in now.pairs
            or type(up) is not PlasticLinear
            or touched(self)
            or touched(up)
        ):
            return None
        assert self._step_rule is not None
        gate, other = (
            linear.step_linear(now.turns[linear.site], now.logs[linear.site], now.position_BT, len(h_B1I))
            for linear in (self, up)
        )
        return step_gated_(h_B1I[:, 0], gate, other, self._step_rule, self.backend)[:, None]

    def step_linear(self, turn: Turn, log: EventLog, position_B1: Tensor, rows: int) -> StepLinear:
        target = turn.target
        if target is not None:
            target = target_at(target, position_B1).expand(rows, 1, -1)[:, 0]
        factors = Factors(log.U_BRO, log.K_BRI, log.bias_BR if self.rule.bias else None, log.birth_BR)
        return StepLinear(Frozen(self.weight, self.bias), factors, turn._replace(target=target))

    def _keys(self, now: Pass, h_BTI: Tensor, dtype: torch.dtype) -> Keys:
        rule, form = self.rule, (self.rule.mu, self.rule.bias, self.rule.decay, self.rule.clip)
        if now.keys is None or now.keys.h_BTI.data_ptr() != h_BTI.data_ptr() or now.keys.form != form:
            h = (h_BTI if now.width == 1 else side_by_side(h_BTI)).detach().to(dtype)
            scale_BT = key_scale(rule, h.square().sum(-1))
            k_BTI, bias_BT = h * scale_BT[..., None], scale_BT if rule.bias else None
            norm_BT = scale_BT if rule.clip is None else k_BTI.norm(dim=-1)  # only a clip looks at it
            now.keys = Keys(h_BTI.detach(), form, k_BTI, bias_BT, norm_BT, {})
        return now.keys


def _event(rule: StepRule, a_BO: Tensor, frozen_BO: Tensor, norm_B: Tensor, inputs: StepInputs) -> Tensor:
    """u of one token by its rule in torch: what a fused step writes."""
    numbers = (inputs.rate, inputs.gamma, inputs.target)
    activation = SILU if rule.activation == "silu" else IDENTITY
    return twin_event(rule.name, activation, rule.clip, a_BO, frozen_BO, norm_B, *numbers)


class FastWeights:
    """The plastic linears of one `attach` call.

    `delta_weight` and the other questions about a state look at the episode given, or else at the one that
    ran last on this model.
    """

    def __init__(self, model: Llama, linears: dict[Site, PlasticLinear]):
        self.model, self.linears = model, linears

    def __repr__(self) -> str:
        return f"FastWeights({', '.join(p.name for p in self.linears.values())})"

    def delta_weight(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> Tensor:
        """ΔW of one linear in one row of an episode (a shared one has one), dense [O, I], float32 or float64."""
        return self._log(layer, linear, episode, row).delta_weight(row)

    def delta_bias(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> Tensor:
        """Δb of one linear in one row of an episode, [O]."""
        return self._log(layer, linear, episode, row).delta_bias(row)

    def error(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> tuple[float, float]:
        """(error_2, error_F): bounds on ‖ΔW_exact − ΔW‖ of one linear, see `EventLog.certificate`."""
        return self._log(layer, linear, episode, row).certificate(row)

    def delta_norm(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> float:
        """‖ΔW‖_F of one linear, from the factors."""
        return self._log(layer, linear, episode, row).delta_norm(row)

    def effective_rank(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> float:
        """exp of the entropy of the normalised singular values of ΔW (Roy & Vetterli 2007)."""
        return self._log(layer, linear, episode, row).effective_rank(row)

    def _log(self, layer: int, linear: str, episode: Episode | None, row: int) -> EventLog:
        if (layer, linear) not in self.linears:
            raise ValueError(
                f"layer {layer} {linear!r} is not plastic here; plastic are "
                f"{', '.join(f'{site[0]} {site[1]}' for site in self.linears)}"
            )
        episode = episode or last_episode(self.model)
        if episode is None:
            raise ValueError("no episode of this model is alive: create fw.Episode(model) first")
        log = episode.logs[layer, linear]
        if not 0 <= row < len(log.event_counts):
            raise ValueError(
                f"row {row} of layers.{layer}.mlp.{linear} does not exist: there are {len(log.event_counts)}"
            )
        return log


_last_episode: weakref.WeakKeyDictionary[Llama, weakref.ref[Episode]] = weakref.WeakKeyDictionary()


def last_ran(model: Llama, episode: Episode) -> None:
    _last_episode[model] = weakref.ref(episode)


def last_episode(model: Llama) -> Episode | None:
    ref = _last_episode.get(model)
    return ref() if ref else None


def plastic_linears(model: Llama) -> dict[Site, PlasticLinear]:
    """Every plastic linear of the model, in the order in which a forward pass meets them."""
    found: dict[Site, PlasticLinear] = {}
    # straight at the registries: this runs before every token, and nn.Module's attribute look-up is slow
    for layer, block in enumerate(model.model.layers._modules.values()):
        linears = block._modules["mlp"]._modules  # type: ignore[union-attr]
        for name in ACTIVATIONS:
            if type(linear := linears[name]) is PlasticLinear:
                found[layer, name] = linear
    return found


@contextlib.contextmanager
def bound(model: Llama, episode: Episode, now: Pass) -> Iterator[None]:
    """Runs the model with these fast weights, and unbinds them whatever happens."""
    bindings = {id(linear.binding): linear.binding for linear in plastic_linears(model).values()}.values()
    last_ran(model, episode)
    try:
        for binding in bindings:
            binding.now = now
        yield
    finally:
        for binding in bindings:
            binding.now = None


def attach(
    model: Llama,
    layers: Sequence[int],
    rule: Rule,
    linears: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    rank: int = 64,
    overflow: str = "compress",
    backend: str = "auto",
    archive: bool = False,
    budget: float | None = None,
    over_budget: str = "scale",
    factor_dtype: torch.dtype | None = None,
) -> FastWeights:
    """Makes MLP linears of some layers plastic; may be called again for other linears with another rule.

    Args:
        layers: layer numbers from 0.
        rule: `Hebbian`, `LocalLeastSquares`, `Delta`, `GradientAscent`, or any object of the `Rule` protocol.
        linears: which of "gate_proj", "up_proj", "down_proj".
        rank: R, events to keep, per linear and sequence.
        overflow: what happens when there are more: "compress", "evict", "grow" or "error", see `state.EventLog`.
        backend: "torch"; "triton": the fused kernels, for float32 and half precision on CUDA; "auto": Triton on
            CUDA where the rule has a Triton twin, torch elsewhere. `PlasticLinear.backend` tells which.
        archive: keep every event on the CPU as well, so that any moment stays exact after an overflow.
        budget: largest ‖ΔW‖_F / ‖W‖_F, per linear and row; None = no limit.
        over_budget: what an event that goes over the budget does: "scale": ΔW (and Δb) is scaled back onto it; "stop":
            its feed is refused.
        factor_dtype: of U and K; None = float32 (float64 for a float64 model). float64 runs on torch.

    Raises:
        ValueError: a layer, linear, rule or option that does not exist, or a linear that is already plastic;
            the model is unchanged then.
    """
    if not isinstance(model, Llama):
        raise ValueError(f"attach() got a {type(model).__name__}, expected the fastweights model that fw.load returns")
    for name, given in (("layers", layers), ("linears", linears)):
        if given is None:
            raise ValueError(f"attach({name}=None) names no linear")
    layers = [int(layers)] if isinstance(layers, Integral) else list(layers)
    linears = [linears] if isinstance(linears, str) else list(linears)
    depth = len(model.model.layers)
    if not layers or not linears:
        raise ValueError(f"attach(layers={layers}, linears={linears}) names no linear")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < depth:
            raise ValueError(f"layer {layer!r} does not exist: this model has layers 0 to {depth - 1}")
    layers = [int(layer) for layer in layers]
    for name in linears:
        if name not in ACTIVATIONS:
            raise ValueError(f"linear {name!r} does not exist: an MLP has {', '.join(ACTIVATIONS)}")
    if isinstance(rule, type) or not isinstance(rule, Rule):
        raise ValueError(f"rule={rule!r} is not a rule: expected an object with rate, mu, decay, clip, bias and value")
    check_rule(rule)
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
        raise ValueError(f"rank={rank!r}: expected a whole number of events, 1 or more")
    rank = int(rank)
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow={overflow!r}: expected one of {', '.join(map(repr, OVERFLOW))}")
    factor_dtype = factor_dtype_of(factor_dtype, model)
    chosen = backend_of(backend, model, rule, factor_dtype)
    sites = sorted({(layer, name) for layer in layers for name in linears})
    for layer, name in sites:
        if isinstance(getattr(model.model.layers[layer].mlp, name), PlasticLinear):
            raise ValueError(f"layers.{layer}.mlp.{name} is already plastic: fw.detach(model) first")
    check_target(model, rule, sites)
    budgets = {site: budget_of(model, site, budget, over_budget) for site in sites}
    binding = next((linear.binding for linear in plastic_linears(model).values()), Binding())
    plastic = {}
    for layer, name in sites:
        site, mlp = (layer, name), model.model.layers[layer].mlp
        options = (rule, rank, overflow, chosen, archive, binding, budgets[site], factor_dtype)
        plastic[site] = PlasticLinear(getattr(mlp, name), site, *options)
        setattr(mlp, name, plastic[site])
    return FastWeights(model, plastic)


def detach(model: Llama) -> None:
    """Puts the original linears back, all of them, as the same objects."""
    for (layer, name), plastic in plastic_linears(model).items():
        setattr(model.model.layers[layer].mlp, name, plastic.base)
