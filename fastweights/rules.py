"""The learning rules, as pure functions: the definition of what one token writes.

For one linear `a = W h + b + ΔW h`, `z = φ(a)`, a written token makes one event:

    key    k   = m h / (‖h‖² + mu)                           m = 1, or the rule's modulation(h)
    value  u   = rate · value(a, z)
           u_i ← u_i · min(1, clip / (|u_i| ‖k‖))            with clip
    write  ΔW  ← (1 − decay) ΔW + u kᵀ
           Δb  ← (1 − decay) Δb + u m / (‖h‖² + mu)           with bias=True

`rate` is one number, or one per row of the episode: a sweep of rates in one batch. Numbers may also be tensors, which
may ask for gradients: any of them of shape [], and `rate`, `gamma` and `beta` one per row [rows] or per neuron, [1, O]
or [rows, O].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from .activations import GATES, Activation, gated, slow_value
from .learned import load as load
from .numbers import NUMBERS, Number, Twin, as_float, check_number, nonzero, plain, spread, tensors_of


@dataclass(frozen=True)
class Local:
    """What a rule may look at besides a and z: everything that belongs to the same neuron and token."""

    frozen_a: Tensor  # W h + b, like a: [..., O]
    activation: Activation
    position: Tensor  # absolute position of the token in its row: a without its last dimension
    row: Tensor | None = None  # the token's row in the episode, like position; None: the first dimension is the row


@runtime_checkable
class Rule(Protocol):
    """The protocol of a rule; any object with these attributes is one.

    `value(a, z, at)` returns a tensor [..., O] like a. It is pure: the same arguments give the same values, nothing
    else changes, and it is called any number of times, with any number of tokens and linears in the leading
    dimensions. `neuron_local` promises that entry i of it depends on entry i of its arguments alone; such rules run
    over a whole prompt in one pass, which calls `value` again until nothing changes. Neither can be checked: a rule
    that breaks them gives wrong numbers. `mu` None means the key is h itself. `rate` is a number, a tuple of one per
    row of the episode, or a tensor, see `numbers.Number`; `mu`, `decay` and `clip` may be tensors []. A rule that the
    kernels know also has `twin`, a `Twin`; they run it instead of `value`, Triton's wherever they run and the one in C
    for a prompt in float32 on a CPU. A rule may be an nn.Module: in `feed(graph=True)` gradients reach its parameters.

    One more attribute is optional: `modulation(h)`, [..., I] → [...], weighs the event of each token by what its linear
    reads: k = modulation(h) · h / (‖h‖² + mu). None: 1; gradient rules have none.
    """

    @property
    def rate(self) -> Number: ...
    @property
    def mu(self) -> float | Tensor | None: ...
    @property
    def decay(self) -> float | Tensor: ...
    @property
    def clip(self) -> float | Tensor | None: ...
    @property
    def bias(self) -> bool: ...
    @property
    def neuron_local(self) -> bool: ...

    def value(self, a: Tensor, z: Tensor, at: Local) -> Tensor: ...


class PerLinear(Protocol):
    """A rule for each linear, see `Learned`."""

    def for_linear(self, layer: int, name: str, in_features: int, out_features: int) -> Rule: ...


def twin_of(rule: Rule, learned: bool = False) -> Twin | None:
    """How the kernels know this rule; None: they do not, and it runs on torch.

    None as well for a subclass that overrides `value`: the kernels of its base class would compute something else. And
    for a rule with a number that is a tensor: whoever learns it changes it in place, and kernels keep what they read.

    learned: for a kernel that reads the numbers anew, which may then be tensors.
    """
    if not learned and tensors_of(rule):
        return None
    places = [getattr(rule, "__dict__", {}), *map(vars, type(rule).__mro__)]
    known = next(("twin" in names for names in places if "twin" in names or "value" in names), False)
    return getattr(rule, "twin", None) if known else None


def _times(rate: Number, factor: Number) -> Number:
    """Of tensors, [rows] times [1, O] or [rows, O] is one number per row and neuron."""
    if isinstance(rate, Tensor) or isinstance(factor, Tensor):
        first, second = (torch.as_tensor(x).detach() for x in (rate, factor))
        device = max((first, second), key=Tensor.dim).device
        wide = max(first.dim(), second.dim()) == 2
        first, second = (x[:, None] if wide and x.dim() == 1 else x for x in (first.to(device), second.to(device)))
        return first * second
    one = cast(float, factor)
    return tuple(r * one for r in rate) if isinstance(rate, tuple) else cast(float, rate) * one


def _check(rule: Rule) -> None:
    """`check_rule` of one of the rules below, whose numbers may also be given as lists, arrays or any tensors."""
    for name in NUMBERS:
        if hasattr(rule, name):
            object.__setattr__(rule, name, plain(name, getattr(rule, name)))  # the rules are frozen
    check_rule(rule)


def check_rule(rule: Rule) -> None:
    """Refuses a rule whose numbers make no sense."""
    name = type(rule).__name__
    for key in NUMBERS:
        number = getattr(rule, key, 0.0)
        if number is not None or key not in ("mu", "clip"):
            check_number(name, key, number)
    for key in ("mu", "decay", "clip"):
        check_range(name, key, getattr(rule, key))
    if not isinstance(rule.bias, bool):
        raise ValueError(f"{name}(bias={rule.bias!r}): expected True or False")
    if modulation_of(rule) is not None and not rule.neuron_local:
        raise ValueError(f"{name} is a gradient rule with a modulation: expected a neuron-local one")


def check_range(rule: str, key: str, number: float | Tensor | None) -> None:
    """Refuses a mu, decay or clip outside of its range."""
    if number is None:
        return
    value = as_float(number)
    if key == "mu" and value < 0:
        raise ValueError(f"{rule}(mu={value!r}): expected a number >= 0")
    if key == "decay" and not 0 <= value <= 1:
        raise ValueError(f"{rule}(decay={value!r}): expected a number from 0 to 1")
    if key == "clip" and value <= 0:
        raise ValueError(f"{rule}(clip={value!r}): expected a number > 0")


def _choice(rule: Rule, key: str, choices: tuple[str, ...]) -> None:
    if getattr(rule, key) not in choices:
        raise ValueError(f"{type(rule).__name__}({key}={getattr(rule, key)!r}): expected one of {choices}")


@dataclass(frozen=True)
class Hebbian:
    """Amplify what just fired: value = m ⊙ z (seed rule A; normalised outer product).

    Args:
        rate: η, dimensionless; or one per row of the episode.
        mu: added to ‖h‖²; > 0 keeps the key of a vanishing input finite.
        gate: m: "ones", "positive" = 1[z > 0], "derivative" = φ′(a).
        decay: share of ΔW lost at each event, 0 to 1 (the anchor −λ(W − W₀)).
        clip: largest norm of one row of one event's u kᵀ.
        bias: also change the bias.
    """

    rate: Number = 0.01
    mu: float | Tensor = 1e-6
    gate: str = "ones"
    decay: float | Tensor = 0.0
    clip: float | Tensor | None = None
    bias: bool = False
    neuron_local = True

    def __post_init__(self) -> None:
        _check(self)
        _choice(self, "gate", GATES)

    @property
    def twin(self) -> Twin:
        return Twin(self.gate, self.rate)

    def value(self, a: Tensor, z: Tensor, at: Local) -> Tensor:
        return gated(a, z, at.activation, self.gate)


@dataclass(frozen=True)
class LocalLeastSquares:
    """Ridge regression of a towards a* (seed rule B): value = a* − a.

    target="self": a* = a + γ (m ⊙ z), so value = γ (m ⊙ z): Hebbian with rate γ.
    target="slow": a* = a₀ + γ (m₀ ⊙ z₀) with a₀ = W h + b and m₀, z₀ from it: a repeated input converges
    to the amplified response of the frozen weights instead of growing by 1 + γ each time.
    """

    gamma: Number = 0.01
    mu: float | Tensor = 1e-6
    gate: str = "ones"
    target: str = "self"
    decay: float | Tensor = 0.0
    clip: float | Tensor | None = None
    bias: bool = False
    rate: Number = 1.0
    neuron_local = True

    def __post_init__(self) -> None:
        _check(self)
        _choice(self, "gate", GATES)
        _choice(self, "target", ("self", "slow"))

    @property
    def twin(self) -> Twin:
        if self.target == "self":
            return Twin(self.gate, _times(self.rate, self.gamma))
        return Twin(f"slow_{self.gate}", self.rate, self.gamma)

    def value(self, a: Tensor, z: Tensor, at: Local) -> Tensor:
        gamma = spread(self.gamma, a, at.row)
        if self.target == "self":
            return gamma * gated(a, z, at.activation, self.gate)
        return slow_value(a, at.frozen_a, gamma, at.activation, self.gate)


@dataclass(frozen=True, eq=False)
class Delta:
    """Move a towards a given v*: value = β (v* − a) (Widrow & Hoff 1960; Schlag et al. 2021, arXiv 2102.11174).

    Args:
        target: v*, [O], or [P, O] indexed by absolute position, or [B, P, O] with a row per sequence.
    """

    beta: Number
    target: Tensor
    mu: float | Tensor = 1e-6
    decay: float | Tensor = 0.0
    clip: float | Tensor | None = None
    bias: bool = False
    rate: Number = 1.0
    neuron_local = True

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.target, Tensor) or not 1 <= self.target.dim() <= 3:
            raise ValueError(f"Delta(target={type(self.target).__name__}): expected a tensor [O], [P, O] or [B, P, O]")

    @property
    def twin(self) -> Twin:
        return Twin("delta", _times(self.rate, self.beta))

    def value(self, a: Tensor, z: Tensor, at: Local) -> Tensor:
        target = target_at(self.target, at.position, at.row).to(device=a.device, dtype=a.dtype)
        return spread(self.beta, a, at.row) * (target - a)


@dataclass(frozen=True)
class GradientAscent:
    """Raise log p(next token): value = ∂ log p / ∂a, earlier keys and values held constant; k = h.

    One event is exactly one step of gradient ascent on the dense weight: ∂ log p / ∂W = (∂ log p / ∂a) hᵀ.
    Its event is written when the next token is known, before that token is processed.

    Args:
        rate: η, or one per row of the episode.
        mu: None: k = h, plain gradient ascent; a number: k = h / (‖h‖² + mu).
    """

    rate: Number = 0.01
    mu: float | Tensor | None = None
    decay: float | Tensor = 0.0
    clip: float | Tensor | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def neuron_local(self) -> bool:
        # the event is zero whatever the next token: nothing to wait for
        return not nonzero(self.rate)

    def value(self, a: Tensor, z: Tensor, at: Local) -> Tensor:
        return torch.zeros_like(a)


@dataclass(frozen=True)
class ContextPatch:
    """Writes nothing by itself: what it reads are the events of `context_patch`, which makes linears plastic by it.

    Where every plastic linear has this rule, no feed writes, whatever `update` says. Beside other rules it refuses to
    be written.
    """

    rate = 0.0
    mu = None
    decay = 0.0
    clip = None
    bias = False
    neuron_local = True

    def value(self, a: Tensor, z: Tensor, at: Local) -> Tensor:
        raise ValueError(
            "ContextPatch writes nothing by itself, and this feed writes: expected update='none', or no other rules"
        )


def target_at(target: Tensor, position: Tensor, row: Tensor | None = None) -> Tensor:
    """v* of tokens at `position` [..., T]: target [O], [P, O] or [B, P, O] → something that broadcasts to [..., T, O].

    `row` as in `Local`. Positions past P take the last one: they are padding or not written.
    """
    if target.dim() == 1:
        return target
    position = position.clamp(max=target.shape[-2] - 1).to(target.device)
    if target.dim() == 2:
        return target[position]
    if row is None:
        row = torch.arange(len(target), device=target.device).view(-1, *[1] * (position.dim() - 1))
    return target[row.to(target.device), position]


def key_scale(rule: Rule, square: Tensor) -> Tensor:
    """1 / (‖h‖² + mu), or 1 where the rule's key is h itself; `square` is ‖h‖²."""
    return torch.ones_like(square) if rule.mu is None else (square + spread(rule.mu, square)).reciprocal()


