"""A record as a person reads it: a table and a paragraph."""

from __future__ import annotations

import io
import shutil

from rich.console import Console
from rich.table import Table

from .surgery import Record


def table(record: Record, rows: int = 24, width: int | None = None) -> str:
    """One line per probed event: its token, each answer's log-probability, the distance to the target.

    Args:
        rows: at most this many lines, evenly chosen, first and last always among them.
        width: of the text, in columns; None = the terminal's, 100 where there is none.
    """
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("event", "position"):
        grid.add_column(name, justify="right")
    grid.add_column("token")
    for answer in record.answers:
        grid.add_column(f"log p({answer})", justify="right")
    grid.add_column("first choice")
    grid.add_column("distance", justify="right")
    grid.add_column("cosine", justify="right")
    grid.add_column("‖ΔW‖", justify="right")
    for row in _spread(len(record.probed), rows):
        number = record.probed[row]
        event = record.events[number - 1] if number else None
        where = [str(event.position), repr(event.token)[1:-1] + (" (own)" if event.generated else "")] if event else []
        grid.add_row(
            str(number),
            *(where or ["", "(untouched)"]),
            *(f"{value:.3f}" for value in record.logprob[row].tolist()),
            _choice(record.top[row]),
            f"{record.distance[row, -1]:.2f}",
            f"{record.cosine[row, -1]:.4f}",
            f"{record.delta_norm[row]:.3f}",
        )
    grid.add_row(
        "",
        "",
        "(target)",
        *(f"{value:.3f}" for value in record.target_logprob.tolist()),
        _choice(record.target_top),
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


def paragraph(record: Record) -> str:
    """What happened, honestly: did the fast weights carry the context to the question?

    The first answer counts as the one that the context argues for. Learned means: it gained on the best of
    the others (or by itself if it is alone), and the last layer's hidden state came nearer to the target.
    """
    first, last, aim = record.logprob[0], record.logprob[-1], record.target_logprob
    answer, events = record.answers[0], record.probed[-1]
    what = f"The question without the context: the untouched model gives {_answers(record, first)}"
    what += f" and would say {_choice(record.top[0])}; with the context in front, {_answers(record, aim)}"
    what += f" and {_choice(record.target_top)}. After {events} events it gives {_answers(record, last)}"
    what += f" and would say {_choice(record.top[-1])}."
    gain = float(_lead(last) - _lead(first))
    against = " over the best other answer" if len(record.answers) > 1 else ""
    moved = f" {answer!r} {'gained' if gain > 0 else 'lost'} {abs(gain):.3f} nats{against}"
    before, after = float(record.distance[0, -1]), float(record.distance[-1, -1])
    share = abs(after - before) / before if before else 0.0
    nearer = int((record.distance[-1, 1:] < record.distance[0, 1:]).sum())
    moved += f"; the last hidden state is {share:.1%} {'nearer to' if after < before else 'farther from'} the target"
    moved += f" ({before:.2f} → {after:.2f}), nearer in {nearer} of {record.distance.shape[1] - 1} layers."
    return what + moved + " " + _verdict(record, gain, after < before)


def _verdict(record: Record, gain: float, nearer: bool) -> str:
    best, answer = record.top[-1][0][0].strip(), record.answers[0].strip()
    if float(record.logprob[-1].max()) < -7:
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
    if record.top[0][0][0].strip() == answer:
        return f"It moved towards the fact; but {answer!r} was its first choice before, so this shows no new knowledge."
    return f"It learned to answer {answer!r} to this question; whether it learned the fact, one question cannot tell."


def _lead(logprob) -> float:
    return float(logprob[0] - logprob[1:].max()) if len(logprob) > 1 else float(logprob[0])


def _answers(record: Record, logprob) -> str:
    pairs = zip(record.answers, logprob.tolist(), strict=True)
    return ", ".join(f"log p({answer}) = {value:.2f}" for answer, value in pairs)


def _choice(top: list[tuple[str, float]]) -> str:
    return repr(top[0][0])


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly, with both ends."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
