"""How every picture is drawn: one style, labels that do not collide, and the same bytes for the same numbers.

matplotlib is imported when a picture is drawn, not before. Figures belong to their caller, not to pyplot.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..files import warn

INK, GRID, MISSING = "#1b1e23", "#d4d8de", "#9aa0a8"
# read on white and on black, and are told apart by people who are colour-blind
COLOURS = ("#2f7fc1", "#cf6f17", "#2b9a72", "#c0579a", "#8a6fd1", "#8c7a2b", "#6b7785")
TARGET, UNTOUCHED = (0, (5, 1.5)), (0, (1, 1))  # dashed, dotted
BELOW, ABOVE = (0.14, 0.46, 0.82), (0.85, 0.27, 0.19)  # a signed effect: blue and red, fading to the background
# what a file would say of the day or the program that made it
UNDATED = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
TICK = 7.5  # points
WIDEST = 15.0  # inches


def matplotlib():
    """The module; ImportError says how to install it."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ImportError('pictures are drawn by matplotlib: pip install "fastweights[report]"') from None
    return matplotlib


@contextlib.contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's are; theirs are back afterwards."""
    mpl = matplotlib()
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    ours = {
        **colours,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "text.parse_math": False,  # a token with two dollars is no formula
        "svg.fonttype": "none",
        "svg.hashsalt": "fastweights",
        "figure.constrained_layout.use": True,
    }
    theirs = ("backend", "interactive", "toolbar", "webagg")  # of pyplot's windows, not of a picture's looks
    defaults = {key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith(theirs)}
    with mpl.rc_context({**defaults, **ours}):
        yield


def signed():
    """Colours for numbers on both sides of a center, at which the background shows: white or black."""
    from matplotlib.colors import LinearSegmentedColormap

    steps = [n / 16 for n in range(17)]
    left = [(0.5 - step / 2, (*BELOW, step**0.8)) for step in reversed(steps)]
    right = [(0.5 + step / 2, (*ABOVE, step**0.8)) for step in steps]
    return LinearSegmentedColormap.from_list("signed", [*left, *right])


def figure(width: float, height: float):
    """An empty figure of so many inches that is no part of pyplot's list of open ones."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def width_for(count: int) -> float:
    """Inches for so many columns with a label each."""
    return min(WIDEST, max(6.2, 2.2 + 0.145 * count))


def thinned(count: int, inches: float) -> range:
    """Which of `count` labels are shown on an axis of this length: every k-th, so that none touches the next."""
    room = max(1, int(inches * 72 / (TICK * 1.35)))
    return range(0, count, max(1, math.ceil(count / room)))


def label(text: str, most: int = 14) -> str:
    """A token or another short text as a tick: one line, no invisible characters, at most so many characters."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").strip(" ") or "␣"
    text = "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def name_ticks(axis, labels: Sequence[str], inches: float, turned: bool) -> None:
    """Names the places 0, 1, … of an axis, as many of them as fit."""
    places = thinned(len(labels), inches)
    rotation = {"rotation": 90} if turned else {}
    axis.set_ticks(list(places), [labels[place] for place in places], fontsize=TICK, **rotation)
    axis.set_tick_params(length=2, pad=2)


def bar(fig, image, axes, text: str):
    """The colour bar of an image, beside its axes."""
    drawn = fig.colorbar(image, ax=axes, pad=0.01, fraction=0.05, aspect=18)
    drawn.set_label(text, fontsize=8)
    drawn.ax.tick_params(labelsize=TICK, length=2)
    drawn.outline.set_visible(False)
    drawn.solids.set_rasterized(True)  # one picture in an SVG, not 256 shapes
    return drawn


def save(fig, path: Path) -> None:
    """Writes the picture on white; a .png has 150 dots per inch."""
    path.write_bytes(encoded(fig, path))


def encoded(fig, path: Path) -> bytes:
    """What `save` writes."""
    with style(), io.BytesIO() as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fig.savefig(file, format=path.suffix[1:], dpi=150, facecolor="white", metadata=UNDATED[path.suffix])
        content = file.getvalue()
    missing = {str(each.message) for each in caught if str(each.message).startswith("Glyph")}
    for other in (each for each in caught if str(each.message) not in missing):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if missing:
        warn(f"{path}: matplotlib's font lacks {len(missing)} characters of the labels, which are drawn as boxes")
    return content


def svg(fig, name: str, alternative: str) -> str:
    """The picture as an element of a page: transparent, its ink and grid in the page's colours, nothing from elsewhere.

    Args:
        name: of the picture; its ids differ from those of others in the page.
        alternative: what it shows, for those who do not see it.
    """
    from html import escape

    mpl = matplotlib()
    with style(), mpl.rc_context({"svg.hashsalt": name}), io.StringIO() as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has its own fonts
        fig.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<style.*?</style>", "", text, flags=re.DOTALL)  # it would hold for the whole page
    named = set(re.findall(r"#([\w-]+)", text))  # the other ids would meet those of the page's other pictures
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in named else "", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor").replace(GRID, "var(--line)")
    width = float(box[1].split()[2])
    opening = (
        f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(alternative)}" style="--natural:{width / 72:.2f}in">'
    )
    return opening + text.strip()
