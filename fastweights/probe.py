"""The probe: one prompt under many moments of the fast weights and many alternatives of a sweep; it writes nothing.

Shape suffixes: M moments, N alternatives, B rows of the question, T tokens, T′ kept columns, C columns of an exam, R
rows of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cache import Positions
from .episode_state import Address, EpisodeState
from .inputs import Ids, Mask, tokens
from .lanes import Alternative, Point, Question, Runner
from .model import Llama
from .probes.capture import bind, check_plastic
from .probes.edits import Edit
from .probes.exam import Exam, Scores
from .probes.places import Places, Reading, numbers
from .probes.sites import names_of, site_of
from .probes.taps import Bound
from .probes.trace import Trace
from .progress import bar
from .state.moments import At, Moment, moments
from .watch import touched

Metric = Callable[[Tensor], Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What a probe is to answer with. logits: whether they are kept; shown: which of those computed they are."""

    logits: bool
    metric: Metric | None
    exam: Exam | None
    exam_BC: Tensor | None
    shown: slice
    gradient: bool


def probe(
    model: Llama,
    state: EpisodeState,
    linears: Mapping[Address, Any],
    input_ids: Ids | Exam,
    sites: str | Sequence[str],
    layers: Any,
    at: At,
    edits: Edit | Sequence[Edit],
    sweep: Sequence[Edit | Sequence[Edit]] | None,
    metric: Metric | None,
    gradient: bool,
    attention_mask: Mask,
    logits: str | None,
    positions: Any,
    max_bytes: int,
    progress: Progress | None,
) -> Trace:
    """See `Episode.probe`."""
    exam = input_ids if isinstance(input_ids, Exam) else None
    if logits not in (None, "all", "last"):
        raise ValueError(f"logits={logits!r}: expected 'all' or 'last'")
    if metric is not None and not callable(metric):
        raise ValueError(f"metric={metric!r}: expected a function of logits [B, T′, V]")
    if exam is not None and metric is not None:
        raise ValueError("probe() got an exam and a metric: expected one of them")
    if gradient and exam is None and metric is None:
        raise ValueError("probe(gradient=True) needs a metric or an exam: the gradient is that of its sum")
    if gradient and not names_of(sites):
        raise ValueError(
            "probe(gradient=True) needs sites=: the gradient is taken at every kept site, and none is kept"
        )
    if gradient and torch.is_inference_mode_enabled():
        raise ValueError("probe(gradient=True) is called inside torch.inference_mode(), where no gradient is taken")
    ids_BT, positions_BT = _asked(model, state, input_ids, attention_mask)
    reading = Reading.of(ids_BT, positions_BT, whole=True)
    if exam is not None:
        reading = replace(reading, start_B=torch.tensor(_per_row(exam.starts, len(ids_BT)), device="cpu"))
    column_BT = _columns(positions, reading)
    points, names = _points(model, linears, sites, layers)
    wanted_moments = _moments(state, at)
    bounds = _checked(bind(edits, model, linears), reading)
    around = [bound for call in model.binding.taps for bound in call.what.edits]
    for bound in around:
        bound.begin(reading)
    depth = model.config.num_hidden_layers
    alternatives = [
        Alternative(number, _alternative(bounds_of, number, reading), depth, linears)
        for number, bounds_of in enumerate(() if sweep is None else _sweep(sweep, model, linears))
    ]
    keep = logits is not None or (exam is None and metric is None and "logits" not in names)
    wanted, logit_BT = _wanted(keep, logits == "last", metric, exam, gradient, column_BT, reading, names)
    here = [None if c is None else c.to(model.device) for c in (column_BT, logit_BT)]
    question = Question(ids_BT.to(model.device), positions_BT, reading, points, *here)
    whole = touched(model) or touched(model.model)
    options = (wanted_moments, alternatives, [*around, *bounds], gradient, whole)
    with torch.set_grad_enabled(gradient):
        runner = Runner(model, state, question, *options)
        answer = Answer(runner, wanted)
        size = _lanes_at_once(runner, wanted, max_bytes)
        batches = list(_batches(len(wanted_moments or [0]), alternatives, size))
        drawn = nullcontext(progress) if progress is not None or len(batches) == 1 else bar("probing")
        with drawn as show:
            for batch in batches:
                answer.ask(*batch)
                if show is not None:
                    show(answer.done, runner.kept.moments * max(1, len(alternatives)))
    return answer.trace(at != "now" if isinstance(at, str) else True, sweep is not None, names, reading)


