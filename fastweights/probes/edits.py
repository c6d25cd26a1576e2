"""Edits: changes of a site at chosen places, and the ones that everybody makes."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..config import LlamaConfig
from .changes import Change, Known, Mean, Patch, ProjectOut, Resample, Steer, Zero
from .places import Places, Reading, numbers
from .sites import site_of
from .trace import Trace


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

    def of(self, config: LlamaConfig) -> Edit:
        """This edit in a model of this form; refuses what that does not have."""
        own = copy(self)
        own.places = self.places.of(config)
        if isinstance(self.change, Known):
            self.change.check(own.places, config)
        return own

    def check_reading(self, reading: Reading) -> None:
        """Refuses tokens that this edit cannot be made on."""
        if reading.whole:
            self.places.check_positions(int(reading.position_BT.max()) + 1)
        if isinstance(self.change, Patch):
            self.change.check_reading(self.places, reading)


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
