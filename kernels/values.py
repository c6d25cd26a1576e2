"""What a written token's value is, twice: in torch, and in Triton as a function that kernels are built from.

    u = rate · value(a)            u_i ← u_i · min(1, clip / (|u_i| ‖k‖))

A rule is a pair of functions of one signature, elementwise: `value(a, frozen_a, target, p0, phi)`. A rule of
one's own brings its Triton twin by `RULES["name"] = Twin(torch_function, triton_function)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # a platform without Triton: backend="torch" works, "triton" says what is missing
    triton = tl = None

    def jit(function):
        return _Missing(function.__name__)


FUSED = {"enable_fp_fusion": True}  # said at every launch: Triton 3.10 changes the default


class _Missing:
    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, grid):
        require_triton()


def require_triton(*tensors: torch.Tensor) -> None:
    """Refuses, in words, where Triton is missing or would compute with less precision than asked."""
    if triton is None:
        raise ImportError('backend="triton" needs the package triton, which is not installed here')
    for x in tensors:
        if x.dtype == torch.float64:
            raise ValueError('backend="triton" computes in float32, but got float64: use backend="torch"')


# ---- torch


def phi_torch(a: torch.Tensor, phi: str) -> torch.Tensor:
    return F.silu(a) if phi == "silu" else a


def phi_prime_torch(a: torch.Tensor, phi: str) -> torch.Tensor:
    if phi != "silu":
        return torch.ones_like(a)
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _gated(gate: str) -> Callable[..., torch.Tensor]:
    def value(a, frozen_a, target, p0, phi):
        z = phi_torch(a, phi)
        if gate == "positive":
            return (z > 0) * z  # a product: NaN stays NaN
        return phi_prime_torch(a, phi) * z if gate == "derivative" else z

    return value


def _slow(gate: str) -> Callable[..., torch.Tensor]:
    gated = _gated(gate)

    def value(a, frozen_a, target, p0, phi):
        return p0 * gated(frozen_a, None, None, None, phi) - (a - frozen_a)

    return value


def _delta(a, frozen_a, target, p0, phi):
    return target - a


# ---- Triton


@jit
def phi_triton(a, PHI: tl.constexpr):
    if PHI == "silu":
        return a / (1 + tl.exp(-a))
    else:
        return a


@jit
def phi_prime_triton(a, PHI: tl.constexpr):
    if PHI == "silu":
        s = 1 / (1 + tl.exp(-a))
        return s * (1 + a * (1 - s))
    else:
        return a * 0 + 1


@jit
def ones_triton(a, frozen_a, target, p0, PHI: tl.constexpr):
    return phi_triton(a, PHI)


@jit
def positive_triton(a, frozen_a, target, p0, PHI: tl.constexpr):
    z = phi_triton(a, PHI)
    return (z > 0).to(tl.float32) * z


@jit
def derivative_triton(a, frozen_a, target, p0, PHI: tl.constexpr):
    return phi_prime_triton(a, PHI) * phi_triton(a, PHI)


@jit
def slow_ones_triton(a, frozen_a, target, p0, PHI: tl.constexpr):
    return p0 * ones_triton(frozen_a, frozen_a, target, p0, PHI) - (a - frozen_a)


@jit
def slow_positive_triton(a, frozen_a, target, p0, PHI: tl.constexpr):
    return p0 * positive_triton(frozen_a, frozen_a, target, p0, PHI) - (a - frozen_a)


@jit
def slow_derivative_triton(a, frozen_a, target, p0, PHI: tl.constexpr):
    return p0 * derivative_triton(frozen_a, frozen_a, target, p0, PHI) - (a - frozen_a)


@jit
def delta_triton(a, frozen_a, target, p0, PHI: tl.constexpr):
    return target - a


@dataclass(frozen=True, eq=False)
class Twin:
    """A rule's value in torch and in Triton, and what it looks at besides a."""

    torch: Callable[..., torch.Tensor]
    triton: Any
    reads_frozen: bool = False
    reads_target: bool = False


RULES: dict[str, Twin] = {
    "ones": Twin(_gated("ones"), ones_triton),  # Hebbian; LocalLeastSquares target="self" with rate γ
    "positive": Twin(_gated("positive"), positive_triton),
    "derivative": Twin(_gated("derivative"), derivative_triton),
    "slow_ones": Twin(_slow("ones"), slow_ones_triton, reads_frozen=True),  # p0 = γ
    "slow_positive": Twin(_slow("positive"), slow_positive_triton, reads_frozen=True),
    "slow_derivative": Twin(_slow("derivative"), slow_derivative_triton, reads_frozen=True),
    "delta": Twin(_delta, delta_triton, reads_target=True),  # rate = β
}
IN_C = {rule: number for number, rule in enumerate(RULES.values())}  # as scan.c numbers them


def twin(rule: str) -> Twin:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r} has no Triton twin; there are {', '.join(RULES)}")
    return RULES[rule]


def clipped(u: torch.Tensor, clip: float | None, key_norm: torch.Tensor) -> torch.Tensor:
    """u_i · min(1, clip / (|u_i| ‖k‖)); key_norm broadcasts against u."""
    if clip is None:
        return u
    return u * (clip / (u.abs() * key_norm)).clamp(max=1)  # a norm of 0 divides to inf, which clamps to 1


@jit
def clipped_triton(u, clip, key_norm):
    norm = tl.abs(u) * key_norm
    return tl.where(norm > clip, u * (clip / norm), u)


Number = torch.Tensor | float | tuple[float, ...]


def per_row(number: Number, rows: int, like: torch.Tensor) -> torch.Tensor:
    """A float, a tuple of B, or a tensor [] or [B], as [B] in like's dtype and place (stride 0 for one number)."""
    return torch.as_tensor(number, dtype=like.dtype, device=like.device).expand(rows)


@dataclass(frozen=True)
class Value:
    """value(a, t0, t1) of a prompt for `scan`, by a rule that has a Triton twin; the torch path calls it too.

    rate, p0: floats, tuples of B or tensors [] or [B]; frozen, target: broadcast to [B, T, O]; norm_BT = ‖k‖, for clip.
    """

    rule: str
    activation: str = "identity"
    rate: Number = 1.0
    p0: Number = 1.0
    clip: float | None = None
    norm_BT: torch.Tensor | None = None
    frozen_BTO: torch.Tensor | None = None
    target: torch.Tensor | None = None

    def __call__(self, a_BCO: torch.Tensor, t0: int, t1: int) -> torch.Tensor:
        B = a_BCO.shape[0]
        frozen = None if self.frozen_BTO is None else self.frozen_BTO[:, t0:t1]
        target = self.target if self.target is None or self.target.dim() < 2 else self.target[..., t0:t1, :]
        rate, p0 = (per_row(x, B, a_BCO)[:, None, None] for x in (self.rate, self.p0))
        u = rate * twin(self.rule).torch(a_BCO, frozen, target, p0, self.activation)
        if self.clip is None:
            return u
        assert self.norm_BT is not None
        return clipped(u, self.clip, self.norm_BT[:, t0:t1, None])