class Answer:
    """What has been answered so far: per moment and alternative."""

    def __init__(self, runner: Runner, wanted: Wanted):
        self.runner, self.wanted, self.kept = runner, wanted, runner.kept
        self.logits: Tensor | None = None
        self.metric: Tensor | None = None
        self.logprob: Tensor | None = None
        self.rank: Tensor | None = None
        self.gradients: dict[Point, Tensor] = {}
        self.done = 0

    def ask(self, moments: Sequence[int], chosen: Sequence[Alternative]) -> None:
        """Runs one batch, and keeps what it answers."""
        wanted = self.wanted
        rows = len(self.runner.question.ids_BT)
        with self.runner.running():
            logits_RTV = self.runner.batch(moments, chosen)
        logits = logits_RTV.unflatten(0, (-1, rows))  # [lanes, B, T″, V]
        total: list[Tensor] = []
        if wanted.logits:
            self.logits = self._spread(self.logits, logits[:, :, wanted.shown].detach())
        if wanted.metric is not None:
            values = _measured(wanted.metric, logits[:, :, wanted.shown])
            total.append(sum((value.sum() for value in values), torch.zeros(())))
            self.metric = self._spread(self.metric, torch.stack([value.detach() for value in values]))
        if wanted.exam is not None:
            scores = wanted.exam.score(logits[:, :, -wanted.exam_BC.shape[1] :], wanted.exam_BC)  # type: ignore[union-attr]
            if wanted.gradient:
                total.append(scores.difference.sum())
            self.logprob = self._spread(self.logprob, scores.logprob.detach())
            self.rank = self._spread(self.rank, scores.rank)
        if wanted.gradient:
            self._differentiate(total[0])
        self.done += len(moments) * max(1, len(chosen))

    def _differentiate(self, total: Tensor) -> None:
        """The gradient of every kept site."""
        if not total.requires_grad:
            raise ValueError("probe(gradient=True): the metric does not depend on the logits it was given")
        points = list(self.kept.graph)
        found = torch.autograd.grad(total, [self.kept.graph[p][0] for p in points], allow_unused=True)
        for point, gradient in zip(points, found, strict=True):
            x, narrow = self.kept.graph[point]
            self.kept.put(self.gradients, point, torch.zeros_like(x) if gradient is None else gradient, narrow)
        self.kept.graph.clear()

    def _spread(self, into: Tensor | None, values: Tensor) -> Tensor:
        """Copies [lanes, …] to where they belong in [M, N, …]."""
        kept = self.kept
        if into is None:
            into = values.new_zeros(kept.moments, max(1, len(kept.alternatives)), *values.shape[1:])
        kept.spread(into, values)
        return into

    def trace(self, moments: bool, sweep: bool, names: Sequence[str], reading: Reading) -> Trace:
        """All of it; without the axes that nobody asked for."""

        def cut(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            x = x if sweep else x[:, 0]
            return x if moments else x[0]

        layers: dict[str, list[int]] = {}
        for site, layer in self.runner.question.points:
            if layer is not None:
                layers.setdefault(site.name, []).append(layer)
        leading = int(moments) + int(sweep)

        def stacked(found: dict[Point, Tensor]) -> dict[str, Tensor]:
            whole: dict[str, Tensor] = {}
            for name in names:
                parts = [found[point] for point in self.runner.question.points if point[0].name == name]
                site, _ = site_of(name)
                whole[name] = cut(torch.stack(parts, 2) if site.layered else parts[0])  # type: ignore[assignment]
            return whole

        column_BT, position_BT = self.runner.question.kept_BT, reading.position_BT
        if column_BT is not None:
            position_BT = position_BT.gather(1, column_BT.cpu())
        scores = None
        if self.logprob is not None:
            logprob, rank = cut(self.logprob), cut(self.rank)
            assert logprob is not None
            assert rank is not None
            scores = Scores(logprob, rank)
        gradients = stacked(self.gradients) if self.wanted.gradient else {}
        sites, metric = stacked(self.kept.found), cut(self.metric)
        logits = cut(self.logits)
        if logits is not None:
            sites["logits"] = logits
        ids_BT, model_type = reading.ids_BT.clone(), self.runner.model.config.model_type
        return Trace(sites, layers, ids_BT, position_BT.clone(), metric, gradients, scores, leading, model_type)


def _measured(metric: Metric, logits: Tensor) -> list[Tensor]:
    """What a metric gives for each lane of logits [lanes, B, T′, V]."""
    given = [metric(lane) for lane in logits]
    try:
        values = [torch.as_tensor(each) for each in given]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"metric returned a {type(given[0]).__name__}: expected a number or a tensor") from None
    if len(shapes := sorted({tuple(value.shape) for value in values})) > 1:
        raise ValueError(f"metric returned shapes {list(shapes[0])} and {list(shapes[1])}: expected always the same")
    return values


# ---- what was asked, understood or refused


