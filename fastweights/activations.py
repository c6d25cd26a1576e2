"""φ of a linear and its derivative φ′, both elementwise: z = φ(a)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """φ of a linear and its derivative φ′, both elementwise."""

    name: str
    function: Elementwise
    derivative: Elementwise

    def __call__(self, a: Tensor) -> Tensor:
        return self.function(a)

    def __reduce__(self) -> str | tuple:
        return self.name.upper()  # pickled as the constant of this module that it is


def _silu_derivative(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _gelu_derivative(a: Tensor) -> Tensor:
    return (1 + torch.erf(a / math.sqrt(2))) / 2 + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(a: Tensor) -> Tensor:
    a = a.clamp(-9, 9)  # the slope is 0 or 1 there to 27 digits, and 0 · a² stays 0
    w = math.sqrt(8 / math.pi) * (a + 0.044715 * a**3)
    s = torch.sigmoid(w)  # (1 + tanh(w / 2)) / 2
    return s + a * s * torch.sigmoid(-w) * math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * a * a)


IDENTITY = Activation("identity", lambda a: a, torch.ones_like)
SILU = Activation("silu", F.silu, _silu_derivative)
GELU = Activation("gelu", F.gelu, _gelu_derivative)
GELU_TANH = Activation("gelu_tanh", functools.partial(F.gelu, approximate="tanh"), _gelu_tanh_derivative)

PHI = {activation.name: activation for activation in (IDENTITY, SILU, GELU, GELU_TANH)}


@dataclass(frozen=True)
class _Halves(Activation):
    parts: tuple[Activation, Activation]

    def __reduce__(self) -> tuple:
        return halves, self.parts


@functools.cache  # one object for each pair, as the constants are
def halves(first: Activation, second: Activation) -> Activation:
    """φ of a fused linear, a [..., O]: the first half of the outputs takes one φ, the second half the other.

    Its name is both names with a bar, as "silu|identity", which no kernel knows. An odd O is refused by torch.
    """

    def both(left: Elementwise, right: Elementwise) -> Elementwise:
        def function(a: Tensor) -> Tensor:
            one, other = a.unflatten(-1, (2, -1)).unbind(-2)
            return torch.cat((left(one), right(other)), dim=-1)

        return function

    name, function = f"{first.name}|{second.name}", both(first.function, second.function)
    return _Halves(name, function, both(first.derivative, second.derivative), (first, second))


def phi_of(name: str) -> Activation:
    """The φ of this name: one of `PHI`, or two with a bar, see `halves`."""
    first, bar, second = name.partition("|")
    return halves(PHI[first], PHI[second]) if bar else PHI[first]


# ---- what rules make of it

GATES = ("ones", "positive", "derivative")


def gated(a: Tensor, z: Tensor, activation: Activation, gate: str) -> Tensor:
    """m ⊙ z, m = 1, 1[z > 0] or φ′(a)."""
    match gate:
        case "positive":
            return (z > 0) * z  # a product: NaN must stay NaN
        case "derivative":
            return activation.derivative(a) * z
    return z


def slow_value(a: Tensor, frozen_a: Tensor, gamma: Tensor | float, activation: Activation, gate: str) -> Tensor:
    """a* − a with a* = a₀ + γ (m₀ ⊙ z₀) of the frozen weights' a₀."""
    return gamma * gated(frozen_a, activation(frozen_a), activation, gate) - (a - frozen_a)
