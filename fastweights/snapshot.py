"""An episode on disk: one safetensors file, its JSON in the header."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .episode_state import Address, EpisodeState, key_of
from .files import write_tensors
from .model import Llama
from .numbers import tensors_of
from .plastic import PlasticLinear

FORMAT = "fastweights episode 2"
OLDER = "fastweights episode 1"  # whose random numbers were drawn for the batch, not for each row


def save(state: EpisodeState, model: Llama, linears: Mapping[Address, PlasticLinear], path: Path) -> None:
    """Writes everything that moves; the file appears whole or not at all."""
    tensors, meta = state.state_dict()
    rules = {key_of(address): _rule(linear) for address, linear in linears.items()}
    meta |= {"format": FORMAT, "model": fingerprint(model), "rules": rules}
    write_tensors(path, tensors, {"episode": json.dumps(meta)})


def read(
    path: Path, model: Llama, linears: Mapping[Address, PlasticLinear]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote, as `EpisodeState.load_state_dict` takes it, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is broken, of another version, another model or other rules.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a file that Episode.save wrote")
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("episode", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if meta.get("format") == OLDER:
        del tensors["generator"]
        warnings.warn(f"{path} was saved by an older version: its random numbers begin anew", stacklevel=3)
    elif meta.get("format") != FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')!r}, expected {FORMAT!r}")
    if meta["model"] != fingerprint(model):
        raise ValueError(
            f"{path} belongs to another model: its weights' fingerprint is {meta['model'][:12]}…, "
            f"this model's is {fingerprint(model)[:12]}…"
        )
    rules = {key_of(address): _rule(linear) for address, linear in linears.items()}
    if meta["rules"] != rules:
        raise ValueError(f"{path} was saved with {_listed(meta['rules'])}, but this model has {_listed(rules)}")
    return tensors, meta


def fingerprint(model: Llama) -> str:
    """SHA-256 over the shape of a model and a sample of every weight: tells models apart, not tampering."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)][:64].double().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _rule(linear: PlasticLinear) -> dict[str, Any]:
    rule = linear.rule
    plain = (int, float, str, bool, tuple, type(None))
    names = [f.name for f in fields(rule)] if hasattr(rule, "__dataclass_fields__") else []  # type: ignore[arg-type]
    options = {name: getattr(rule, name) for name in names if isinstance(getattr(rule, name), plain)}
    # rates per row are a tuple, which JSON reads back as a list
    known = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return {"rule": type(rule).__name__} | known | {name: _digest(x) for name, x in tensors_of(rule).items()}


def _digest(number: Tensor) -> str:
    """Tells the tensors of two rules apart."""
    values = number.detach().double().cpu().contiguous().numpy()
    return f"{list(number.shape)} {hashlib.sha256(values.tobytes()).hexdigest()}"


def _listed(rules: dict[str, dict]) -> str:
    return ", ".join(f"{site}: {rule['rule']}" for site, rule in sorted(rules.items())) or "no plastic linears"