def value_of(rule: Rule, a: Tensor, activation: Activation, at: Local) -> Tensor:
    """What the rule gives for a, in a's dtype; refuses by name what is not like a."""
    value = rule.value(a, activation(a), at)
    if not isinstance(value, Tensor) or value.shape != a.shape:
        came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise ValueError(f"{type(rule).__name__}.value gave {came}, expected a tensor like a, of shape {list(a.shape)}")
    return value.to(a.dtype)


def event_value(rule: Rule, value: Tensor, key_norm: Tensor | None, row: Tensor | None = None) -> Tensor:
    """u = rate · value with the rule's clip, which needs key_norm = ‖k‖ [...]; value [..., O], row as in `Local`."""
    return clipped(spread(rule.rate, value, row) * value, rule.clip, key_norm)


def clipped(u: Tensor, clip: float | Tensor | None, key_norm: Tensor | None) -> Tensor:
    """u_i · min(1, clip / (|u_i| ‖k‖))."""
    if clip is None or key_norm is None:
        return u
    clip = spread(clip, u)
    # a norm below the clip becomes the clip, so 0 divides nothing, in a gradient neither; NaN stays NaN
    return u * (clip / (u.abs() * key_norm[..., None]).clamp(min=clip))


class Event(NamedTuple):
    """One candidate event per token: value [..., O], key [..., I], bias key [...] or None (a rule without bias)."""

    u: Tensor
    k: Tensor
    bias: Tensor | None


