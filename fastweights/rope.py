"""How a model turns queries and keys by their positions, and every way in which a config.json says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .checks import first, positive_float, positive_int, short
from .families import FULL, SLIDING, Family

_THETA = 10000.0  # what transformers fills in where the family has no other; Llama 1 and 2 leave it out

# What each kind of scaling needs, under config.json's names.
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(frozen=True)
class RopeScaling:
    """How rope frequencies are stretched: "linear" by `factor` alone, "llama3" by all four numbers."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise _unknown(self.rope_type)
        positive_float("rope factor", self.factor)
        positive_float("rope low_freq_factor", self.low_freq_factor)
        positive_float("rope high_freq_factor", self.high_freq_factor)
        positive_int("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"rope_type": self.rope_type} | {key: getattr(self, key) for key in _KEYS[self.rope_type]}


class Rope(NamedTuple):
    """How one layer turns queries and keys by their positions."""

    theta: float
    scaling: RopeScaling | None
    channels: int  # of each head, the first ones


def read_rope(given: Mapping[str, Any], family: Family, length: int, unread: list[str]) -> dict[str, Any]:
    """The fields of `LlamaConfig` that say how rope turns, from the older keys or from the newer `rope_parameters`.

    Args:
        given: the keys of a config.json.
        length: max_position_embeddings.
        unread: where the names of keys are added that nothing is computed with.
    """
    if "embed_positions" in family.names:
        keys = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
        unread += [key for key in keys if given.get(key)]
        return {"rope_theta": _THETA, "rope_scaling": None}
    old, new = (_object(key, given.get(key)) for key in ("rope_scaling", "rope_parameters"))
    fields, name = {}, "rope_parameters" if new else "rope_scaling"
    if family.has("rope_local_base_freq"):
        fields["rope_local_base_freq"], new = _local(old, new, given, family, unread)
        name = "rope_parameters.full_attention" if new else name
    if any(isinstance(value, Mapping) for value in new.values()):
        raise ValueError(f"rope_parameters {short(new)} differ between kinds of layers, which is not implemented")
    if old and new and {**_renamed(new), **_renamed(old)} != _renamed(new):
        raise ValueError(f"rope_scaling {short(old)} and rope_parameters {short(new)} contradict each other")
    rope = new or old
    fields["rope_theta"] = float(_agreed("rope_theta", rope, name, given, family, _THETA))
    if family.has("partial_rotary_factor"):
        fields["partial_rotary_factor"] = float(_agreed("partial_rotary_factor", rope, name, given, family))
    for part in (rope.pop("partial_rotary_factor", None), given.get("partial_rotary_factor")):
        if part not in (None, 1.0) and not family.has("partial_rotary_factor"):
            raise ValueError(f"partial_rotary_factor is {short(part)}, and fastweights implements only null or 1.0")
    kind = _kind(rope)
    if kind == "llama3":
        outer = given.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = first(outer, rope.get("original_max_position_embeddings"), length)
    if kind not in _KEYS:
        raise _unknown(kind)
    wanted = _KEYS[kind]
    if missing := sorted(key for key in wanted if rope.get(key) is None):
        raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)}, which is missing")
    idle = {"original_max_position_embeddings"}  # says where the model came from; only llama3 computes with it
    unread += [f"{name}.{key}" for key in rope.keys() - wanted - idle if rope[key] is not None]
    scaling = None if kind == "default" else RopeScaling(kind, **{key: rope[key] for key in sorted(wanted)})
    return {**fields, "rope_scaling": scaling}


def _local(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    given: Mapping[str, Any],
    family: Family,
    unread: list[str],
) -> tuple[float, dict[str, Any]]:
    """The rope_theta of the layers with a window, and what rope_parameters says of the others."""
    if new.keys() - {FULL, SLIDING}:
        raise ValueError(f"rope_parameters is {short(new)}, expected an object for each of {FULL} and {SLIDING}")
    if old.get("rope_type") is None and old.get("type") is not None:
        raise ValueError(
            f"rope_scaling is {short(old)}, expected rope_type in it: transformers 5 does not read type here"
        )
    local, full = (_object(f"rope_parameters.{kind}", new.get(kind)) for kind in (SLIDING, FULL))
    name = f"rope_parameters.{SLIDING}"
    theta = local.pop("rope_theta", None)
    theta = _agreed("rope_local_base_freq", {"rope_local_base_freq": theta}, name, given, family)
    if local.pop("partial_rotary_factor", None) not in (None, 1.0) or _kind(local) != "default":
        raise ValueError(f"{name} is {short(new[SLIDING])}, and fastweights implements only the default rope there")
    unread += [f"{name}.{key}" for key, value in local.items() if value is not None]
    return float(theta), full


def _agreed(
    field: str, rope: dict[str, Any], name: str, given: Mapping[str, Any], family: Family, default: Any = None
) -> Any:
    """A number that stands in the rope's object, which is called `name`, or beside it, or that transformers fills in.

    The field's own name must say the same where the family has another: versions of transformers differ in which
    they read.
    """
    ours = family.spellings(field)
    found = [(name, rope.pop(field, None)), *((key, given.get(key)) for key in ours)]
    found = [(where, value) for where, value in found if value is not None]
    filled_in = (f"transformers' {family.architecture}", family.defaults.get(ours[0], default))
    where, value = (found or [filled_in])[0]
    for key, other in [*found, (field, given.get(field))]:
        if other is not None:
            positive_float(field if key == name else key, other)
            if other != value:
                raise ValueError(f"{key} is {other}, but {where.split('.')[0]} says {value}")
    return value


def _kind(rope: dict[str, Any]) -> str:
    """Takes the kind of rope out of its object."""
    kinds = {rope.pop(key, None) for key in ("rope_type", "type")} - {None}
    if len(kinds) > 1:
        raise ValueError(f"rope type and rope_type contradict each other: {sorted(kinds)}")
    return kinds.pop() if kinds else "default"


def _renamed(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the newer name of `type`."""
    return {"rope_type" if key == "type" else key: value for key, value in rope.items()}


def _object(key: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{key} is {short(value)}, expected an object or null")
    return dict(value or {})


def _unknown(kind: str) -> ValueError:
    return ValueError(f"rope_type {kind!r} is not implemented, expected 'default', 'linear' or 'llama3'")
