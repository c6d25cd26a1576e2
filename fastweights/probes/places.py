"""Places: where in a site an edit acts, or what of it a capture keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import Positions
from ..config import LlamaConfig
from ..inputs import TokenIds, written
from .sites import site_of


@dataclass(frozen=True)
class Reading:
    """The tokens of one feed, one question or one call of the model.

    ids_BT: int64, on the CPU. position_BT: absolute positions, −1 = padding, on the CPU.
    generated: whether the model produced these tokens itself. whole: whether no other feed goes on from here: a probe.
    start_B: the column of each row from which on every token chooses the next one of an exam's answer; None: no exam.
    """

    ids_BT: Tensor
    position_BT: Tensor
    generated: bool = False
    whole: bool = False
    start_B: Tensor | None = None

    @staticmethod
    def of(ids_BT: Tensor, positions: Positions, generated: bool = False, whole: bool = False) -> Reading:
        """The tokens that stand at these positions."""
        position_BT = positions.position_BT
        if positions.real_BT is not None:
            position_BT = position_BT.masked_fill(~positions.real_BT, -1)
        return Reading(ids_BT.cpu(), position_BT.cpu(), generated, whole)

    @property
    def last_B(self) -> Tensor:
        """The column of each row's last real token; of a row that is all padding, column 0."""
        column_T = torch.arange(self.position_BT.shape[1], device="cpu")
        return ((self.position_BT >= 0) * column_T).amax(1)


class Places:
    """A site and the places in it, understood or refused; nothing of a model is looked at before `of`.

    Args:
        layers, heads, units, rows: a number, several, or None for all; from 0.
        positions: as `update=` of `Episode.feed`; "last" (the last real token of a feed or probe, every generated
            token, and in an exam every token from the prompt's last on); a list of positions per row; None for all.
    """

    def __init__(self, site: str, layers: Any, heads: Any, units: Any, positions: Any, rows: Any):
        self.name: str = site
        self.site, named = site_of(site)
        self.linear: str | None = None  # the name of the linear that a plastic site reads or writes
        self.layers = numbers("layer", layers)
        if named is not None:
            if self.layers not in (None, (named,)):
                raise ValueError(f"site {site!r} names layer {named}, but layers={layers!r}")
            self.layers = (named,)
        self.heads, self.units = numbers("head", heads), numbers("unit", units)
        self.rows = numbers("row", rows)
        self.positions = _positions(positions)
        if not self.site.layered and self.layers is not None:
            raise ValueError(f"layers={layers!r}: {self.site.name!r} does not lie in a layer")
        if self.site.heads is None and self.heads is not None:
            raise ValueError(f"heads={heads!r}: {self.site.name!r} has no heads")
        if self.site.square and self.units is not None:
            raise ValueError(f"units={units!r}: {self.site.name!r} has no units: its last axis is tokens")

    @property
    def named(self) -> bool:
        """Whether positions were named."""
        return self.positions is not None

    def of(self, config: LlamaConfig) -> Places:
        """These places in a model, at the site that their name means there.

        Raises:
            ValueError: a site, layers, heads, units or positions that it does not have.
        """
        own = copy(self)
        own.site, _ = site_of(self.name, config.family)
        if (why := own.site.missing(config)) is not None:
            raise ValueError(f"site {self.name!r} does not exist here: {why}")
        if own.site.name == "logits" != self.name and config.final_logit_softcapping is not None:
            raise ValueError(f"site {self.name!r} is taken before the cap: expected 'logits', which is taken after it")
        if own.site.side == "plastic":
            own.linear = own.site.linear(config.family)
        own._check(config)
        return own

    def _check(self, config: LlamaConfig) -> None:
        """Refuses layers, heads, units and positions that this model does not have."""
        self.check_positions(config.max_position_embeddings)
        sizes = dict(zip(self.site.axes, self.site.sizes(config), strict=True))
        head = self.site.heads
        limits = [("layer", self.layers, config.num_hidden_layers), ("unit", self.units, sizes[self.site.axes[-1]])]
        limits.append(("head", self.heads, sizes[head] if head is not None else None))
        for what, given, size in limits:
            if given is not None and size is not None and max(given) >= size:
                whose = "this model" if what == "layer" else repr(self.site.name)
                raise ValueError(f"{what} {max(given)} does not exist: {whose} has {what}s 0 to {size - 1}")

    def check_rows(self, rows: int) -> None:
        """Refuses rows that a batch does not have."""
        if self.rows is not None and max(self.rows) >= rows:
            raise ValueError(f"row {max(self.rows)} does not exist: there are rows 0 to {rows - 1}")
        if isinstance(self.positions, PerRow) and len(self.positions.rows) != rows:
            raise ValueError(f"positions has lists for {len(self.positions.rows)} rows, but there are {rows}")

    def check_positions(self, end: int) -> None:
        """Refuses named positions from `end` on."""
        latest = -1
        if isinstance(self.positions, PerRow):
            latest = max((max(row, default=-1) for row in self.positions.rows), default=-1)
        elif isinstance(self.positions, tuple):
            latest = max(self.positions, default=-1)
        if latest >= end:
            raise ValueError(f"position {latest} does not exist here: there are positions 0 to {end - 1}")

    def chosen(self, reading: Reading) -> Tensor:
        """Which tokens are meant, bool [B, T] on the CPU; padding never is."""
        position_BT = reading.position_BT
        chosen_BT = position_BT >= 0
        rows = len(position_BT)
        self.check_rows(rows)
        if self.rows is not None:
            named_B = torch.isin(torch.arange(rows, device="cpu"), torch.tensor(self.rows, device="cpu"))
            chosen_BT = chosen_BT & named_B[:, None]
        if self.positions is None:
            return chosen_BT
        if isinstance(self.positions, PerRow):
            pairs = zip(position_BT, self.positions.rows, strict=True)
            wanted = [torch.isin(p, torch.tensor(row, dtype=torch.int64, device="cpu")) for p, row in pairs]
            return chosen_BT & torch.stack(wanted)
        if isinstance(self.positions, str) and self.positions == "last":
            if reading.generated:
                return chosen_BT
            column_T, last_B = torch.arange(position_BT.shape[1], device="cpu"), reading.last_B
            start_B = last_B if reading.start_B is None else reading.start_B
            return chosen_BT & (column_T >= start_B[:, None]) & (column_T <= last_B[:, None])
        given = list(self.positions) if isinstance(self.positions, tuple) else self.positions
        return chosen_BT & written(given, reading.ids_BT, position_BT, reading.generated, "positions")


