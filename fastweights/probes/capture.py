"""`edited` and `capture`: what stands for every run inside a `with` block.

Shape suffixes: B rows, T tokens of one pass, T′ tokens kept of all passes, S keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import warn
from ..model import Llama
from .edits import Edit
from .places import Places
from .sites import Site, names_of, site_of
from .taps import Bound, Look, Rows, Taps
from .trace import Trace


class Done(Sequence):
    """Where edits have acted: `done[i]` is {row: positions} of the i-th."""

    def __init__(self, bounds: Sequence[Bound]):
        self.bounds = bounds

    def __getitem__(self, number: Any) -> Any:
        return {row: sorted(positions) for row, positions in sorted(self.bounds[number].fired.items())}

    def __len__(self) -> int:
        return len(self.bounds)

    def __repr__(self) -> str:
        return repr(list(self))


def bind(edits: Edit | Iterable[Edit], model: Llama, linears: Mapping[tuple[int, str], Any] | None) -> list[Bound]:
    """Edits, checked against a model.

    linears: its plastic linears by (layer, name); None: they may come and go.

    Raises:
        ValueError: no edits, or places that the model does not have.
    """
    check_model(model)
    bounds = []
    for edit in list(edits) if isinstance(edits, Iterable) else [edits]:
        if not isinstance(edit, Edit):
            raise ValueError(f"edits holds a {type(edit).__name__}, expected fw.Edit, fw.ablate, fw.patch, …")
        bounds.append(Bound(edit.of(model.config)))
        if linears is not None:
            check_plastic(bounds[-1].edit.places, linears)
    return bounds


def check_model(model: Any) -> None:
    """Refuses what is no model of ours."""
    if not isinstance(model, Llama):
        raise ValueError(f"got a {type(model).__name__}, expected the model that fw.load returns")


def check_plastic(places: Places, linears: Mapping[tuple[int, str], Any]) -> None:
    """Refuses what a plastic linear reads and writes where the linear is frozen, or its rule is not neuron-local."""
    if places.site.side != "plastic":
        return
    name = places.linear
    layers = sorted(layer for layer, linear in linears if linear == name)
    wanted = layers if places.layers is None else places.layers
    missing = sorted(set(wanted) - set(layers))
    if missing or not layers:
        if not layers:
            raise ValueError(f"site {places.site.name!r}: no {name} of this model is plastic (fw.attach makes it so)")
        raise ValueError(
            f"site {places.site.name!r}: {name} of layer {missing[0]} is not plastic; plastic are layers {layers}"
        )
    check_events(places, linears)


def check_events(places: Places, linears: Mapping[tuple[int, str], Any]) -> None:
    """Refuses the key and the value of a rule that is not neuron-local."""
    if not places.site.name.endswith((".key", ".value")):
        return
    for layer, linear in linears:
        there = linear == places.linear and (places.layers is None or layer in places.layers)
        if there and not linears[layer, linear].rule.neuron_local:
            rule = type(linears[layer, linear].rule).__name__
            raise ValueError(
                f"site {places.site.name!r}: {rule} of layer {layer} is not neuron-local, and makes its event when the "
                "next token is known; expected a neuron-local rule"
            )


@contextlib.contextmanager
def edited(model: Llama, *edits: Edit) -> Iterator[Done]:
    """Makes edits in every run of a model inside the block: feed, generate, probe, surgery, model(ids).

    The edits belong to the thread that enters the block. `attach` and `detach` may be called inside.

    Args:
        edits: they act in order, before those that a call inside brings.

    Yields:
        What has been edited so far: `done[i]` is {row: positions} of the i-th edit.

    Raises:
        ValueError: places that the model does not have; a generator made inside is used after the block.

    Warns:
        UserWarning: an edit never acted.

    Example:
        with fw.edited(model, fw.ablate("z", layers=12, heads=4)) as done:
            model(input_ids)
        done[0]  # {0: [0, 1, 2, 3]}
    """
    bounds = bind(edits, model, None)
    with model.binding.tapped(Taps(bounds)):
        yield Done(bounds)
    for number, bound in enumerate(bounds):
        if not bound.fired:
            warn(f"edited(): edit {number}, {bound.edit!r}, never acted")


class Recording(Look):
    """A look that keeps named sites of every pass, but of probes."""

    gradient = False

    def __init__(self, model: Llama, places: Sequence[Places]):
        depth = range(model.config.num_hidden_layers)
        self.model_type = model.config.model_type
        self.places = {
            (each.site, layer): each
            for each in places
            for layer in ((depth if each.layers is None else each.layers) if each.site.layered else (None,))
        }
        self.named = list(self.places)
        self.passes: list[tuple[Tensor, Tensor]] = []  # ids and positions [B, T] of each, −1 where nothing is kept
        self.rows: Rows | None = None
        # of each site and layer, per pass that came by: [B, T, …]
        self.seen: dict[tuple[str, int | None], dict[int, Tensor]] = {(site.name, n): {} for site, n in self.named}

    def points(self, model: Llama) -> Iterable[tuple[Site, int | None]]:
        """The sites that it looks at, and their layers."""
        return self.named

    def see(self, site: Site, layer: int | None, x: Tensor, rows: Rows, column_RT: Tensor | None) -> None:
        """Keeps a copy of the places that were named."""
        places = self.places[site, layer]
        if rows is not self.rows:
            self._begin(rows)
        x = x.detach()
        if column_RT is not None:  # the last tokens alone: the others are not known
            whole = x.new_zeros(len(x), self.passes[-1][0].shape[1], *x.shape[2:])
            x = whole.scatter(1, column_RT.view(*column_RT.shape, *[1] * (x.dim() - 2)).expand_as(x), x)
        if places.rows is not None:
            x = x[list(places.rows)]
        if places.heads is not None:
            x = x.index_select(1 if site.square else 2, torch.tensor(places.heads, device=x.device))
        if places.units is not None:
            x = x[..., list(places.units)]
        self.seen[site.name, layer][len(self.passes) - 1] = x.clone()

    def _begin(self, rows: Rows) -> None:
        reading, columns = rows.reading, rows.columns
        if self.passes and len(self.passes[-1][0]) != len(reading.ids_BT):
            raise ValueError(
                f"capture() has seen a batch of {len(self.passes[-1][0])}, and now one of {len(reading.ids_BT)}: "
                "expected one batch size inside the block"
            )
        chosen_BT = torch.zeros_like(reading.ids_BT, dtype=torch.bool)
        for places in self.places.values():
            chosen_BT |= places.chosen(reading)
        position_BT = reading.position_BT.masked_fill(~chosen_BT, -1)
        self.rows = rows
        self.passes.append((reading.ids_BT[:, columns], position_BT[:, columns]))

    def passes_seen(self) -> int:
        """How many passes it has seen."""
        return len(self.passes)

    def forget(self, after: int) -> None:
        """Forgets the passes after so many."""
        del self.passes[after:]
        self.rows = None
        for name, parts in self.seen.items():
            self.seen[name] = {number: x for number, x in parts.items() if number < after}

    def trace(self) -> Trace:
        """What was kept, the passes behind one another; tokens that no row chose are left out."""
        if not self.passes:
            raise ValueError("capture(): nothing ran inside the block")
        ids_BT, position_BT = (torch.cat(parts, dim=1) for parts in zip(*self.passes, strict=True))
        first = next(iter(self.places.values()))
        if first.rows is not None:
            ids_BT, position_BT = ids_BT[list(first.rows)], position_BT[list(first.rows)]
        column = (position_BT >= 0).any(0).nonzero()[:, 0]
        if not len(column):
            warn(f"capture(): positions chose none of the {position_BT.shape[1]} tokens that ran inside the block")
        layers: dict[str, list[int]] = {}
        tensors: dict[str, list[Tensor]] = {}
        seen = {site.name for site, layer in self.named if self.seen[site.name, layer]}
        for site, layer in self.named:
            frozen = site.side == "plastic" and self.places[site, layer].layers is None and site.name in seen
            if frozen and not self.seen[site.name, layer]:
                continue  # of all layers, those that are plastic
            whole = self._joined(site, layer, self.seen[site.name, layer])
            axis = 2 if site.square else 1
            tensors.setdefault(site.name, []).append(whole.index_select(axis, column.to(whole.device)))
            if layer is not None:
                layers.setdefault(site.name, []).append(layer)
        sites = {name: torch.stack(parts) if name in layers else parts[0] for name, parts in tensors.items()}
        return Trace(sites, layers, ids_BT[:, column], position_BT[:, column], model_type=self.model_type)

    def _joined(self, site: Site, layer: int | None, parts: dict[int, Tensor]) -> Tensor:
        """[B, T′, …] over all passes; zeros where a pass did not come by: an event that was not written."""
        if not parts:
            where = "" if layer is None else f" of layer {layer}"
            raise ValueError(f"capture(): no run inside the block came by {site.name!r}{where}")
        example = next(iter(parts.values()))
        axis, keys = (2 if site.square else 1), max(x.shape[-1] for x in parts.values())
        whole = []
        for number, (ids_BT, _) in enumerate(self.passes):
            x = parts.get(number)
            if x is None:
                shape = list(example.shape)
                shape[axis] = ids_BT.shape[1]
                x = example.new_zeros(shape)
            if site.square:  # later tokens may look at more keys
                x = F.pad(x, (0, keys - x.shape[-1]), value=0.0 if site.name == "pattern" else -torch.inf)
            whole.append(x)
        return torch.cat(whole, dim=axis)


@contextlib.contextmanager
def capture(
    model: Llama,
    sites: str | Collection[str],
    *,
    layers: Any = None,
    heads: Any = None,
    units: Any = None,
    positions: Any = None,
    rows: Any = None,
) -> Iterator[Trace]:
    """Collects copies at named sites, after the edits, in every feed, generate and model(ids) inside the block.

    Probes inside are not collected: they have traces of their own. The passes of the block must be of one batch size.

    Args:
        sites: one name or several, see `fw.SITES`.
        layers, heads, units, positions, rows: what to keep, as `fw.Edit` takes them.

    Yields:
        A trace that is filled at the end of the block. T′ are the kept tokens of all passes, in their order; "key" and
        "value" of a token that was not written are zero. "logits" are zero where the run did not compute them.

    Raises:
        ValueError: sites or places that do not exist; a pass of another batch size; at the end, that nothing ran.

    Example:
        with fw.capture(model, ["z", "pattern"], layers=[3, 4]) as trace:
            episode.feed(input_ids)
        trace["pattern", 3]  # [B, H, T′, S]
    """
    check_model(model)
    names = names_of(sites)
    if not names:
        raise ValueError("capture(sites=[]): expected at least one site")
    found = [site_of(name, model.config.family) for name in names]
    if heads is not None and not any(site.heads for site, _ in found):
        raise ValueError(f"capture(heads={heads!r}): {names} have no heads")
    if layers is not None and not any(site.layered for site, _ in found):
        raise ValueError(f"capture(layers={layers!r}): {names} do not lie in layers")
    places = []
    for name, (site, named) in zip(names, found, strict=True):
        own = {"heads": heads if site.heads else None, "units": None if site.square else units}
        own["layers"] = named if named is not None else layers if site.layered else None
        places.append(Places(name, positions=positions, rows=rows, **own).of(model.config))
    recording = Recording(model, places)
    trace = Trace()
    with model.binding.tapped(Taps(looks=[recording])):
        yield trace
    trace.__dict__.update(recording.trace().__dict__)
