"""Which layers of a model have a sliding window, and every way in which a config.json says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checks import positive_int, short
from .families import FULL, SLIDING, Family

_PATTERN = "sliding_window_pattern"


def window_keys(family: Family) -> set[str]:
    """The keys of a config.json that are looked at."""
    keys = {"sliding_window", "layer_types"}
    if not isinstance(family.windows, int):
        return keys | {"use_sliding_window"} | ({"max_window_layers"} if family.windows == "some" else set())
    return keys | ({_PATTERN, "_" + _PATTERN} if _PATTERN in family.defaults else set())


def read_windows(hf: Mapping[str, Any], family: Family, layers: int, length: int) -> tuple[int | None, ...]:
    """The window of each layer; refuses keys that contradict each other, and windows that the family lacks.

    Args:
        hf: a config.json, with what transformers fills in.
        layers: how many.
        length: max_position_embeddings. A window as long as that cuts no text.
    """
    window, types = hf.get("sliding_window"), _layer_types(hf)
    if window is not None:
        positive_int("sliding_window", window)
    cuts = window is not None and window < length
    if isinstance(family.windows, int):
        return _patterned(hf, types or _pattern(hf, family, layers), window, layers)
    uses, name = hf.get("use_sliding_window"), hf["model_type"]
    if uses not in (None, True, False):
        raise ValueError(f"use_sliding_window is {short(uses)}, expected true, false or null")
    if family.windows is None:
        if (cuts and uses is not False) or (uses and window is None) or SLIDING in types:
            key = next(key for key in ("sliding_window", "use_sliding_window", "layer_types") if hf.get(key))
            raise ValueError(f"{key} is {short(hf[key])}, and a {name} has no sliding windows")
        return (None,) * layers
    if uses and window is None:
        raise ValueError("use_sliding_window is true, but sliding_window is null")
    if family.windows == "all":
        if cuts and uses is False:
            raise ValueError(
                f"sliding_window is {window}, but use_sliding_window is false; a {name} reads only the first"
            )
        if (cuts and FULL in types) or (window is None and SLIDING in types):
            raise ValueError(
                f"layer_types is {short(types)}, but sliding_window is {short(window)} in all layers of a {name}"
            )
        return (window,) * layers
    if not uses:
        if SLIDING in types:
            raise ValueError(f"layer_types is {short(types)}, but use_sliding_window is not true")
        return (None,) * layers
    start = hf["max_window_layers"]
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise ValueError(f"max_window_layers is {short(start)}, expected a number of layers")
    later = tuple(FULL if layer < start else SLIDING for layer in range(layers))
    return _patterned(hf, types or later, window, layers)


def write_windows(windows: tuple[int | None, ...], family: Family, length: int) -> dict[str, Any]:
    """The keys of a config.json that say what `windows` says."""
    if family.windows is None:
        return {}
    window = next((window for window in windows if window is not None), None)
    types = [FULL if window is None else SLIDING for window in windows]
    if isinstance(family.windows, int):
        # transformers makes a mask for this window even where no layer has one
        hf = {"sliding_window": window or length, "layer_types": types}
        patterns = range(1, len(types) + 2) if _PATTERN in family.defaults else ()  # for versions without layer_types
        found = [n for n in (family.windows, *patterns) if types == _every(n, len(types))]
        return hf | ({_PATTERN: found[0]} if found and patterns else {})
    if family.windows == "some" and window is not None:
        use = {"use_sliding_window": True, "layer_types": types}
        return {"sliding_window": window, **use, "max_window_layers": types.index(SLIDING)}
    return {"sliding_window": window}


def _patterned(
    hf: Mapping[str, Any], types: tuple[str, ...] | list[str], window: int | None, layers: int
) -> tuple[int | None, ...]:
    if len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries, expected one for each of {layers} layers")
    if window is None and SLIDING in types:
        raise ValueError(f"sliding_window is null, but layers of a {hf['model_type']} have one")
    return tuple(window if kind == SLIDING else None for kind in types)


def _pattern(hf: Mapping[str, Any], family: Family, layers: int) -> list[str]:
    """The kinds of layers where layer_types is left out: each nth sees everything, the others have the window."""
    n: Any = hf[_PATTERN] if _PATTERN in family.defaults else family.windows
    positive_int(_PATTERN, n)
    if hf.get("_" + _PATTERN, n) != n:  # transformers saves it beside layer_types, and does not read it
        raise ValueError(f"_{_PATTERN} is {short(hf['_' + _PATTERN])}, but {_PATTERN} is {n}")
    return _every(n, layers)


def _every(n: int, layers: int) -> list[str]:
    return [SLIDING if (layer + 1) % n else FULL for layer in range(layers)]


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """What layer_types says of the layers; () where it says nothing."""
    types = hf.get("layer_types")
    if types is None:
        return ()
    kinds = (FULL, "attention", SLIDING)  # "attention" is an older name of full attention
    if not isinstance(types, list | tuple) or any(kind not in kinds for kind in types):
        raise ValueError(f"layer_types is {short(types)}, and fastweights implements only {FULL} and {SLIDING}")
    return tuple(SLIDING if kind == SLIDING else FULL for kind in types)
