"""What the edits that everybody makes do to a site: take away, put in, add, project out.

Shape suffixes: R rows that an edit acts in, T tokens, B rows of a trace, S places in its rows, D width of the site's
last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config import LlamaConfig
from .places import Places, Reading
from .trace import Trace


@dataclass(frozen=True)
class At:
    """Where a change is asked for: its site and layer (None outside of blocks), and of each of its R rows the tokens.

    rows: [R] int64, the row of the episode or question. positions: [R, T] int64, absolute, −1 = padding.
    token_ids: [R, T] int64. All are on the model's device.
    """

    site: str
    layer: int | None
    rows: Tensor
    positions: Tensor
    token_ids: Tensor


Change = Callable[[Tensor, At], Tensor]


class Known:
    """A change that knows beforehand what it needs of a model."""

    def check(self, places: Places, config: LlamaConfig) -> None:
        """Refuses a model that it does not fit."""


@dataclass(frozen=True)
class Zero(Known):
    """All zero."""

    def __call__(self, x: Tensor, at: At) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True, repr=False)
class Mean(Known):
    """The mean of a reference's real tokens."""

    reference: Trace
    means: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)  # of sites and layers that were asked for

    def __repr__(self) -> str:
        return "mean"

    def check(self, places: Places, config: LlamaConfig) -> None:
        check_trace("ablate(reference=...)", self.reference, places, config)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        if (at.site, at.layer) not in self.means:
            self.means[at.site, at.layer] = pool(self.reference, at).mean(0).to(x.device)
        return self.means[at.site, at.layer].expand_as(x)


@dataclass(frozen=True, repr=False)
class Resample(Known):
    """One of a reference's real tokens, drawn for each row and position."""

    reference: Trace
    seed: int

    def __repr__(self) -> str:
        return f"resample, seed {self.seed}"

    def check(self, places: Places, config: LlamaConfig) -> None:
        check_trace("ablate(reference=...)", self.reference, places, config)

    def __call__(self, x: Tensor, at: At) -> Tensor:
        tokens = pool(self.reference, at)
        row_RT = at.rows[:, None].expand_as(at.positions)
        drawn = draws(self.seed, row_RT.cpu().numpy(), at.positions.cpu().numpy()) % np.uint64(len(tokens))
        return tokens[torch.from_numpy(drawn.astype(np.int64)).to(tokens.device)].to(x.device)


@dataclass(frozen=True, repr=False)
class Patch(Known):
    """A trace's value at the same layer, head, absolute position and row, or its only row."""

    source: Trace

    def __repr__(self) -> str:
        return "patch"

    def check(self, places: Places, config: LlamaConfig) -> None:
        check_trace("patch(source=...)", self.source, places, config)

    def check_reading(self, places: Places, reading: Reading) -> None:
        """Refuses rows and positions that the source does not have, and another length where no position is named."""
        if reading.generated:
            return  # what it does not reach is left alone
        chosen_BT = places.chosen(reading)
        have_BT = self.source.positions
        assert have_BT is not None
        for row, chosen_T in enumerate(chosen_BT):
            if not chosen_T.any():
                continue
            if len(have_BT) > 1 and row >= len(have_BT):
                raise ValueError(f"patch(source=...) has {len(have_BT)} rows, but row {row} is to be patched")
            have = have_BT[row if len(have_BT) > 1 else 0]
            position_T = reading.position_BT[row]
            theirs, ours = int(have.max()) + 1, int(position_T.max()) + 1
            if not places.named and (ours > theirs or (reading.whole and ours != theirs)):
                raise ValueError(
                    f"patch(source=...) has {theirs} tokens, but row {row} has {ours}{self._parting(row, reading)}: "
                    "expected as many, or positions="
                )
            if missing := set(position_T[chosen_T].tolist()) - set(have.tolist()):
                raise ValueError(
                    f"patch(source=...) has no position {min(missing)} in row {row}: it has positions "
                    f"{sorted({p for p in have.tolist() if p >= 0})}"
                )

    def _parting(self, row: int, reading: Reading) -> str:
        """Where the source and these tokens part."""
        if self.source.input_ids is None:
            return ""
        ids_BT = self.source.input_ids
        theirs = ids_BT[row if len(ids_BT) > 1 else 0].tolist()
        real_T = reading.position_BT[row] >= 0
        ours = reading.ids_BT[row][real_T].tolist()
        first = int(reading.position_BT[row][real_T].min())
        pairs = zip(theirs[first:], ours, strict=False)
        parting = next((first + n for n, (a, b) in enumerate(pairs) if a != b), None)
        return "" if parting is None else f" (the tokens part at position {parting})"

    def __call__(self, x: Tensor, at: At) -> Tensor:
        """x where the source has nothing."""
        source = self.source.at(at.site, at.layer).to(x.device)
        have_BS, assumed = self.source.positions, at.rows.cpu()
        assert have_BS is not None
        rows_R = assumed if len(have_BS) > 1 else torch.zeros_like(assumed)
        same_RTS = have_BS[rows_R][:, None] == at.positions.cpu()[:, :, None]
        found_RT = same_RTS.any(-1) & (at.positions.cpu() >= 0)
        column_RT = same_RTS.int().argmax(-1).to(x.device)
        row_R1 = rows_R[:, None].to(x.device)
        if at.site in ("scores", "pattern"):
            y = x.clone()
            length = min(x.shape[-1], source.shape[-1])
            taken = source[row_R1, :, column_RT].transpose(1, 2)  # [R, H, T, S]
            y[..., :length] = taken[..., :length]
            y[..., length:] = 0.0 if at.site == "pattern" else -torch.inf
            return torch.where(found_RT.to(x.device)[:, None, :, None], y, x)
        taken = source[row_R1, column_RT].to(x.dtype)
        return torch.where(found_RT.to(x.device).view(*found_RT.shape, *[1] * (x.dim() - 2)), taken, x)


