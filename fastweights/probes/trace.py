"""What a probe or a capture saw.

Shape suffixes: M moments, N alternatives of a sweep, L layers, B rows, T tokens, T′ kept tokens, D width, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..families import FAMILIES
from ..files import write_tensors
from .exam import Scores
from .sites import site_of

FORMAT = 1


@dataclass
class Trace:
    """What a probe or a capture saw. All tensors are copies.

    M is there where the probe named moments, not for "now"; N where it had a sweep.

    Attributes:
        sites: name → [M, N, L, B, T′, …]; L is there for sites inside blocks, as `layers` lists them. The rest is D for
            the residual stream and its like, [H, E], [KH, E] or [H, D] for heads, F for neurons; "scores" and "pattern"
            are [M, N, L, B, H, T′, S].
        input_ids: [B, T] int64, what was run.
        positions: [B, T′] int64, where the kept tokens stand; −1 = padding, or not chosen in this row.
        metric: [M, N, …], what `metric` gave.
        gradients: name → the metric's gradient, in the shape of the site.
        scores: of an exam.
        model_type: of the model; None: not known. It says which site a module's name means.
        leading: how many axes stand before L and B: one for moments, one for alternatives.
    """

    sites: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)
    input_ids: Tensor | None = None
    positions: Tensor | None = None
    metric: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    scores: Scores | None = None
    leading: int = 0
    model_type: str | None = None

    def __repr__(self) -> str:
        shapes = {**self.sites, "metric": self.metric}
        said = ", ".join(f"{name} {list(t.shape)}" for name, t in shapes.items() if t is not None)
        return f"Trace({said})"

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        """A site with all its layers, or `trace[site, layer]` without their axis.

        Raises:
            KeyError: it was not captured.
        """
        name, layer = key if isinstance(key, tuple) else (key, None)
        site, named = site_of(name, None if self.model_type is None else FAMILIES[self.model_type])
        return self.at(site.name, named if layer is None else layer)

    def at(self, site: str, layer: int | None, of: dict[str, Tensor] | None = None) -> Tensor:
        """A site's values at one layer, [M, N, B, T′, …]; of the gradients if they are given.

        Raises:
            KeyError: this site or layer was not captured.
        """
        values = self.sites if of is None else of
        if site not in values:
            raise KeyError(f"site {site!r} was not captured; captured are {sorted(values)}")
        if layer is None:
            return values[site]
        if layer not in self.layers.get(site, ()):
            raise KeyError(f"layer {layer} of {site!r} was not captured; captured are {self.layers.get(site, [])}")
        return values[site].select(self.leading, self.layers[site].index(layer))

    @property
    def logits(self) -> Tensor:
        """[M, N, B, T′, V]; with a metric or an exam they are kept only where they were asked for."""
        return self["logits"]

    @property
    def hidden_states(self) -> Tensor:
        """Residual stream after ℓ layers, [M, N, L+1, B, T′, D]: 0 = embedding, L = before the final norm.

        Raises:
            KeyError: "embedding", or "resid_post" of a layer, was not captured.
        """
        embedding, after = self["embedding"], self["resid_post"]
        if (have := self.layers["resid_post"]) != list(range(len(have))):
            raise KeyError(f"hidden_states needs 'resid_post' of every layer; captured are {have}")
        return torch.cat([embedding.unsqueeze(self.leading), after], dim=self.leading)

    # ---- files

    def save(self, path: str | Path) -> None:
        """Writes everything into one safetensors file, JSON in its header; whole or not at all."""
        tensors = {f"site.{name}": t for name, t in self.sites.items()}
        tensors |= {f"gradient.{name}": t for name, t in self.gradients.items()}
        tensors |= {name: t for name in ALONE if (t := getattr(self, name)) is not None}
        if self.scores is not None:
            tensors |= {"scores.logprob": self.scores.logprob, "scores.rank": self.scores.rank}
        meta = {"format": FORMAT, "layers": self.layers, "leading": self.leading, "model_type": self.model_type}
        write_tensors(Path(path), {name: t.detach() for name, t in tensors.items()}, {"trace": json.dumps(meta)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """A trace as `save` wrote it, on the CPU.

        Raises:
            ValueError: the file is no trace.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                meta = json.loads((file.metadata() or {}).get("trace", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from None
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise ValueError(f"{path} is not a trace of format {FORMAT}: expected what Trace.save wrote")
        parts: dict[str, dict[str, Tensor]] = {"site": {}, "gradient": {}, "scores": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if rest:
                parts[kind][rest] = tensor
        scores = Scores(**parts["scores"]) if parts["scores"] else None
        whole: dict[str, Any] = {name: tensors.get(name) for name in ALONE}
        known = {"layers": meta["layers"], "leading": meta["leading"], "model_type": meta.get("model_type")}
        return cls(**whole, **known, sites=parts["site"], gradients=parts["gradient"], scores=scores)


ALONE = ("input_ids", "positions", "metric")  # attributes that are one tensor
