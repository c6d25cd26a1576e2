"""A copy of everything that moves in an episode, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .model import Llama
from .passes import Site
from .plastic import PlasticLinear
from .sampling import RowGenerator
from .state import EventLog

FORMAT = "fastweights episode 2"


@dataclass(frozen=True)
class Pending:
    """Gradient events of one token that wait for the next token of their rows. Holds a graph of its own."""

    logprob_BV: Tensor  # log p(next token), with the graph of this one token
    taped: dict[Site, tuple[Tensor, Tensor]]  # (a, h) of each linear
    rows_B: Tensor  # bool, on the CPU: rows that still wait
    events: dict[Site, list[int]]  # events of each log when the token was read


@dataclass(frozen=True)
class Snapshot:
    """Everything that moves, copied: made by `Episode.snapshot`, taken over by `Episode.restore`."""

    lengths: list[int]
    keys: list[Tensor]  # per layer [B, K, S, E], the slots in use
    values: list[Tensor]
    logs: dict[Site, EventLog]
    pending: list[Pending]
    logits_BV: Tensor | None
    seen: list[list[int]]
    generator: Tensor  # int64 [B, 2], of `sampling.RowGenerator`
    shared: bool = False  # whether the rows share one ΔW

    @property
    def waiting(self) -> list[bool]:
        """Rows whose last token has a gradient event that waits."""
        return [any(bool(p.rows_B[row]) for p in self.pending) for row in range(len(self.lengths))]

    def rows(self, chosen: Sequence[int]) -> Snapshot:
        """The same past for other rows, without pending events: row n is row `chosen[n]` of this one."""
        index = torch.tensor(list(chosen))
        end = max(self.lengths[row] for row in chosen)
        return Snapshot(
            lengths=[self.lengths[row] for row in chosen],
            keys=[k[index.to(k.device), :, :end] for k in self.keys],
            values=[v[index.to(v.device), :, :end] for v in self.values],
            logs={site: log.clone() if self.shared else log.rows(chosen) for site, log in self.logs.items()},
            pending=[],  # a graph belongs to the rows it was made for
            logits_BV=None if self.logits_BV is None else self.logits_BV[index.to(self.logits_BV.device)],
            seen=[list(self.seen[row]) for row in chosen],
            generator=RowGenerator.state_of_rows(self.generator, chosen),
            shared=self.shared,
        )


def save(snapshot: Snapshot, model: Llama, linears: dict[Site, PlasticLinear], path: Path) -> None:
    """One safetensors file, its JSON in the header; it appears whole or not at all."""
    tensors: dict[str, Tensor] = {"generator": snapshot.generator}
    for layer, (k, v) in enumerate(zip(snapshot.keys, snapshot.values, strict=True)):
        tensors |= {f"keys.{layer}": k, f"values.{layer}": v}
    if snapshot.logits_BV is not None:
        tensors["logits"] = snapshot.logits_BV
    logs = {}
    for site, log in snapshot.logs.items():
        saved, logs[_key(site)] = log.state_dict()
        tensors |= {f"log.{_key(site)}.{name}": t for name, t in saved.items()}
    whole = {
        "format": FORMAT,
        "model": fingerprint(model),
        "rules": {_key(site): _rule(linear) for site, linear in linears.items()},
        "shared": snapshot.shared,
        "lengths": snapshot.lengths,
        "seen": snapshot.seen,
        "waiting": snapshot.waiting,
        "logs": logs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({key: t.contiguous() for key, t in tensors.items()}, temporary, {"episode": json.dumps(whole)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, model: Llama, linears: dict[Site, PlasticLinear]) -> tuple[Snapshot, list[bool]]:
    """The snapshot without its pending events, and the rows that had one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a file that Episode.save wrote")
    try:
        with safe_open(path, "pt", device=str(model.device)) as file:
            whole = json.loads((file.metadata() or {}).get("episode", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    if whole.get("format") != FORMAT:
        raise ValueError(f"{path} has format {whole.get('format')!r}, expected {FORMAT!r}")
    if whole["model"] != fingerprint(model):
        raise ValueError(f"{path} belongs to another model: its weights' fingerprint is {whole['model'][:12]}…, "
                         f"this model's is {fingerprint(model)[:12]}…")  # fmt: skip
    rules = {_key(site): _rule(linear) for site, linear in linears.items()}
    if whole["rules"] != rules:
        raise ValueError(f"{path} was saved with {_listed(whole['rules'])}, but this model has {_listed(rules)}")
    logs, shared = {}, whole.get("shared", False)
    for site, linear in linears.items():
        prefix = f"log.{_key(site)}."
        logs[site] = linear.new_log(1 if shared else len(whole["lengths"]))
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        logs[site].load_state_dict(own, whole["logs"][_key(site)])
    layers = range(model.config.num_hidden_layers)
    snapshot = Snapshot(
        lengths=whole["lengths"],
        keys=[tensors[f"keys.{layer}"] for layer in layers],
        values=[tensors[f"values.{layer}"] for layer in layers],
        logs=logs,
        pending=[],
        logits_BV=tensors.get("logits"),
        seen=whole["seen"],
        generator=tensors["generator"].cpu(),
        shared=shared,
    )
    return snapshot, whole["waiting"]


def fingerprint(model: Llama) -> str:
    """SHA-256 over the shape of a model and a sample of every weight: tells models apart, not tampering."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)][:64].double().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _key(site: Site) -> str:
    return f"{site[0]}.{site[1]}"


def _rule(linear: PlasticLinear) -> dict[str, Any]:
    rule = linear.rule
    plain = (int, float, str, bool, tuple, type(None))
    names = [f.name for f in fields(rule)] if hasattr(rule, "__dataclass_fields__") else []  # type: ignore[arg-type]
    options = {name: getattr(rule, name) for name in names if isinstance(getattr(rule, name), plain)}
    # rates per row are a tuple, which JSON reads back as a list
    return {"rule": type(rule).__name__} | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def _listed(rules: dict[str, dict]) -> str:
    return ", ".join(f"{site}: {rule['rule']}" for site, rule in sorted(rules.items())) or "no plastic linears"