def _asked(model: Llama, state: EpisodeState, input_ids: Ids | Exam, mask: Mask) -> tuple[Tensor, Positions]:
    """ids [B, T] on the CPU, and where they stand."""
    if isinstance(input_ids, Exam):
        if mask is not None:
            raise ValueError("probe() got an exam and an attention_mask: an exam knows its own tokens")
        input_ids = input_ids.rows
    ids_BT, mask_BT = tokens(input_ids, mask, None, model.config.vocab_size)
    width = ids_BT.shape[1]
    if width > model.config.max_position_embeddings:
        raise ValueError(
            f"a probe of {width} tokens does not fit: this model has positions up to "
            f"{model.config.max_position_embeddings}"
        )
    if len(ids_BT) == 1:
        ids_BT = ids_BT.expand(state.batch_size, -1)
        mask_BT = None if mask_BT is None else mask_BT.expand(state.batch_size, -1)
    elif len(ids_BT) != state.batch_size and state.states != 1:
        raise ValueError(f"probe() got batch {len(ids_BT)}, but this episode has batch {state.batch_size}")
    return ids_BT, Positions.alone((len(ids_BT), width), mask_BT, model.device)


def _columns(positions: Any, reading: Reading) -> Tensor | None:
    """The columns to keep, [B, T′] on the CPU; None: all."""
    rows, width = reading.ids_BT.shape
    if positions is None:
        return None
    if isinstance(positions, str):
        if positions != "last":
            raise ValueError(f"probe(positions={positions!r}): expected columns, or 'last'")
        return reading.last_B[:, None]
    try:
        columns = torch.as_tensor(positions).reshape(-1)
    except (TypeError, ValueError, RuntimeError):
        columns = torch.zeros(0, device="cpu")
    whole = not columns.is_floating_point() and columns.dtype != torch.bool and len(columns)
    if not whole or int(columns.min()) < 0 or int(columns.max()) >= width:
        raise ValueError(f"probe(positions={positions!r}): expected columns from 0 to {width - 1}, or 'last'")
    return columns.long().cpu().expand(rows, -1)


def _points(
    model: Llama, linears: Mapping[Address, Any], sites: str | Sequence[str], layers: Any
) -> tuple[list[Point], list[str]]:
    """The sites to keep, with their layers, and their names."""
    points: list[Point] = []
    names: list[str] = []
    given, family = names_of(sites), model.config.family
    wanted = numbers("layer", layers)
    if wanted is not None and not any(site_of(name, family)[0].layered for name in given):
        raise ValueError(f"probe(layers={layers!r}): none of the sites {given} lies in layers")
    for name in [*given, *(["embedding"] if "resid_post" in given else [])]:
        site, named = site_of(name, family)
        own = named if named is not None else (wanted if site.layered else None)
        places = Places(name, own, None, None, None, None).of(model.config)
        check_plastic(places, linears)
        if site.name.endswith((".key", ".value")):
            raise ValueError(f"a probe writes nothing, so it has no {site.name!r}: fw.capture keeps it in a feed")
        if site.side == "plastic" and places.layers is None:
            chosen: Sequence[int | None] = sorted(layer for layer, linear in linears if linear == places.linear)
        elif site.layered:
            chosen = range(model.config.num_hidden_layers) if places.layers is None else places.layers
        else:
            chosen = [None]
        points += [(site, layer) for layer in chosen if (site, layer) not in points]
        names += [site.name] if site.name not in names else []
    return points, names


def _moments(state: EpisodeState, at: At) -> list[Moment] | None:
    latest = max((max(log.event_counts) for log in state.logs.values()), default=0)
    return None if isinstance(at, str) and at == "now" else moments(at, latest, state.logs)


def _sweep(sweep: Any, model: Llama, linears: Mapping[Address, Any]) -> list[list[Bound]]:
    if isinstance(sweep, (str, Edit)) or not isinstance(sweep, Sequence) or not len(sweep):
        raise ValueError("probe(sweep=...): expected a list of alternatives, each an edit or a list of edits")
    return [bind(each, model, linears) for each in sweep]


def _alternative(bounds: list[Bound], number: int, reading: Reading) -> list[Bound]:
    for bound in bounds:
        bound.alternative = number
    return _checked(bounds, reading)


def _checked(bounds: list[Bound], reading: Reading) -> list[Bound]:
    """Refuses edits that this question has no place for."""
    for bound in bounds:
        if bound.site.name.endswith((".key", ".value")):
            raise ValueError(f"a probe writes nothing, so {bound.edit!r} cannot act: give it to feed or generate")
        bound.begin(reading)
        if not bool(bound.chosen_BT.any()):
            raise ValueError(f"{bound.edit!r} selects no token of this probe")
    return bounds


