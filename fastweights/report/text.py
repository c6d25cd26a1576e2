"""A record as a person reads it: a table and a paragraph.

Everything here reads a record as plain values: those of `Record.to_dict()`, which are those of record.json.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Recorded(Protocol):
    """What has the plain values of a record."""

    def to_dict(self) -> dict: ...


def plain(record: Recorded | Mapping[str, Any]) -> Mapping[str, Any]:
    """The plain values of a record; those that were read from a record.json are taken as they are."""
    return record if isinstance(record, Mapping) else record.to_dict()


def table(record: Recorded | Mapping[str, Any], rows: int = 24, width: int | None = None) -> str:
    """One line per probed event: its token, each answer's log-probability, the distance to the target.

    Args:
        record: a record, or what its record.json holds.
        rows: at most this many lines, evenly chosen, first and last always among them.
        width: of the text, in columns; None = the terminal's, 100 where there is none.
    """
    from rich.console import Console
    from rich.table import Table

    whole = plain(record)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("event", "position"):
        grid.add_column(name, justify="right")
    grid.add_column("token")
    for answer in whole["answers"]:
        grid.add_column(f"log p({answer})", justify="right")
    grid.add_column("first choice")
    grid.add_column("distance", justify="right")
    grid.add_column("cosine", justify="right")
    grid.add_column("‖ΔW‖", justify="right")
    for row in _spread(len(whole["probed"]), rows):
        grid.add_row(
            *where(whole, row),
            *(f"{value:.3f}" for value in whole["logprob"][row]),
            _choice(whole["top"][row]),
            f"{whole['distance'][row][-1]:.2f}",
            f"{whole['cosine'][row][-1]:.4f}",
            f"{whole['delta_norm'][row]:.3f}",
        )
    grid.add_row(
        "",
        "",
        "(target)",
        *(f"{value:.3f}" for value in whole["target_logprob"]),
        _choice(whole["target_top"]),
        "0.00",
        "0.0000",
        "",
        style="italic",
    )
    text = io.StringIO()
    width = width or max(80, shutil.get_terminal_size((100, 24)).columns)
    Console(file=text, width=width, highlight=False, markup=False).print(grid)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join([*lines, "distance and cosine: last layer, hidden state at the answer position to the target's"])


def lens_table(
    layers: Sequence[Sequence[Mapping[str, Any]]],
    answer: Sequence[str],
    rank: Sequence[int] | None,
    site: str,
    norm: bool,
) -> str:
    """A line per layer of a lens: the likeliest tokens with their probabilities, and the rank of an answer.

    Args:
        layers: per layer the tokens, each with "token" and "probability".
        answer: the pieces of the answer; rank is that of its first, per layer; None: nobody asked for an answer.
    """
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold")
    grid.add_column("layer", justify="right")
    for number in range(len(layers[0])):
        grid.add_column("first" if number == 0 else f"{number + 1}.", no_wrap=True)
    if rank is not None:
        grid.add_column(f"rank of '{answer[0]}'", justify="right")
    for layer, best in enumerate(layers):
        cells = [f"'{each['token']}' {each['probability']:.1%}" for each in best]
        grid.add_row(str(layer), *cells, *([] if rank is None else [str(rank[layer])]))
    text = io.StringIO()
    Console(file=text, width=10_000, highlight=False, markup=False).print(grid)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    what = "one row per layer"
    if site == "resid_post":
        what = "row 0 is the embedding, row n the stream after n layers"
    lines.append(f"{site} at the last token, {'through' if norm else 'without'} the final norm: {what}")
    if rank is not None:
        of = f", the first of the answer's {len(answer)} tokens," if len(answer) > 1 else ""
        first = f"is first choice in row {rank.index(0)} first" if 0 in rank else "is first choice nowhere"
        lines.append(f"'{answer[0]}'{of} {first}; rank 0 is the first choice")
    return "\n".join(lines)


def patch_table(whole: Mapping[str, Any], rows: int = 24) -> str:
    """A context patch: a line per layer, a line per query token, and a sentence.

    Args:
        whole: `Patch.to_dict()`, with "tokens" [T], the pieces of the query, and "said", those of its "choices".
        rows: at most this many query tokens, evenly chosen.
    """
    from rich.console import Console
    from rich.table import Table

    linears = list(dict.fromkeys(name.split(".", 1)[1] for name in whole["norms"]))
    layers = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "with events", "without", *linears):
        layers.add_column(name, justify="right")
    errors = zip(most(whole["layer_error"]), most(whole["unpatched_layer_error"]), strict=True)
    for layer, (patched, unpatched) in enumerate(errors):
        norms = [whole["norms"].get(f"{layer}.{name}") for name in linears]
        sizes = ("" if norm is None else f"{max(norm):.3f}" for norm in norms)
        layers.add_row(str(layer), f"{patched:.1e}", f"{unpatched:.3f}", *sizes)
    each = Table(box=None, pad_edge=False, header_style="bold")
    each.add_column("position", justify="right")
    for name in ("query token", "next, with the context", "without", "without, with events"):
        each.add_column(name)
    for n in _spread(len(whole["tokens"]), rows):
        said = (repr(whole["said"][run][n]) for run in ("reference", "unpatched", "patched"))
        each.add_row(str(whole["start"] + n), repr(whole["tokens"][n]), *said)
    text = io.StringIO()
    console = Console(file=text, width=10_000, highlight=False, markup=False)
    console.print(layers)
    text.write("the stream behind each layer: ‖without the context − with it‖ / ‖with it‖; the events: ‖ΔW‖ / ‖W‖\n")
    if len(whole["tokens"]) > 1:
        text.write("(all of these the largest over the query tokens)\n")
    text.write("\n")
    console.print(each)
    return "\n".join([*(line.rstrip() for line in text.getvalue().splitlines()), "", patch_sentence(whole)])


def patch_sentence(whole: Mapping[str, Any]) -> str:
    """What a context patch came to."""
    count, every = len(whole["tokens"]), len(whole["layer_error"][0])
    where_ = "all layers" if len(whole["layers"]) == every else f"{len(whole['layers'])} of {every} layers"
    return (
        f"{len(whole['norms']) * count} events in {where_} for {count} query token{'s' if count > 1 else ''} behind a "
        f"context of {whole['start']}: the first choice is the context's at {whole['agreement']:.0%} "
        f"({whole['unpatched_agreement']:.0%} without events); the largest difference of a logit is "
        f"{whole['difference']:.2g} ({whole['unpatched_difference']:.3g})."
    )


def most(error_TL: Sequence[Sequence[float]]) -> list[float]:
    """The largest over the query tokens of each layer."""
    return [max(column) for column in zip(*error_TL, strict=True)]


def where(whole: Mapping[str, Any], row: int) -> tuple[str, str, str]:
    """The event behind a row of the record, as text: its number, its position, its token."""
    number = whole["probed"][row]
    if not number:
        return "0", "", "(untouched)"
    event = whole["events"][number - 1]
    return str(number), str(event["position"]), repr(event["token"])[1:-1] + (" (own)" if event["generated"] else "")


def paragraph(record: Recorded | Mapping[str, Any]) -> str:
    """What happened, honestly: did the fast weights carry the context to the question?

    The first answer counts as the one that the context argues for. Learned means: it gained on the best of
    the others (or by itself if it is alone), and the last layer's hidden state came nearer to the target.
    """
    return " ".join([said(record), *outcome(record)])


def said(record: Recorded | Mapping[str, Any]) -> str:
    """What the model says to the question: untouched, with the context in front, and after the last event."""
    whole = plain(record)
    what = f"The question without the context: the untouched model gives {_answers(whole, whole['logprob'][0])}"
    what += f" and would say {_choice(whole['top'][0])}; with the context in front, "
    what += f"{_answers(whole, whole['target_logprob'])} and {_choice(whole['target_top'])}."
    what += f" After {whole['probed'][-1]} events it gives {_answers(whole, whole['logprob'][-1])}"
    return what + f" and would say {_choice(whole['top'][-1])}."


def outcome(record: Recorded | Mapping[str, Any]) -> tuple[str, str]:
    """Two sentences: how far the answer and the hidden state have moved, and what to read into it."""
    whole = plain(record)
    gain = _lead(whole["logprob"][-1]) - _lead(whole["logprob"][0])
    against = " over the best other answer" if len(whole["answers"]) > 1 else ""
    moved = f"{whole['answers'][0]!r} {'gained' if gain > 0 else 'lost'} {abs(gain):.3f} nats{against}"
    first, last = whole["distance"][0], whole["distance"][-1]
    before, after = first[-1], last[-1]
    share = abs(after - before) / before if before else 0.0
    nearer = sum(b < a for a, b in zip(first[1:], last[1:], strict=True))
    moved += f"; the last hidden state is {share:.1%} {'nearer to' if after < before else 'farther from'} the target"
    moved += f" ({before:.2f} → {after:.2f}), nearer in {nearer} of {len(first) - 1} layers."
    return moved, _verdict(whole, gain, after < before)


def _verdict(whole: Mapping[str, Any], gain: float, nearer: bool) -> str:
    best, answer = whole["top"][-1][0][0].strip(), whole["answers"][0].strip()
    if max(whole["logprob"][-1]) < -7:
        return "The updates broke the model: every answer is all but impossible now. Try a smaller rate."
    if gain <= 0:
        return "It did not learn the fact."
    if not nearer:
        return (
            "It did not take up the context: the answer gained, but its hidden state went elsewhere, "
            "so this is not the state that reading the context brings."
        )
    if best != answer:
        return f"It moved towards the fact, but did not learn it: its first choice is {best!r}."
    if whole["top"][0][0][0].strip() == answer:
        return f"It moved towards the fact; but {answer!r} was its first choice before, so this shows no new knowledge."
    return f"It learned to answer {answer!r} to this question; whether it learned the fact, one question cannot tell."


def _lead(logprob: Sequence[float]) -> float:
    return logprob[0] - max(logprob[1:]) if len(logprob) > 1 else logprob[0]


def _answers(whole: Mapping[str, Any], logprob: Sequence[float]) -> str:
    pairs = zip(whole["answers"], logprob, strict=True)
    return ", ".join(f"log p({answer}) = {value:.2f}" for answer, value in pairs)


def _choice(top: Sequence[Sequence[Any]]) -> str:
    return repr(top[0][0])


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly, with both ends."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