@dataclass(frozen=True, repr=False)
class Steer(Known):
    """x + strength · direction."""

    direction: Tensor
    strength: float
    layers: tuple[int, ...] | None  # those that a direction [layers, D] speaks of; None: all

    def __repr__(self) -> str:
        return f"steer by {self.strength:g}"

    def check(self, places: Places, config: LlamaConfig) -> None:
        width = last_size("steer", places, config)
        shape = list(self.direction.shape)
        layers = config.num_hidden_layers if places.layers is None else len(places.layers)
        wanted = [[width]] + ([[layers, width]] if places.site.layered else [])
        if self.direction.dim() == 2 and self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"steer({places.site.name!r}): layers={[*self.layers]} names a layer twice")
        if shape not in wanted:
            said = " or ".join(map(str, wanted))
            raise ValueError(f"steer({places.site.name!r}): the direction has shape {shape}, expected {said}")

    def __call__(self, x: Tensor, at: At) -> Tensor:
        direction = self.direction
        if direction.dim() == 2:
            assert at.layer is not None
            direction = direction[at.layer if self.layers is None else self.layers.index(at.layer)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide + self.strength * direction.to(wide)


@dataclass(frozen=True, repr=False)
class ProjectOut(Known):
    """x without its part along some directions; basis [D, K] is orthonormal, float64."""

    basis: Tensor

    def __repr__(self) -> str:
        return f"project_out {self.basis.shape[1]}"

    def check(self, places: Places, config: LlamaConfig) -> None:
        width = last_size("project_out", places, config)
        if self.basis.shape[0] != width:
            raise ValueError(
                f"project_out({places.site.name!r}): the directions have {self.basis.shape[0]} numbers each, "
                f"expected {width}"
            )

    def __call__(self, x: Tensor, at: At) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        basis = self.basis.to(wide)
        return wide - (wide @ basis) @ basis.T


# ---- what a reference trace has


def check_trace(what: str, trace: Trace, places: Places, config: LlamaConfig) -> None:
    """Refuses a trace without this site, or of several moments or alternatives."""
    site = places.site
    if trace.leading:
        raise ValueError(f"{what} is a trace of several moments or alternatives: expected one, of at='now'")
    if trace.positions is None:
        raise ValueError(f"{what} has no positions: expected the trace of a probe or a capture")
    if site.name not in trace.sites:
        raise ValueError(f"{what} does not hold {site.name!r}: it holds {sorted(trace.sites)}")
    if site.layered:
        wanted = range(config.num_hidden_layers) if places.layers is None else places.layers
        have = trace.layers.get(site.name, [])
        if missing := sorted(set(wanted) - set(have)):
            raise ValueError(f"{what} does not hold layer {missing[0]} of {site.name!r}: it holds layers {have}")
    sizes = [size for size in site.sizes(config) if size is not None]
    values = trace.at(site.name, trace.layers[site.name][0] if site.layered else None)
    found = [values.shape[1]] if site.square else list(values.shape[2:])
    if found != sizes:
        raise ValueError(f"{what} has {site.name!r} of shape {found} per token, but this model's is {sizes}")
    if not bool((trace.positions >= 0).any()):
        raise ValueError(f"{what} holds no real token")


def pool(trace: Trace, at: At) -> Tensor:
    """A site's value at every real token of a trace, [tokens, …], in float32 at least."""
    assert trace.positions is not None
    values = trace.at(at.site, at.layer)
    values = values[(trace.positions >= 0).to(values.device)]
    return values.to(torch.promote_types(values.dtype, torch.float32))


def last_size(what: str, places: Places, config: LlamaConfig) -> int:
    """The length of a site's last axis; refuses one that is as long as the sequence."""
    size = places.site.sizes(config)[-1]
    if size is None:
        raise ValueError(f"{what}({places.site.name!r}): its last axis is tokens, so it has no directions: fw.Edit")
    return size


def draws(seed: int, row: np.ndarray, position: np.ndarray) -> np.ndarray:
    """A uint64 for each (seed, row, position), by three rounds of splitmix64 (Steele et al. 2014)."""
    state = np.full(row.shape, seed % (1 << 64), np.uint64)
    with np.errstate(over="ignore"):
        for number in (row, position, np.zeros_like(row)):
            state = state + number.astype(np.int64).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