@dataclass(frozen=True)
class PerRow:
    """Positions of each row."""

    rows: tuple[tuple[int, ...], ...]


def numbers(what: str, given: Any) -> tuple[int, ...] | None:
    """A number or several of them, from 0; None stays None.

    Raises:
        ValueError: none at all, a negative one, or something else.
    """
    if given is None:
        return None
    value = given.tolist() if hasattr(given, "tolist") else given
    several = isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, str)
    items = list(value) if several else [value]
    items = [item.item() if hasattr(item, "item") else item for item in items]
    if not items or any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise ValueError(f"{what}s={given!r}: expected a whole number, several of them, or None for all")
    if min(items) < 0:
        raise ValueError(f"{what} {min(items)} is negative: {what}s count from 0")
    return tuple(sorted(items) if isinstance(value, (set, frozenset)) else items)


def _positions(given: Any) -> Any:
    """Positions as `Places` keeps them: None, a word, a tuple of numbers, `PerRow`, or what `written` takes."""
    if given is None or (isinstance(given, str) and given in ("last", "all", "none", "prompt", "generated")):
        return None if given == "all" else given
    if isinstance(given, int) and not isinstance(given, bool):
        return numbers("position", given)
    if callable(given) or isinstance(given, TokenIds):
        return given
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise ValueError(
            f"positions={given!r}: expected 'last', 'all', 'none', 'prompt', 'generated', positions, a bool mask, "
            "fw.token_ids([...]), a function (position, token_id) or a list of positions per row"
        )
    if isinstance(given, (Tensor, np.ndarray)):
        if given.dtype in (torch.bool, np.dtype(bool)):
            return given
        given = given.tolist()
        given = [given] if isinstance(given, int) else given
    items = list(given)
    if items and all(isinstance(item, (Sequence, range, Tensor, np.ndarray)) for item in items):
        rows = [item.tolist() if hasattr(item, "tolist") else list(item) for item in items]
        if any(isinstance(value, bool) for row in rows for value in row):
            return torch.tensor(rows, device="cpu")
        return PerRow(tuple(() if not row else numbers("position", row) or () for row in rows))
    if any(isinstance(item, bool) for item in items):
        return torch.tensor(items, device="cpu")
    return () if not items else numbers("position", items)
