"""Perplexity of long text, frozen against plastic: dynamic evaluation (Krause et al. 2018, arXiv 1709.07432).

    loss_t = −log p(x_t | x_<t, ΔW),    ΔW of events on x_s, s < t: a token is measured before any event on it

Shape suffixes: R rates (rows of one batch), N tokens that are predicted, T tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import copy
import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attach import attach, detach
from .episode import Episode
from .inputs import Ids, tokens
from .model import Llama
from .plastic import plastic_linears
from .report import canvas
from .report.pictures import number
from .rules import Rule
from .waiting import settle

RESET = ("window", "text", "never")
NUMBERS = 1 << 25  # logits held at once
BLOCK = 64  # tokens whose mean is one sample of a standard error: losses of neighbours are not independent


@dataclass(frozen=True)
class Perplexity:
    """What `perplexity` returns: the loss of every predicted token at every rate, on the CPU.

    rates: [R]; the first is 0, the frozen model.
    losses: of each text, [R, N] float64: −log p in nats of every token but the first.
    positions: of each text, [N]: how many tokens the same fast weights had read before, in this window, in this text or
        in all texts, as `reset` says.
    names: of the texts.
    settings: what was asked.
    """

    rates: list[float]
    losses: list[Tensor]
    positions: list[Tensor]
    names: list[str]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """N of all texts together."""
        return sum(len(position_N) for position_N in self.positions)

    @property
    def loss(self) -> Tensor:
        """Mean over all tokens, [R] nats."""
        return torch.cat(self.losses, 1).mean(1)

    @property
    def perplexity(self) -> Tensor:
        """exp(loss), [R]."""
        return self.loss.exp()

    @property
    def difference(self) -> Tensor:
        """loss − loss of the frozen model, [R] nats; above 0 plasticity makes it worse."""
        return self.loss - self.loss[0]

    @property
    def standard_error(self) -> Tensor:
        """Of `difference`, [R] nats, from the means of blocks of 64 tokens in a row; NaN with fewer than two blocks."""
        apart = [(loss_RN - loss_RN[:1]).split(BLOCK, 1) for loss_RN in self.losses]
        means = [block_RT.mean(1) for blocks in apart for block_RT in blocks if block_RT.shape[1] == BLOCK]
        if len(means) < 2:
            return torch.full((len(self.rates),), math.nan, dtype=torch.float64)
        return torch.stack(means, 1).std(1) / len(means) ** 0.5

    def by_position(self, edges: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The mean loss of tokens with from ≤ position < to, a dict per bucket that holds any.

        Args:
            edges: where buckets begin, ascending; what comes before the first is left out. None: 0, 64, 128, 256, …

        Returns:
            from, to (None: open), tokens, loss (a list [R] in nats).
        """
        position_N, loss_RN = torch.cat(self.positions), torch.cat(self.losses, 1)
        if edges is None:
            edges = [0, *(64 << n for n in range(int(position_N.max()).bit_length()) if 64 << n <= position_N.max())]
        edges = [*edges]
        if edges != sorted(set(edges)) or not edges or edges[0] < 0:
            raise ValueError(f"by_position(edges={edges}): expected positions from 0, ascending")
        buckets = []
        for start, end in zip(edges, [*edges[1:], None], strict=True):
            inside_N = (position_N >= start) & (position_N < (end or math.inf))
            if inside_N.any():
                mean_R = loss_RN[:, inside_N].mean(1)
                buckets.append({"from": start, "to": end, "tokens": int(inside_N.sum()), "loss": mean_R.tolist()})
        return buckets

    def to_dict(self, edges: Sequence[int] | None = None) -> dict[str, Any]:
        """Plain values for JSON, without the losses of single tokens; None where a number is not finite."""
        texts = [
            {"name": name, "tokens": loss_RN.shape[1], "loss": loss_RN.mean(1).tolist()}
            for name, loss_RN in zip(self.names, self.losses, strict=True)
        ]
        whole = {
            "rates": self.rates,
            "tokens": self.tokens,
            "loss": self.loss.tolist(),
            "perplexity": self.perplexity.tolist(),
            "difference": self.difference.tolist(),
            "standard_error": self.standard_error.tolist(),
            "texts": texts,
            "buckets": self.by_position(edges),
            "settings": self.settings,
        }
        return _finite(whole)

    def table(self, edges: Sequence[int] | None = None, width: int | None = None) -> str:
        """A line per bucket and per text: the frozen perplexity, and by how much each rate changes it.

        Args:
            edges: as in `by_position`.
            width: of the text, in columns; None = the terminal's, 100 where there is none.
        """
        from rich.console import Console
        from rich.table import Table

        grid = Table(box=None, pad_edge=False, header_style="bold")
        grid.add_column("position")
        grid.add_column("tokens", justify="right")
        for name in ("frozen", *(f"{rate:g}" for rate in self.rates[1:])):
            grid.add_column(name, justify="right", no_wrap=True)
        for bucket in self.by_position(edges):
            end = "on" if bucket["to"] is None else f"to {bucket['to'] - 1}"
            grid.add_row(f"{bucket['from']} {end}", str(bucket["tokens"]), *_cells(bucket["loss"]))
        if len(self.names) > 1:
            for name, loss_RN in zip(self.names, self.losses, strict=True):
                grid.add_row(name, str(loss_RN.shape[1]), *_cells(loss_RN.mean(1).tolist()))
        grid.add_row("all", str(self.tokens), *_cells(self.loss.tolist()), style="bold")
        pairs = zip(self.difference.tolist()[1:], self.standard_error.tolist()[1:], strict=True)
        apart = [f"{apart:+.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "") for apart, error in pairs]
        if apart:
            grid.add_row("Δ loss (nats)", "", "", *apart)
        text = io.StringIO()
        width = width or max(80, shutil.get_terminal_size((100, 24)).columns)
        Console(file=text, width=width, highlight=False, markup=False).print(grid)
        said = "perplexity of the frozen model, and its change at each rate: above 0 plasticity makes it worse"
        return "\n".join([*(line.rstrip() for line in text.getvalue().splitlines()), said])

    def picture(self, path: str | Path | None = None, edges: Sequence[int] | None = None):
        """Draws the loss by position: above the loss at each rate, below its difference from the frozen model's.

        Args:
            path: file to write, .png, .svg or .pdf.
            edges: as in `by_position`.

        Returns:
            The matplotlib Figure.

        Raises:
            ValueError: for another kind of file.
            ImportError: without matplotlib (`pip install "fastweights[report]"`).
        """
        if path is not None and Path(path).suffix not in canvas.UNDATED:
            raise ValueError(f"picture(path={str(path)!r}): expected a name that ends in .png, .svg or .pdf")
        buckets = self.by_position(edges)
        places = range(len(buckets))
        with canvas.style():
            fig = canvas.figure(6.4, 4.6)
            above, below = fig.subplots(2, sharex=True)
            for n, rate in enumerate(self.rates):
                loss = [bucket["loss"][n] for bucket in buckets]
                more = [bucket["loss"][n] - bucket["loss"][0] for bucket in buckets]
                look: dict[str, Any] = {"lw": 1.6, "marker": "o", "markersize": 3}
                look["color"] = canvas.COLOURS[(n - 1) % len(canvas.COLOURS)] if n else canvas.INK
                above.plot(places, loss, label=f"rate {rate:g}" if n else "frozen", **look)
                below.plot(places, more, **look)
            above.set(title="Loss of a token, by what the fast weights had read before it", ylabel="nats")
            below.set(title="Difference from the frozen model: above 0 it is worse", ylabel="nats")
            below.set_xlabel("position: tokens read before")
            frozen, *others = zip(*(bucket["loss"] for bucket in buckets), strict=True)
            apart = [abs(a - b) for loss in others for a, b in zip(loss, frozen, strict=True)]
            if max(apart, default=0.0) > 1:  # a rate that diverges would flatten the others
                above.set_yscale("log")
                below.set_yscale("symlog", linthresh=0.01)
                low, high = above.get_ylim()
                above.set_yticks([tick for tick in (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50) if low <= tick <= high])
                for axes in (above, below):
                    axes.yaxis.set_major_formatter(lambda value, _: number(value))
                    axes.minorticks_off()
            canvas.name_ticks(below.xaxis, [f"{bucket['from']}–" for bucket in buckets], 5.6, turned=False)
            for axes in (above, below):
                axes.grid(axis="y")
                axes.tick_params(labelsize=canvas.TICK, length=2)
            fig.legend(loc="outside lower left", ncols=4)
            if path is not None:
                canvas.save(fig, Path(path))
        return fig


@torch.no_grad()
def perplexity(
    model: Llama,
    texts: Sequence[Ids],
    rule: Rule | None = None,
    layers: int | Sequence[int] | str | None = None,
    *,
    linears: str | Sequence[str] | None = None,
    rank: int = 64,
    overflow: str = "compress",
    budget: float | None = None,
    over_budget: str = "scale",
    length: int | None = None,
    stride: int | None = None,
    reset: str = "text",
    names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Reads texts with fast weights and without, and measures every token before anything of it is written.

    A text longer than `length` is read in windows. Each begins with an empty KV cache at position 0 and re-reads the
    last length − stride tokens of the one before. So every token but the first of a text is predicted once, by the
    window in which the token before it was new.

    Args:
        texts: ids of each text, [T], as tokenizer.encode gives them; two or more.
        rule: any rule, for the frozen model None. A tuple of rates is measured in one batch, a row each; a row of
            rate 0, the frozen model, is put in front.
        layers, linears, rank, overflow, budget, over_budget: as in `attach`.
        length: tokens of a window; None: the positions that the model has.
        stride: new tokens of a window; None: length.
        reset: what the fast weights outlive: "window": nothing, each window begins without events and writes all its
            tokens; "text": windows; "never": texts as well. Where they live on, tokens that are read again are not
            written again.
        names: of the texts; None: their numbers.
        progress: called as (tokens read, tokens) after every piece.

    Raises:
        ValueError: before the model is touched, for what does not fit; while it reads, for an event that is not finite.
            The model is as it was afterwards, whatever happens.

    Example:
        ids = tokenizer.encode(open("book.txt").read())
        found = fw.perplexity(model, [ids], fw.Hebbian(rate=(1e-4, 1e-3)), [11, 12, 13], length=1024)
        print(found.table())
    """
    vocabulary, longest = model.config.vocab_size, model.config.max_position_embeddings
    if plastic_linears(model):
        raise ValueError("perplexity() got a model that is already plastic: fw.detach(model) first")
    if reset not in RESET:
        raise ValueError(f"perplexity(reset={reset!r}): expected one of {', '.join(map(repr, RESET))}")
    ids = [tokens(text, None, 1, vocabulary)[0][0] for text in texts]
    if not ids or min(map(len, ids)) < 2:
        raise ValueError(
            f"perplexity() got texts of {[len(text) for text in ids]} tokens, expected two or more in each"
        )
    names = [str(n) for n in range(len(ids))] if names is None else list(names)
    if len(names) != len(ids):
        raise ValueError(f"perplexity() got {len(names)} names for {len(ids)} texts")
    length = longest if length is None else length
    stride = length if stride is None else stride
    for name, count, most in (("length", length, longest), ("stride", stride, length)):
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise ValueError(f"perplexity({name}={count!r}): expected a whole number from 1 to {most}")
    if (rule is None) != (layers is None):
        raise ValueError("perplexity() needs a rule and layers, or neither of them for the frozen model")
    rates = [0.0]
    if rule is not None and layers is not None:
        own = rule.rate if isinstance(rule.rate, tuple) else (rule.rate,)
        rates = [0.0, *dict.fromkeys(float(rate) for rate in own if rate != 0)]
        attach(model, layers, _with_rates(rule, rates), linears, rank, overflow, budget=budget, over_budget=over_budget)
    try:
        reader = _Reader(model, len(rates), length, stride, reset)
        losses, positions, done, of = [], [], 0, sum(map(len, ids))
        for text in ids:
            parts = []
            for losses_RT, position_T, read in reader.read(text, done):
                parts.append((losses_RT, position_T))
                if progress is not None:
                    progress(done + read, of)
            losses.append(torch.cat([loss_RT for loss_RT, _ in parts], 1))
            positions.append(torch.cat([position_T for _, position_T in parts]))
            done += len(text)
    except ValueError as error:
        rows = ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(f"{error}; the rows are those of the rates {rows}") from error
    finally:
        detach(model)
    settings: dict[str, Any] = {"rule": repr(rule), "layers": layers, "linears": linears, "rank": rank}
    settings |= {"overflow": overflow, "budget": budget, "over_budget": over_budget}
    settings |= {"length": length, "stride": stride, "reset": reset}
    return Perplexity(rates, losses, positions, names, settings | {"dtype": str(model.dtype)[6:]})


class _Reader:
    """Reads texts in windows, all rates in one batch."""

    def __init__(self, model: Llama, rows: int, length: int, stride: int, reset: str):
        self.model, self.rows, self.length, self.stride, self.reset = model, rows, length, stride, reset
        self.piece = max(1, NUMBERS // (rows * model.config.vocab_size))
        self.episode: Episode | None = None

    def read(self, ids_N: Tensor, earlier: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Losses [R, T] and positions [T] of the tokens behind each piece, and the tokens read, in order.

        earlier: tokens in the texts before this one.
        """
        new = 0  # the first token that was not read yet
        for start in range(0, max(1, len(ids_N) - self.length + self.stride), self.stride):
            end = min(start + self.length, len(ids_N))
            fresh = self.reset == "window" or (self.reset == "text" and start == 0)
            self.episode = episode = self._begin(fresh, None if start == 0 else int(ids_N[new]))
            first = {"window": start, "text": 0, "never": -earlier}[self.reset]  # of what the fast weights read
            for part in _pieces(start, new, end, self.piece):
                again = part.start < new
                ids_RT = ids_N[part.start : part.stop].expand(self.rows, -1)
                update = "none" if again and not fresh else "all"
                logits_RTV = episode.feed(ids_RT, update=update, logits="last" if again else "all")
                if not again:
                    next_T = ids_N[part.start + 1 : part.stop + 1]
                    position_T = torch.arange(part.start + 1, part.start + 1 + len(next_T), device="cpu") - first
                    yield _loss(logits_RTV[:, : len(next_T)], next_T), position_T, part.stop
            new = end

    def _begin(self, fresh: bool, next_id: int | None) -> Episode:
        """An episode without tokens, and without events or with those of the last one.

        next_id: the token behind the last that was read, for the gradient event that waits for it; None: there is none.
        """
        before, episode = self.episode, Episode(self.model, self.rows)
        if fresh or before is None:
            return episode
        if next_id is not None:
            every_R = torch.ones(self.rows, dtype=torch.bool, device="cpu")
            with before.state.alone(), before.state.attempt():
                settle(before.engine, torch.full((self.rows,), next_id, device="cpu"), every_R)
        for address, log in before.logs.items():
            episode.logs[address].copy_from(log)
        return episode


def _pieces(start: int, new: int, end: int, most: int) -> Iterator[range]:
    """start to end in ranges of at most so many tokens, none on both sides of `new`."""
    for low, high in ((start, new), (new, end)):
        for first in range(low, high, most):
            yield range(first, min(first + most, high))


def _loss(logits_RTV: Tensor, next_T: Tensor) -> Tensor:
    """−log p of the next tokens, [R, T] float64 on the CPU."""
    wide_RTV = logits_RTV.to(torch.promote_types(logits_RTV.dtype, torch.float32))
    index_RT1 = next_T.to(wide_RTV.device).expand(len(wide_RTV), -1)[..., None]
    return (wide_RTV.logsumexp(-1) - wide_RTV.gather(-1, index_RT1)[..., 0]).to("cpu", torch.float64)


def _with_rates(rule: Rule, rates: Sequence[float]) -> Rule:
    """The same rule with a rate per row."""
    other = copy.copy(rule)
    try:
        object.__setattr__(other, "rate", tuple(rates))  # a frozen dataclass refuses its own
    except AttributeError:
        raise ValueError(f"{type(rule).__name__} does not take a rate per row: its rate cannot be set") from None
    return other


def _cells(loss_R: Sequence[float]) -> list[str]:
    """The frozen perplexity, and the change of each other in percent."""
    frozen, *others = loss_R
    return [_short(frozen), *(_percent(loss - frozen) for loss in others)]


def _short(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 700 else f"e^{loss:.3g}"


def _percent(apart: float) -> str:
    if math.isnan(apart):
        return "nan"
    return f"{100 * math.expm1(apart):+.2f} %" if apart < 2.4 else f"×{math.exp(min(apart, 700)):.3g}"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None in their place."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
