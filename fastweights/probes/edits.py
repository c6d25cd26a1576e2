"""Edits: changes of a site at chosen places, and the ones that everybody makes.

Shape suffixes: R rows that an edit acts in, T tokens, B rows of a trace, S places in its rows, D width of the site's
last axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import LlamaConfig
from .places import Places, Reading, numbers
from .sites import site_of
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


class Edit:
    """A change of a site at chosen places.

    Args:
        site: a name of `fw.SITES`, one of TransformerLens ("blocks.5.attn.hook_z") or a module's
            ("model.layers.5.mlp").
        change: (x, at) → like x. x [R, T, …] is the site in the R rows where the edit acts, with all T tokens of the
            pass (`scores` and `pattern`: [R, H, T, S]); it is a copy and may be changed in place. Only the chosen
            places are taken from what it returns, cast to the site's dtype.
        layers, heads, units, rows: a number, several of them, or None for all; from 0.
        positions: as `update` of `Episode.feed`; or "last", whatever chooses the next token: the last real token of a
            feed or probe, every generated token, and in an exam every token from the prompt's last on; or a list of
            positions for each row. None = all. Padding is never touched.

    Raises:
        ValueError: a site that does not exist, or places that it does not have.

    Example:
        double = fw.Edit("z", lambda x, at: 2 * x, layers=5, heads=[0, 3], positions="last")
        episode.feed(input_ids, edits=[double])
    """

    def __init__(
        self,
        site: str,
        change: Change,
        *,
        layers: Any = None,
        heads: Any = None,
        units: Any = None,
        positions: Any = None,
        rows: Any = None,
    ):
        if not callable(change):
            raise ValueError(f"Edit(change={change!r}): expected a function (x, at) that returns something like x")
        self.change = change
        self.places = Places(site, layers, heads, units, positions, rows)

    def __repr__(self) -> str:
        places = self.places
        given = {"layers": places.layers, "heads": places.heads, "units": places.units, "rows": places.rows}
        given |= {"positions": places.positions}
        said = "".join(f", {name}={value!r}" for name, value in given.items() if value is not None)
        what = getattr(self.change, "__name__", None) or repr(self.change)
        return f"Edit({places.site.name!r}, {what}{said})"

    def check(self, config: LlamaConfig) -> None:
        """Refuses what a model of this form does not have."""
        self.places.check(config)
        if isinstance(self.change, Known):
            self.change.check(self.places, config)

    def check_reading(self, reading: Reading) -> None:
        """Refuses tokens that this edit cannot be made on."""
        if reading.whole:
            self.places.check_positions(int(reading.position_BT.max()) + 1)
        if isinstance(self.change, Patch):
            self.change.check_reading(self.places, reading)


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


def ablate(site: str, by: str = "zero", reference: Trace | None = None, seed: int = 0, **places: Any) -> Edit:
    """Takes away what a site holds.

    Args:
        by: "zero"; "mean": the mean over all real tokens of `reference`, whatever their number; "resample": one of
            those tokens, drawn by (seed, row, position), so that a prompt may be split as one likes.
        reference: a trace that holds the site, at one moment.
        places: as `Edit`.

    Example:
        reference = episode.probe(others, sites="z")
        episode.generate(input_ids, 40, edits=[fw.ablate("z", "mean", reference, layers=23, heads=3)])
    """
    if by == "zero":
        if reference is not None:
            raise ValueError("ablate(by='zero') takes no reference: expected by='mean' or by='resample' with one")
        return Edit(site, Zero(), **places)
    if by not in ("mean", "resample"):
        raise ValueError(f"ablate(by={by!r}): expected 'zero', 'mean' or 'resample'")
    if not isinstance(reference, Trace):
        raise ValueError(f"ablate(by={by!r}) needs reference=, a trace of other prompts with {site!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"ablate(seed={seed!r}): expected a whole number")
    edit = Edit(site, Mean(reference) if by == "mean" else Resample(reference, seed), **places)
    if edit.places.site.square:
        raise ValueError(
            f"ablate({site!r}, {by!r}): a token has a number for each token before it, so there is no other token's to "
            "take: expected by='zero'"
        )
    return edit


def patch(site: str, source: Trace, **places: Any) -> Edit:
    """Puts in what another run held at the same layer, head, absolute position and row (or in its only row).

    Args:
        source: a trace that holds the site, at one moment. Generated tokens that it does not reach are left alone.
        places: as `Edit`. Without positions the two runs must have the same number of tokens.
    """
    if not isinstance(source, Trace):
        raise ValueError(f"patch({site!r}) got a {type(source).__name__}, expected the trace of another run")
    return Edit(site, Patch(source), **places)


def steer(site: str, direction: Tensor, strength: float = 1.0, **places: Any) -> Edit:
    """Adds strength · direction.

    Args:
        direction: [D], D being the site's last axis, or [layers, D], one for each of the named layers.
    """
    direction = _finite(f"steer({site!r}): the direction", direction)
    _finite(f"steer({site!r}): the strength", strength)
    layer = site_of(site)[1]
    layers = numbers("layer", places.get("layers")) if layer is None else (layer,)
    return Edit(site, Steer(direction, float(strength), layers), **places)


def project_out(site: str, directions: Tensor, **places: Any) -> Edit:
    """Takes away the part of x along some directions: x − Q Qᵀ x, Q an orthonormal basis of them.

    Args:
        directions: [D] or [K, D], D being the site's last axis; they need not be orthogonal.
    """
    given = _finite(f"project_out({site!r}): directions", directions).double().cpu()
    rows_KD = given[None] if given.dim() == 1 else given
    if rows_KD.dim() != 2 or not bool(rows_KD.norm(dim=-1).all()):
        raise ValueError(
            f"project_out({site!r}) got directions of shape {list(given.shape)}, expected [D] or [K, D], "
            "none of them zero"
        )
    left, values, _ = torch.linalg.svd(rows_KD.T, full_matrices=False)
    return Edit(site, ProjectOut(left[:, values > values[0] * 1e-10]), **places)


def _finite(what: str, given: Any) -> Tensor:
    """A copy of finite real numbers, as floats."""
    try:
        numbers_ = torch.as_tensor(given).detach().clone()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what} is a {type(given).__name__}: expected numbers") from None
    numbers_ = numbers_ if numbers_.is_floating_point() else numbers_.to(torch.float64)
    if not bool(numbers_.isfinite().all()):
        raise ValueError(f"{what} is not finite")
    return numbers_


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
