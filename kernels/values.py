"""The rules that kernels know: a written token's value as a Triton function that kernels are built from.

    u = rate · value(a)            u_i ← u_i · min(1, clip / (|u_i| ‖k‖))

`fastweights.rules` holds the definition, in torch. A value here is elementwise: value(a, frozen_a, target, gamma, PHI).
A rule of one's own brings its kernel by `KERNELS["name"] = Kernel(triton_function)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError:  # a platform without Triton: backend="torch" works, "triton" says what is missing
    triton = tl = None

    def jit(function=None, **options):
        return jit if function is None else _Missing(function.__name__)


def on_its_gpu(launch: Callable) -> Callable:
    """A launcher that runs with the GPU of its first tensor as the current one: Triton launches on the current one."""

    @functools.wraps(launch)
    def on_it(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *args, **options)

    return on_it


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


@jit
def phi_triton(a, PHI: tl.constexpr):
    """φ(a), by its name in `ACTIVATIONS`."""
    if PHI == "identity":
        return a
    elif PHI == "silu":
        return a / (1 + tl.exp(-a))
    elif PHI == "gelu":
        return a * (0.5 + 0.5 * tl.erf(a * 0.7071067811865476))
    else:  # (1 + tanh w) / 2 = 1 / (1 + e^-2w): no tanh is needed
        tl.static_assert(PHI == "gelu_tanh", "no kernel knows this activation")
        return a / (1 + tl.exp(-a * (1.5957691216057308 + 0.07135481627260025 * a * a)))


@jit
def phi_prime_triton(a, PHI: tl.constexpr):
    """φ′(a), by φ's name in `ACTIVATIONS`."""
    if PHI == "identity":
        return tl.full(a.shape, 1.0, tl.float32)
    elif PHI == "silu":
        s = 1 / (1 + tl.exp(-a))
        return s * (1 + a * (1 - s))
    elif PHI == "gelu":
        return 0.5 + 0.5 * tl.erf(a * 0.7071067811865476) + 0.3989422804014327 * a * tl.exp(-0.5 * a * a)
    else:
        tl.static_assert(PHI == "gelu_tanh", "no kernel knows this activation")
        # the slope is 1 or 0 beyond 9, and products of a, e and s stay finite; tl.clamp would lose NaN
        a = tl.where(a > 9, 9.0, tl.where(a < -9, -9.0, a))
        e = tl.exp(-a * (1.5957691216057308 + 0.07135481627260025 * a * a))
        s = 1 / (1 + e)
        return s + a * s * (e * s) * (1.5957691216057308 + 0.21406444881780074 * a * a)


@jit
def ones_triton(a, frozen_a, target, gamma, PHI: tl.constexpr):
    return phi_triton(a, PHI)


@jit
def positive_triton(a, frozen_a, target, gamma, PHI: tl.constexpr):
    z = phi_triton(a, PHI)
    return (z > 0).to(tl.float32) * z


@jit
def derivative_triton(a, frozen_a, target, gamma, PHI: tl.constexpr):
    return phi_prime_triton(a, PHI) * phi_triton(a, PHI)


@jit
def slow_ones_triton(a, frozen_a, target, gamma, PHI: tl.constexpr):
    return gamma * ones_triton(frozen_a, frozen_a, target, gamma, PHI) - (a - frozen_a)


@jit
def slow_positive_triton(a, frozen_a, target, gamma, PHI: tl.constexpr):
    return gamma * positive_triton(frozen_a, frozen_a, target, gamma, PHI) - (a - frozen_a)


@jit
def slow_derivative_triton(a, frozen_a, target, gamma, PHI: tl.constexpr):
    return gamma * derivative_triton(frozen_a, frozen_a, target, gamma, PHI) - (a - frozen_a)


@jit
def delta_triton(a, frozen_a, target, gamma, PHI: tl.constexpr):
    return target - a


@dataclass(frozen=True, eq=False)
class Kernel:
    """A rule's value in Triton, what it looks at besides a, and its number in scan.c, where it has one."""

    value: Any
    reads_frozen: bool = False
    reads_target: bool = False
    in_c: int | None = None


KERNELS = {
    "ones": Kernel(ones_triton, in_c=0),  # Hebbian; LocalLeastSquares target="self" with rate gamma
    "positive": Kernel(positive_triton, in_c=1),
    "derivative": Kernel(derivative_triton, in_c=2),
    "slow_ones": Kernel(slow_ones_triton, reads_frozen=True, in_c=3),
    "slow_positive": Kernel(slow_positive_triton, reads_frozen=True, in_c=4),
    "slow_derivative": Kernel(slow_derivative_triton, reads_frozen=True, in_c=5),
    "delta": Kernel(delta_triton, reads_target=True, in_c=6),  # rate = beta
}


IN_C = {"identity": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}  # the activations' numbers in cpu.h
ACTIVATIONS = tuple(IN_C)  # all of them exist in Triton as well


def kernel_of(rule: str, activation: str) -> Kernel:
    """The kernel of a rule, by name; refuses a rule or an activation that no kernel knows."""
    if rule not in KERNELS:
        raise ValueError(f"rule {rule!r} has no Triton twin; there are {', '.join(KERNELS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"no kernel knows the activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    return KERNELS[rule]


@jit
def clipped_triton(u, clip, key_norm):
    norm = tl.abs(u) * key_norm
    return tl.where(norm > clip, u * (clip / norm), u)


Number = torch.Tensor | float | Sequence[float]


def per_neuron(number: Number, rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """A float, a tuple of B, or a tensor [], [B], [1, O] or [B, O], as [B, O] (stride 0 where there is one number)."""
    each = number if isinstance(number, torch.Tensor) and number.dim() == 2 else per_row(number, rows, like)[:, None]
    return each.detach().to(like.device, like.dtype, non_blocking=True).expand(rows, width)


def per_row(number: Number, rows: int, like: torch.Tensor) -> torch.Tensor:
    """A float, a tuple of B, or a tensor [] or [B], as [B] in like's dtype and place (stride 0 for one number)."""
    if isinstance(number, (int, float)):  # filled there: nothing to wait for
        return torch.full((), number, dtype=like.dtype, device=like.device).expand(rows)
    return torch.as_tensor(number, dtype=like.dtype).to(like.device, non_blocking=True).expand(rows)
