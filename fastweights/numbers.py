"""The numbers of a rule: plain ones, and tensors, which may ask for gradients and may be one per row or per neuron."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

NUMBERS = ("rate", "gamma", "beta", "mu", "decay", "clip")  # by their names in a rule
ONE = ("mu", "decay", "clip")  # of which there is one for all rows and neurons

# a float; a tuple of one per row, of a rate; a tensor [], [rows], [1, O] or [rows, O]
Number = float | Sequence[float] | Tensor


class Twin(NamedTuple):
    """A rule as the kernels know it: u = rate · value, by the value that has this name in `kernels.values.KERNELS`."""

    name: str
    rate: Number
    gamma: Number = 1.0


def spread(number: Number, like: Tensor, row: Tensor | None = None) -> Any:
    """A number as it multiplies `like` [..., O], in its dtype and place; a float is left as it is.

    row: the row of each token, like `like` without its last dimension; None: the first dimension of `like` is the row.
    """
    if isinstance(number, tuple):
        number = torch.tensor(number, dtype=like.dtype)
    if not isinstance(number, Tensor):
        return number
    number = number.to(like.device, like.dtype, non_blocking=True)
    if number.dim() == 0:
        return number
    if number.dim() == 2 and len(number) == 1:
        return number[0]
    if row is not None:
        own = number[row.to(number.device)]
        return own if number.dim() == 2 else own[..., None]
    return number.reshape(len(number), *[1] * (like.dim() - 2), -1)


def plain(name: str, number: Any) -> Any:
    """As a float, or a rate as a tuple of one per row, where it is that; a tensor that asks for a gradient stays."""
    if isinstance(number, Tensor) and (number.requires_grad or number.dim() > (name == "rate")):
        return number
    number = number.tolist() if hasattr(number, "tolist") else number
    return tuple(number) if isinstance(number, list) and name == "rate" else number


def tensors_of(rule: object) -> dict[str, Tensor]:
    """The numbers of a rule that are tensors, by name."""
    every = ((name, getattr(rule, name, None)) for name in NUMBERS)
    return {name: number for name, number in every if isinstance(number, Tensor)}


def nonzero(number: Number) -> bool:
    """Whether any of it is not 0."""
    if isinstance(number, Tensor):
        return bool(number.detach().any())
    return any(number) if isinstance(number, tuple) else bool(number)


def check_number(rule: str, name: str, number: Any) -> None:
    """Refuses, by the rule and the number's name, what is no finite number, or not of a form that it may have."""
    if isinstance(number, Tensor):
        _check_tensor(rule, name, number)
        return
    rate = name == "rate"
    fits = bool(number) and all(map(_finite, number)) if isinstance(number, tuple) and rate else _finite(number)
    if not fits:
        form = "a finite number, or a tuple of them, one per row" if rate else "a finite number"
        raise ValueError(f"{rule}({name}={number!r}): expected {form}")


def _check_tensor(rule: str, name: str, number: Tensor) -> None:
    shape, several = list(number.shape), name not in ONE
    if number.dim() > (2 if several else 0) or not number.numel():
        form = "[], [rows], [1, O] or [rows, O]" if several else "[]"
        raise ValueError(f"{rule}({name}=...) is a tensor of shape {shape}: expected {form}")
    if not number.is_floating_point():
        raise ValueError(f"{rule}({name}=...) is a tensor of {number.dtype}: expected a float dtype")
    if not bool(number.detach().isfinite().all()):
        raise ValueError(f"{rule}({name}=...) holds a number that is not finite: expected finite ones")


def check_form(rule: str, name: str, number: Number, rows: int, out_features: int) -> None:
    """Refuses numbers that are not one per row of `rows`, or one per neuron of `out_features`."""
    shape = [len(number)] if isinstance(number, tuple) else list(number.shape) if isinstance(number, Tensor) else []
    if shape[1:] not in ([], [out_features]):
        raise ValueError(
            f"{rule} has {name} of shape {shape}, but there are {out_features} neurons: expected a last dimension of "
            f"{out_features}"
        )
    if shape and shape[0] not in (rows, 1 if len(shape) == 2 else rows):
        raise ValueError(f"{rule} has {shape[0]} {name}s, one per row, but this episode has batch {rows}")


def by_row(number: Number) -> bool:
    """Whether there may be more than one of it over the rows."""
    if isinstance(number, Tensor):
        return number.dim() == 1 or (number.dim() == 2 and len(number) > 1)
    return isinstance(number, tuple)


def as_float(number: Any) -> float:
    """One number as a float, without its graph."""
    return float(number.detach()) if isinstance(number, Tensor) else cast(float, number)


def same(one: Any, other: Any) -> bool:
    """Whether two numbers are one and the same: equal, or the same tensor."""
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)


def _finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(float(value)) < float("inf")