class Key(NamedTuple):
    """The key k = scale · h of each token, [...]; scale is the bias key as well. norm is ‖k‖, None without a clip."""

    scale: Tensor
    norm: Tensor | None


def key_of(rule: Rule, square: Tensor, h: Tensor | None = None) -> Key:
    """The key of tokens with input h [..., I], of which `square` is ‖h‖², [...]; a modulation alone looks at h."""
    scale, modulation = key_scale(rule, square), modulation_of(rule)
    if modulation is not None:
        assert h is not None
        weight = modulation(h)
        if not isinstance(weight, Tensor) or weight.shape != square.shape:
            came = f"shape {list(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
            raise ValueError(f"{type(rule).__name__}.modulation gave {came}, expected one of {list(square.shape)}")
        scale = scale * weight.to(scale.dtype)
    return Key(scale, None if rule.clip is None else square.sqrt() * scale.abs())


def modulation_of(rule: Rule) -> Callable[[Tensor], Tensor] | None:
    """What weighs the rule's events; None: nothing does."""
    return getattr(rule, "modulation", None)


def event(rule: Rule, h: Tensor, value: Tensor, row: Tensor | None = None) -> Event:
    """Key and value put together: what each token with input h [..., I] and the rule's value [..., O] writes.

    `row` as in `Local`. In the dtype of h and value.
    """
    key = key_of(rule, h.square().sum(-1), h)
    u = event_value(rule, value, key.norm, row)
    return Event(u, h * key.scale[..., None], key.scale if rule.bias else None)


def twin_event(
    name: str,
    activation: Activation,
    clip: float | None,
    a: Tensor,
    frozen_a: Tensor,
    key_norm: Tensor,
    rate: Tensor,
    gamma: Tensor,
    target: Tensor | None,
) -> Tensor:
    """u [B, ..., O] of a rule by the name in its `Twin`; rate and gamma are tensors [] or [B], as in a fused step."""
    rate, gamma = (x.to(a.dtype).reshape(-1, *[1] * (a.dim() - 1)) for x in (rate, gamma))
    gate = name.removeprefix("slow_")
    if name == "delta":
        assert target is not None
        value = target - a
    elif gate in GATES:
        slow = name.startswith("slow_")
        value = slow_value(a, frozen_a, gamma, activation, gate) if slow else gated(a, activation(a), activation, gate)
    else:
        raise ValueError(
            f"rule {name!r} has no event in torch; there are delta, {', '.join(GATES)}, and slow_ of these"
        )
    return clipped(rate * value, clip, key_norm)