def _per_row(each: Sequence[Any], rows: int) -> list[Any]:
    """What an exam says of its rows, for the rows that are asked."""
    if len(each) not in (1, rows):
        raise ValueError(f"an exam of {len(each)} rows is asked of a batch of {rows}: expected as many, or one row")
    return [*each] * (rows if len(each) == 1 else 1)


def _wanted(
    keep: bool,
    last: bool,
    metric: Metric | None,
    exam: Exam | None,
    gradient: bool,
    column_BT: Tensor | None,
    reading: Reading,
    names: Sequence[str],
) -> tuple[Wanted, Tensor | None]:
    """What to answer with, and the columns whose logits it takes, [B, T″] on the CPU; None: all.

    They are the kept columns where sites behind the last block or logits want them, then the last ones where logits are
    to be those, then the exam's.
    """
    rows, width = reading.ids_BT.shape
    every_BT = torch.arange(width, device="cpu").expand(rows, -1) if column_BT is None else column_BT
    shows, parts = keep or metric is not None, []
    if (shows and not last) or {"logits", "final_norm"} & set(names):
        parts.append(every_BT)
    shown = slice(0, every_BT.shape[1])
    if shows and last:
        before = sum(part.shape[1] for part in parts)
        shown = slice(before, before + 1)
        parts.append(reading.last_B[:, None])
    exam_BC = None
    if exam is not None:
        columns = _per_row(exam.row_columns, rows)
        most = max(map(len, columns))
        exam_BC = torch.tensor([[*row, *[-1] * (most - len(row))] for row in columns], device="cpu")
        parts.append(exam_BC.clamp(min=0))
    logit_BT = column_BT if len(parts) == 1 and parts[0] is every_BT else torch.cat(parts, dim=1)
    return Wanted(keep, metric, exam, exam_BC, shown, gradient), logit_BT


# ---- memory


def _lanes_at_once(runner: Runner, wanted: Wanted, max_bytes: int) -> int:
    """How many lanes a batch may have: activations of one block, kept sites, logits.

    Raises:
        ValueError: what is kept, and one lane, do not fit into `max_bytes`.
    """
    model, question, config = runner.model, runner.question, runner.model.config
    rows, tokens = question.ids_BT.shape
    slots = max((log.used for log in runner.state.logs.values()), default=0)
    computed = tokens if question.logit_BT is None else question.logit_BT.shape[1]
    named = {site.name for site, _ in question.points} | {b.site.name for bs in runner.tap.edits.values() for b in bs}
    per_token = 8 * config.hidden_size + 6 * config.intermediate_size + 2 * slots
    if "result" in named:
        per_token += 3 * config.num_attention_heads * config.hidden_size
    if named & {"scores", "pattern"}:
        per_token += 4 * config.num_attention_heads * tokens
    one = tokens * per_token
    if runner.kept.gradient:
        one *= config.num_hidden_layers
    one = rows * (one + computed * 2 * config.vocab_size) * model.dtype.itemsize
    sizes = {"S": tokens, "H": config.num_attention_heads}
    kept = 0
    for site, _ in question.points:
        numbers_ = question.width * (2 if runner.kept.gradient else 1)
        for letter, size in zip(site.axes, site.sizes(config), strict=True):
            numbers_ *= sizes.get(letter, 0) if size is None else size
        kept += numbers_
    kept += (wanted.shown.stop - wanted.shown.start) * config.vocab_size if wanted.logits else 0
    kept *= rows * runner.kept.moments * max(1, len(runner.kept.alternatives)) * model.dtype.itemsize
    if kept + one > max_bytes:
        raise ValueError(
            f"this probe needs {kept + one} bytes, {kept} of them for what it keeps, but max_bytes={max_bytes}: "
            "keep fewer sites, layers, positions, moments or alternatives, or allow more"
        )
    # a sixteenth at a time: more lanes make no layer faster on a CPU, and fall out of the caches. A GPU needs a few
    # thousand tokens for a product at full speed.
    share = max_bytes // (16 if model.device.type == "cpu" else 4)
    return max(1, min(max_bytes - kept, share) // one)


def _batches(moments: int, alternatives: Sequence[Alternative], size: int) -> Iterator[tuple[range, list[Alternative]]]:
    """Moments and alternatives of each batch; alternatives in the order in which they join."""
    waiting = sorted(alternatives, key=lambda one: one.joins)
    many = max(1, min(moments, size // max(1, len(waiting))))
    few = max(1, size // many)
    for m in range(0, moments, many):
        block = range(m, min(m + many, moments))
        for n in range(0, max(1, len(waiting)), few):
            yield block, waiting[n : n + few]
