"""report.html: a record, or a lens, as one page that needs nothing from elsewhere.

Every text of the user's goes through `shown`, which escapes it. The same record gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .canvas import svg
from .pictures import draw, patch_picture
from .style import STYLE
from .text import Recorded, outcome, patch_sentence, plain, where

Top = Sequence[Sequence[Any]]  # (token, log-probability), the likeliest first


def record_page(record: Recorded | Mapping[str, Any], drawn: Mapping[str, tuple[Any, str]] | None = None) -> str:
    """The whole page of a record, as HTML: light and dark, phone and desktop, without a script.

    Args:
        record: a record, or what its record.json holds.
        drawn: its pictures, as `draw` gives them; None: they are drawn.

    Raises:
        ImportError: without matplotlib (`pip install "fastweights[report]"`).
    """
    whole, drawn = plain(record), drawn or draw(record)
    settings = whole["settings"]
    figures = {name: _figure(svg(figure, name, words), CAPTIONS[name]) for name, (figure, words) in drawn.items()}
    moved, verdict = outcome(whole)
    under = [str(settings[key]) for key in ("model", "rule") if settings.get(key)]
    under += [f"layers {', '.join(map(str, settings['layers']))}"] if settings.get("layers") else []
    parts = [
        f"<h1>What did the fast weights take from the context?</h1><p class=under>{shown(' · '.join(under))}</p>",
        f"<p class=result>{shown(moved)} <strong>{shown(verdict)}</strong></p>",
        _section("What was asked", _asked(whole)),
        _section("The answers", _answers(whole), figures["logprob"]),
        _section("The hidden states", figures["distance"]),
        _section("The likeliest next tokens", _choices(whole)),
        _section("Layer by layer: the logit lens", _lens(whole)) if whole.get("lens") else "",
        _section("How far the weights moved", figures["norms"], _certificates(whole)),
        _section("Every event", _events(whole)),
        _section("Settings and versions", _settings(settings)),
    ]
    return document("fastweights report", parts)


CAPTIONS = {
    "logprob": "Dotted: the untouched model. Dashed: the same model with the context in front. "
    "If the context was taken up, the solid lines go from dotted to dashed.",
    "distance": "The hidden state at the answer position, without the context, against the one with it. Layers below "
    "the first plastic one cannot move. Grey: nothing to compare, the distance was 0 from the start.",
    "norms": "ΔW is the sum of its events, each an outer product u kᵀ of the size ‖u‖ ‖k‖.",
}


def lens_page(
    *,
    text: str,
    model: str,
    tokens: Sequence[Sequence[str]],
    probabilities: Sequence[Sequence[float]],
    answer: str | None = None,
    ranks: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page of a logit lens at the last position of a text, as HTML: what each layer would say next.

    Args:
        text: what was read.
        model: its name.
        tokens, probabilities: [L+1, K], the likeliest tokens after ℓ layers and how likely they are, 0 to 1.
        answer, ranks: a token and its rank after ℓ layers, [L+1]: 0 = the first choice; None: no such column.
        settings: whatever else is to be told, name by name.

    Raises:
        ValueError: for lists of different lengths.
    """
    counts = {"tokens": len(tokens), "probabilities": len(probabilities)}
    counts |= {"ranks": len(ranks)} if ranks is not None else {}
    if len(set(counts.values())) > 1 or (ranks is None) != (answer is None):
        said = ", ".join(f"{count} {name}" for name, count in counts.items()) + f" and the answer {answer!r}"
        raise ValueError(f"lens_page() got {said}: expected one row per layer each, and ranks with an answer")
    most = max(map(len, tokens), default=0)
    head = ["layers passed", *(["rank of " + answer] if answer is not None else []), "first choice"]
    rows = []
    for layer, (row, chances) in enumerate(zip(tokens, probabilities, strict=True)):
        cells = [_chance(token, chance) for token, chance in zip(row, chances, strict=True)]
        rank = [f"<td class=number>{ranks[layer]}</td>"] if ranks is not None else []
        rows.append("".join([f"<th scope=row>{layer}</th>", *rank, *cells]))
    lead = ""
    if ranks is not None:
        first = next((layer for layer, rank in enumerate(ranks) if rank == 0), None)
        lead = (
            f"{answer!r} is first after {_count(first, 'layer')}" if first is not None else f"{answer!r} is never first"
        )
        lead += f"; after the last it has rank {ranks[-1]}."
    parts = [
        f"<h1>What each layer would say next</h1><p class=under>{shown(model)}</p>",
        f"<p class=result>{shown(lead)}</p>" if lead else "",
        _section("The text", f"<blockquote dir=auto>{shown(text)}</blockquote>"),
        _section(
            "The logit lens",
            _note(
                "0 layers: the embedding. The stronger the colour, the likelier the token. Rank 0 is the first choice."
            ),
            _table("logit lens", [*head, *(f"{n}." for n in range(2, most + 1))], rows),
        ),
        _section("Settings", _settings(settings)) if settings else "",
    ]
    return document("fastweights lens", parts)


