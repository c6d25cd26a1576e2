"""The pictures of a record, and one call that draws the grid of a sweep. See `canvas` for how they are drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import canvas
from .text import Recorded, most, plain


def heat_map(
    values,
    *,
    y: str,
    x: str,
    y_labels: Sequence[str] | None = None,
    x_labels: Sequence[str] | None = None,
    title: str = "",
    label: str = "",
    center: float | None = None,
    strongest: int = 5,
    path: str | Path | None = None,
):
    """Draws the grid of a sweep, layer × head or layer × position, and marks its strongest cells with their numbers.

    Row 0 is at the bottom, as layers are counted. Cells that are not finite are grey.

    Args:
        values: [Y, X], a tensor, array or list; for a sweep `trace.scores.difference.reshape(L, H)`.
        y, x: what the rows and the columns are: "layer", "head".
        y_labels, x_labels: one text per row or column, such as tokens; None: their numbers.
        title: above the picture.
        label: what the numbers are, with their unit, at the colour bar.
        center: the value that means "no effect": colours run from blue below it to red above it, equally far. None:
            one scale from the smallest to the largest.
        strongest: how many cells are marked: those farthest from `center`, without one the largest.
        path: file to write, .png, .svg or .pdf.

    Returns:
        The matplotlib Figure, which pyplot does not hold.

    Raises:
        ValueError: for values that are no grid or hold nothing finite, labels of another number, another kind of file.
        ImportError: without matplotlib (`pip install "fastweights[report]"`).

    Example:
        sweep = [fw.ablate("z", layers=l, heads=h) for l in range(L) for h in range(H)]
        effect_LH = episode.probe(exam, sweep=sweep).scores.difference.reshape(L, H) - untouched
        fw.heat_map(effect_LH, y="layer", x="head", center=0, label="change of the logit difference", path="heads.png")
    """
    values_YX = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if values_YX.dim() != 2 or not values_YX.isfinite().any():
        what = f"shape {list(values_YX.shape)}" if values_YX.dim() != 2 else "no finite number"
        raise ValueError(f"heat_map() got values with {what}: expected a grid [{y}, {x}] of numbers")
    rows, columns = values_YX.shape
    for name, labels, count in (("y_labels", y_labels, rows), ("x_labels", x_labels, columns)):
        if labels is not None and len(labels) != count:
            raise ValueError(f"heat_map() got {len(labels)} {name} for {count} of them: expected one each")
    if isinstance(strongest, bool) or not isinstance(strongest, int) or strongest < 0:
        raise ValueError(f"heat_map(strongest={strongest!r}): expected a whole number, 0 or more")
    if path is not None and Path(path).suffix not in canvas.UNDATED:
        raise ValueError(f"heat_map(path={str(path)!r}): expected a name that ends in .png, .svg or .pdf")
    with canvas.style():
        across = min(canvas.WIDEST - 1.7, max(3.0, 0.42 * columns))
        down = min(11.0, max(2.2, (0.24 if rows > 12 else 0.34) * rows))
        fig = canvas.figure(across + 1.7, down + 1.1)
        axes = fig.add_subplot()
        image = _image(axes, values_YX, center)
        canvas.bar(fig, image, axes, label)
        axes.set(title=title, xlabel=x, ylabel=y)
        names_x = [canvas.label(text) for text in x_labels] if x_labels else [str(n) for n in range(columns)]
        names_y = [canvas.label(text) for text in y_labels] if y_labels else [str(n) for n in range(rows)]
        canvas.name_ticks(axes.xaxis, names_x, across, turned=max(map(len, names_x)) > 3)
        canvas.name_ticks(axes.yaxis, names_y, down, turned=False)
        outside = _mark(axes, image, values_YX, center or 0.0, strongest, 72 * across / columns)
        if outside:
            said = textwrap.fill(f"strongest ({y}, {x}): {' · '.join(outside)}", int(across * 13))
            axes.set_xlabel(f"{x}\n{said}")
        if path is not None:
            canvas.save(fig, Path(path))
    return fig


def patch_picture(whole: Mapping[str, Any]):
    """The error of the stream behind each layer, with the events of a context patch and without them: a Figure.

    Args:
        whole: what `Patch.to_dict()` gives.

    Raises:
        ImportError: without matplotlib (`pip install "fastweights[report]"`).
    """
    with canvas.style():
        fig = canvas.figure(6.6, 3.4)
        axes = fig.add_subplot()
        lines = (("without events", "unpatched_layer_error", 1), ("with events", "layer_error", 0))
        layers = range(len(whole["layer_error"][0]))
        for name, key, colour in lines:
            # an error of 0 has no place on this axis: it is drawn at the bottom
            errors = [max(error, 1e-17) for error in most(whole[key])]
            axes.plot(layers, errors, color=canvas.COLOURS[colour], lw=1.7, marker="o", markersize=3, label=name)
        free = [layer for layer in layers if layer not in whole["layers"]]
        for layer in free:
            axes.axvspan(layer - 0.5, layer + 0.5, color=canvas.GRID, alpha=0.4, lw=0)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda error, _: f"{error:.0e}")
        axes.set_title("The stream without the context, against the one with it")
        axes.set(xlabel="layer" + (" (grey: not patched)" if free else ""), ylabel="‖difference‖ / ‖stream‖")
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.grid(axis="y")
        axes.tick_params(labelsize=canvas.TICK, length=2)
        canvas.name_ticks(axes.xaxis, [str(layer) for layer in layers], 5.4, turned=False)
        fig.legend(loc="outside lower left", ncols=2)
    return fig


def _image(axes, values_YX: torch.Tensor, center: float | None, first: int = 0):
    """A grid of colours, row 0 at the bottom, its columns at first, first + 1, …"""
    mpl = canvas.matplotlib()
    finite = values_YX[values_YX.isfinite()]
    low, high, colours = float(finite.min()), float(finite.max()), mpl.colormaps["viridis"]
    if center is not None:
        reach = max(abs(low - center), abs(high - center)) or 1.0
        low, high, colours = center - reach, center + reach, canvas.signed()
    rows, columns = values_YX.shape
    extent = (first - 0.5, first + columns - 0.5, -0.5, rows - 0.5)
    masked = values_YX.masked_fill(~values_YX.isfinite(), math.nan).numpy()
    options: dict[str, Any] = {"vmin": low, "vmax": high, "aspect": "auto", "origin": "lower", "extent": extent}
    image = axes.imshow(masked, cmap=colours.with_extremes(bad=canvas.MISSING), interpolation="none", **options)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def _mark(axes, image, values_YX: torch.Tensor, center: float, strongest: int, cell: float) -> list[str]:
    """Frames the cells farthest from `center`; their numbers go inside, or are given back where a `cell` is too small.

    Args:
        cell: its width in points.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    strength = (values_YX - center).abs().masked_fill(~values_YX.isfinite(), -1)
    order = strength.flatten().sort(descending=True, stable=True)
    outside = []
    frame: dict[str, Any] = {"fill": False, "edgecolor": "black", "linewidth": 0.9, "clip_on": False, "zorder": 3}
    for strong, place in zip(order.values.tolist()[:strongest], order.indices.tolist(), strict=False):
        if strong < 0:
            break
        row, column = divmod(place, values_YX.shape[1])
        halo = [withStroke(linewidth=2.2, foreground="white")]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, path_effects=halo, **frame))
        text = number(float(values_YX[row, column]))
        size = min(7.5, 1.5 * cell / len(text))
        if size < 5:
            outside.append(f"{row}, {column}: {text}")
            continue
        red, green, blue, opaque = image.to_rgba(float(values_YX[row, column]))
        light = 1 - opaque * (1 - (0.3 * red + 0.59 * green + 0.11 * blue))  # over white
        ink = "white" if light < 0.55 else "black"
        axes.text(column, row, text, ha="center", va="center_baseline", fontsize=size, color=ink, zorder=4)
    return outside


