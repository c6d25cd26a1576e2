"""What a value of config.json must be: each check raises ValueError with one sentence that names the key."""

from __future__ import annotations

import json
from typing import Any


def positive_int(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} is {value!r}, expected a positive whole number")


def positive_float(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value!r}, expected a positive number")


def boolean(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, expected true or false")


def short(value: Any) -> str:
    """A value as config.json has it, in at most 80 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(values: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(value) for value in values)


def first(*values: Any) -> Any:
    """The first value that is not None; None where all are."""
    return next((value for value in values if value is not None), None)