def patch_page(whole: Mapping[str, Any], settings: Mapping[str, Any], fig: Any = None) -> str:
    """The page of a context patch, as HTML.

    Args:
        whole: what `patch_table` takes.
        settings: whatever else is to be told, name by name; its "context" and "query" are shown as texts.
        fig: its picture, as `patch_picture` gives it; None: it is drawn.

    Raises:
        ImportError: without matplotlib (`pip install "fastweights[report]"`).
    """
    texts = [
        f"<h3>{name.title()}</h3><blockquote dir=auto>{shown(settings[name])}</blockquote>"
        for name in ("context", "query")
        if name in settings
    ]
    rows = []
    for n, piece in enumerate(whole["tokens"]):
        said = (f"<td>{token(whole['said'][run][n])}</td>" for run in ("reference", "unpatched", "patched"))
        rows.append(f"<th scope=row>{whole['start'] + n}</th><td>{token(piece)}</td>" + "".join(said))
    names = list(whole["norms"])
    changed = [
        f"<th scope=row>{shown(name)}</th>{_number(max(whole['norms'][name]), '.4f')}"
        f"{_number(sum(whole['norms'][name]) / len(whole['norms'][name]), '.4f')}"
        for name in names
    ]
    last = whole["layer_error"][0]
    words = (
        f"Two lines over {len(last)} layers, on a logarithmic scale: the relative error of the stream without events "
    )
    words += f"and with them. {patch_sentence(whole)}"
    caption = (
        "The largest over the query tokens. Each event is an outer product u kᵀ, made for one token and one linear."
    )
    head = ["position", "query token", "next, with the context", "without", "without, with events"]
    sizes = _table("sizes of the events", ["linear", "largest ‖ΔW‖ / ‖W‖", "mean"], changed, numbers=True)
    parts = [
        f"<h1>A context as events</h1><p class=under>{shown(settings.get('model', ''))}</p>",
        f"<p class=result>{shown(patch_sentence(whole))}</p>",
        _section("What was asked", *texts),
        _section("Layer by layer", _figure(svg(fig or patch_picture(whole), "patch", words), caption)),
        _section("Token by token", _table("first choices", head, rows)),
        _section("The events", f"<details><summary>{_count(len(names), 'linear')}</summary>{sizes}</details>"),
        _section("Settings", _settings({key: value for key, value in settings.items() if key != "query"})),
    ]
    return document("fastweights patch", parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page around its parts."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{shown(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def shown(text: Any) -> str:
    """A text as HTML shows it: escaped, also inside of an attribute."""
    return escape(str(text), quote=True)


def token(text: str) -> str:
    """A token as HTML: what cannot be seen is written as Python writes it, a space as ␣."""
    visible = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return f"<code dir=auto>{shown(visible.replace(' ', '␣'))}</code>"


# ---- the sections of a record


def _asked(whole: Mapping[str, Any]) -> str:
    settings = whole["settings"]
    answers = "".join(f"<li dir=auto>{shown(answer)}</li>" for answer in whole["answers"])
    own = sum(event["generated"] for event in whole["events"])
    read = f"{len(whole['tokens'])} tokens, {len(whole['events'])} of them written"
    read += f" ({own} the model's own)" if own else ""
    texts = [
        f"<h3>{what}</h3><blockquote dir=auto>{shown(settings[key])}</blockquote>"
        for what, key in ((f"Context ({read})", "context"), ("Question, asked without the context", "question"))
        if key in settings
    ]
    return "".join(texts) + f"<h3>Answers (the context argues for the first)</h3><ol>{answers}</ol>"


def _answers(whole: Mapping[str, Any]) -> str:
    rows = []
    for n, answer in enumerate(whole["answers"]):
        values = (whole["logprob"][0][n], whole["logprob"][-1][n], whole["target_logprob"][n])
        rows.append(f"<th scope=row dir=auto>{shown(answer)}</th>" + "".join(map(_number, values)))
    head = ["log-probability of", "untouched", f"after {_count(whole['probed'][-1])}", "target: context in front"]
    return _table("log-probabilities of the answers", head, rows, numbers=True)


def _choices(whole: Mapping[str, Any]) -> str:
    columns = (whole["top"][0], whole["top"][-1], whole["target_top"])
    rows = [
        f"<th scope=row>{place}.</th>" + "".join(_chance(piece, math.exp(logprob)) for piece, logprob in row)
        for place, row in enumerate(zip(*columns, strict=True), 1)
    ]
    head = ["", "untouched", f"after {_count(whole['probed'][-1])}", "target: context in front"]
    return _table("likeliest next tokens", head, rows)


def _lens(whole: Mapping[str, Any]) -> str:
    rows = [
        f"<th scope=row>{layer}</th>" + "".join(map(_layer, row))
        for layer, row in enumerate(zip(*whole["lens"], strict=True))
    ]
    note = _note(
        "What the model would say next if the final norm and the unembedding came after this many layers "
        "(0: the embedding). The stronger the colour, the likelier the first choice; below it the next ones."
    )
    head = ["layers passed", "untouched", f"after {_count(whole['probed'][-1])}", "target: context in front"]
    return note + _table("logit lens", head, rows)


def _layer(top: Top) -> str:
    """One cell of the lens table: the first choice, and the others below it."""
    (first, logprob), others = top[0], top[1:]
    chance = math.exp(logprob)
    rest = " ".join(token(piece) for piece, _ in others)
    return f"<td{_shade(chance)}>{token(first)} {_percent(chance)}<div class=others>{rest}</div></td>"


def _certificates(whole: Mapping[str, Any]) -> str:
    rows = []
    for each in whole["drift"]:
        values = (each["norm"], _hundred(each["relative"]), each["norm_2"], each["effective_rank"])
        counts = (f"{each['slots']} / {each['capacity']}", each["forgotten"], each["scaled"], each["largest_event"])
        rows.append(
            f"<th scope=row>{shown(each['name'])}</th>"
            + "".join(_number(value, ".4g") for value in values)
            + "".join(f"<td class=number>{'–' if value is None else value}</td>" for value in counts)
            + "".join(_number(value, ".3g") for value in (each["error_F"], each["error_2"], _hundred(each["lost"])))
        )
    head = ["linear", "‖ΔW‖_F", "% of ‖W‖_F", "‖ΔW‖₂", "effective rank", "slots / rank", "forgotten", "scaled"]
    head += ["largest event", "error ≤ (F)", "error ≤ (2)", "lost, %"]
    note = _note(
        "The certificate: the exact ΔW differs from the one that was read by at most this error, in the Frobenius and "
        "in the spectral norm. Lost is the first as a share of ‖ΔW‖_F. Forgotten events have left the ring."
    )
    table = _table("drift and certificates", head, rows, numbers=True)
    if len(rows) > 12:
        table = f"<details><summary>{len(rows)} plastic linears</summary>{table}</details>"
    return "<h3>Certificates</h3>" + note + table


def _events(whole: Mapping[str, Any]) -> str:
    rows = []
    for row in range(len(whole["probed"])):
        number, position, piece = where(whole, row)
        choices = ", ".join(f"{token(p)} {_percent(math.exp(lp))}" for p, lp in whole["top"][row][:3])
        state = (
            (whole["distance"][row][-1], ".2f"),
            (whole["cosine"][row][-1], ".4f"),
            (whole["delta_norm"][row], ".3f"),
        )
        rows.append(
            f"<th scope=row>{number}</th><td class=number>{position}</td><td><code>{shown(piece)}</code></td>"
            + "".join(map(_number, whole["logprob"][row]))
            + f"<td class=choices>{choices}</td>"
            + "".join(_number(*value) for value in state)
        )
    head = ["event", "position", "token", *(f"log p({answer})" for answer in whole["answers"]), "likeliest next"]
    summary = f"<summary>{_count(len(whole['probed']) - 1)} and the untouched model, row by row</summary>"
    note = _note("Distance and cosine: last layer, hidden state at the answer position to the target's.")
    table = _table("every probed event", [*head, "distance", "cosine", "‖ΔW‖"], rows)
    return f"<details>{summary}{note}{table}</details>"


def _settings(settings: Mapping[str, Any]) -> str:
    flat = {key: value for key, value in settings.items() if key not in ("context", "question", "versions")}
    flat |= settings.get("versions", {})
    rows = []
    for key, value in flat.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "–" if value is None else str(value)
        rows.append(f"<th scope=row>{shown(key)}</th><td>{shown(text)}</td>")
    return _table("settings", [], rows)


# ---- small pieces


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{shown(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _note(text: str) -> str:
    return f"<p class=note>{shown(text)}</p>"


def _figure(picture: str, caption: str) -> str:
    box = f'<div class=scroll tabindex=0 role=group aria-label="picture, may scroll">{picture}</div>'
    return f"<figure>{box}<figcaption>{shown(caption)}</figcaption></figure>"


def _table(name: str, head: Sequence[str], rows: Sequence[str], numbers: bool = False) -> str:
    """A table in a box of its own that scrolls where it is too wide; `numbers` stand below their columns' names."""
    top = "".join(f"<th scope=col>{shown(text)}</th>" if text else "<td></td>" for text in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    box = f'<div class=scroll tabindex=0 role=group aria-label="table, may scroll: {shown(name)}">'
    kind = " class=numbers" if numbers else ""
    return f"{box}<table{kind}>{top}<tbody>\n{body}\n</tbody></table></div>"


def _chance(piece: str, chance: float) -> str:
    return f"<td{_shade(chance)}>{token(piece)} {_percent(chance)}</td>"


def _shade(chance: float) -> str:
    """The colour of a cell; at most so strong that text on it stays readable, in the light and in the dark."""
    return f' style="background:rgba(47,127,193,{0.6 * chance:.3f})"'


def _percent(chance: float) -> str:
    return f"<span class=percent>{100 * chance:.1f}%</span>"


def _number(value: float | None, form: str = ".3f") -> str:
    text = "–" if value is None else format(value, form)
    return f"<td class=number>{shown(text.replace('-', '−'))}</td>"


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _count(number: int, noun: str = "event") -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