def number(value: float) -> str:
    """Three significant digits, with a real minus."""
    return f"{value:.3g}".replace("-", "−")


def draw(record: Recorded | Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Every picture of a record: name → figure, and what it shows in words."""
    whole = plain(record)
    with canvas.style():
        return {"logprob": _logprob(whole), "distance": _distance(whole), "norms": _norms(whole)}


def _columns(whole: Mapping[str, Any]) -> list[str]:
    """One label per row of the record: the token of its event."""
    numbers = whole["probed"]
    return [canvas.label(whole["events"][n - 1]["token"]) if n else "untouched" for n in numbers]


def _logprob(whole: Mapping[str, Any]):
    from matplotlib.lines import Line2D

    answers, rows = whole["answers"], range(len(whole["probed"]))
    panels = _panels(whole)
    width = canvas.width_for(len(rows))
    fig = canvas.figure(width, 1.6 + (2.2 if len(panels) == 1 else 1.4 * len(panels)))
    marks: dict[str, Any] = {"marker": "o", "markersize": 3} if len(rows) <= 40 else {}
    handles = []
    for axes, members in zip(fig.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels, strict=True):
        for n in members:
            colour, values = canvas.COLOURS[n % len(canvas.COLOURS)], [row[n] for row in whole["logprob"]]
            axes.plot(rows, values, color=colour, lw=1.7, **marks)
            axes.axhline(whole["target_logprob"][n], color=colour, lw=1.1, ls=canvas.TARGET)
            axes.axhline(values[0], color=colour, lw=1.1, ls=canvas.UNTOUCHED)
            name = f"log p({canvas.label(answers[n], 30)})"
            handles.append(Line2D([], [], color=colour, lw=1.7, label=name))
        axes.grid(axis="y")
        axes.tick_params(axis="y", labelsize=canvas.TICK, length=2)
        axes.set_xlim(-0.5, len(rows) - 0.5)
    ink: dict[str, Any] = {"color": canvas.INK, "lw": 1.1}
    handles.append(Line2D([], [], ls=canvas.TARGET, label="with the context in front (target)", **ink))
    handles.append(Line2D([], [], ls=canvas.UNTOUCHED, label="untouched model", **ink))
    fig.axes[0].set_title("What the question gives after every event")
    fig.supylabel("log-probability (nats)", fontsize=9)
    fig.axes[-1].set_xlabel("event: the token that wrote it")
    canvas.name_ticks(fig.axes[-1].xaxis, _columns(whole), width - 0.8, turned=True)
    fig.legend(handles=handles, loc="outside lower left", ncols=3 if width > 9 else 2)
    last = ", ".join(f"{a} {number(v)}" for a, v in zip(answers, whole["logprob"][-1], strict=True))
    words = f"Lines: log-probability of each answer after every event, in nats. After the last event: {last}."
    return fig, words


def _panels(whole: Mapping[str, Any]) -> list[list[int]]:
    """Which answers share a scale: all, unless one of them would be flattened by the others' distance."""
    lines = [[*column, aim] for *column, aim in zip(*whole["logprob"], whole["target_logprob"], strict=True)]
    together = max(map(max, lines)) - min(map(min, lines))
    widest = max(max(line) - min(line) for line in lines)
    everyone = list(range(len(lines)))
    return [everyone] if together <= 6 * widest or len(lines) > 6 else [[n] for n in everyone]


def _distance(whole: Mapping[str, Any]):
    relative_LN = torch.tensor(whole["relative"], dtype=torch.float64).T
    distance_LN = torch.tensor(whole["distance"], dtype=torch.float64).T
    change_LN = 100 * (distance_LN / distance_LN[:, :1] - 1)  # NaN in layers that began at the target
    if not change_LN.isfinite().any():
        change_LN = torch.zeros_like(change_LN)
    layers, rows = relative_LN.shape
    width, height = canvas.width_for(rows), min(4.5, max(1.6, 0.085 * layers))
    fig = canvas.figure(width, 2 * height + 1.5)
    above, below = fig.subplots(2, sharex=True)
    canvas.bar(fig, _image(above, relative_LN, None), above, "‖state − target‖ / ‖target‖")
    canvas.bar(fig, _image(below, change_LN, 0.0), below, "change of ‖state − target‖, %")
    above.set_title("Distance of the hidden state from the one with the context in front")
    below.set_title("The same against the untouched model: blue is nearer, red is farther")
    for axes in (above, below):
        axes.set_ylabel("layers passed (0: embedding)")
        canvas.name_ticks(axes.yaxis, [str(n) for n in range(layers)], height * 0.8, turned=False)
    below.set_xlabel("event: the token that wrote it")
    canvas.name_ticks(below.xaxis, _columns(whole), width - 1.6, turned=True)
    above.tick_params(labelbottom=False)
    first, last = whole["distance"][0][-1], whole["distance"][-1][-1]
    words = "Two heat maps, layer by event: the distance of the hidden state at the answer position from the target,"
    words += f" and its change. At the last layer it goes from {number(first)} to {number(last)}."
    return fig, words


def _norms(whole: Mapping[str, Any]):
    linears = whole["drift"]
    events = len(whole["events"])
    width, height = canvas.width_for(events + 1), min(6.0, max(1.2, 0.16 * len(linears)))
    fig = canvas.figure(width, height + 3.2)
    above, below = fig.subplots(2, sharex=True, height_ratios=[1.7, height])
    marks: dict[str, Any] = {"marker": "o", "markersize": 3} if len(whole["probed"]) <= 40 else {}
    above.plot(whole["probed"], whole["delta_norm"], color=canvas.COLOURS[0], lw=1.7, **marks)
    above.set(title="How far the weights have moved, all plastic linears together", ylabel="‖ΔW‖ (Frobenius)")
    above.set_ylim(bottom=0)
    above.grid(axis="y")
    above.tick_params(labelsize=canvas.TICK, length=2, labelbottom=False)
    norms = [[math.nan if norm is None else norm for norm in each["event_norms"]] for each in linears]
    norms_KE = torch.tensor(norms, dtype=torch.float64)
    below.set_title("Size of every event in every linear (grey: no longer known by itself)")
    below.set_xlabel("event: the token that wrote it")
    names = [_short(each["name"]) for each in linears]
    if norms_KE.isfinite().any():
        canvas.bar(fig, _image(below, norms_KE, None, first=1), below, "‖u‖ ‖k‖")
    else:
        below.text(0.5, 0.5, "no event is known by itself any more", ha="center", transform=below.transAxes)
    canvas.name_ticks(below.yaxis, names, height * 0.9, turned=False)
    tokens = ["untouched", *(canvas.label(event["token"]) for event in whole["events"])]
    canvas.name_ticks(below.xaxis, tokens, width - 2, turned=True)
    below.set_xlim(-0.5, events + 0.5)
    words = "Above a line: the Frobenius norm of the change of all plastic linears after every event, at the end "
    words += f"{number(whole['delta_norm'][-1])}. Below a heat map: the norm of every event in every linear."
    return fig, words


def _short(name: str) -> str:
    """layers.11.mlp.up_proj → 11 up_proj."""
    parts = name.split(".")
    return f"{parts[1]} {parts[-1]}" if len(parts) > 2 else name
