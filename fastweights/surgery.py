"""The experiment: read a context with fast weights, and after each event ask the question without it.

Shape suffixes: N rows of the record (the untouched model, then one per probed event), A answers, L layers,
D model width, V vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attach import attach, detach
from .episode import Episode
from .inputs import Update, written
from .model import Llama
from .plastic import plastic_linears
from .probes.exam import Exam
from .record import Event, Record
from .rules import Rule
from .state.moments import delta_norms
from .tokenizer import Tokenizer
from .version import __version__

Progress = Callable[[int, int], None]


def surgery(
    model: Llama,
    tokenizer: Tokenizer,
    *,
    context: str,
    question: str,
    answers: Sequence[str],
    layers: int | Sequence[int] | str,
    rule: Rule,
    linears: str | Sequence[str] | None = None,
    rank: int = 64,
    overflow: str = "grow",
    budget: float | None = None,
    over_budget: str = "scale",
    update: Update = "all",
    max_new_tokens: int = 0,
    probe_every: int = 1,
    on_event: Callable[[Episode, Event], None] | None = None,
    progress: Progress | None = None,
) -> Record:
    """Reads the context through the plastic model; after each event asks the question without the context.

    The context goes through in one feed, and all moments are probed in batches behind it. With `on_event`, or an
    overflow that forgets old moments, the tokens go one by one, each followed by its probe and the callback: the
    same numbers, more slowly.

    The target is what the untouched model holds at the answer position when the context stands before the
    question; the two are joined by a blank line unless there is white space at the seam already.

    Args:
        answers: texts that may follow the question, scored over all their tokens; the first is the one that
            the context argues for.
        layers, rule, linears, rank, overflow, budget, over_budget: as in `attach`.
        update: which tokens are written, as in `feed` and `generate`.
        max_new_tokens: how many tokens the model goes on to generate (greedily) after the context.
        probe_every: probe after every this many events.
        on_event: called after each event and its probe; it may run anything on the episode that only reads.
        progress: called as (moments probed, moments) while the batches run.

    Raises:
        ValueError: before the model is touched; the model is as it was afterwards, whatever happens.
    """
    if tokenizer is None:  # what load() returns for a checkpoint without one
        raise ValueError("surgery() got None for the tokenizer: it turns the texts into ids")
    if plastic_linears(model):
        raise ValueError("surgery() got a model that is already plastic: fw.detach(model) first")
    if isinstance(probe_every, bool) or not isinstance(probe_every, int) or probe_every < 1:
        raise ValueError(f"surgery(probe_every={probe_every!r}): expected a whole number, 1 or more")
    for what, text in (("context", context), ("question", question)):
        if not text.strip():
            raise ValueError(f"surgery() got an empty {what}: expected a text")
    ids = tokenizer.encode(context)
    longest = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > longest:
        raise ValueError(
            f"the context has {len(ids)} tokens and {max_new_tokens} are to be generated, "
            f"but this model has positions up to {longest}"
        )
    positions = torch.arange(len(ids), device="cpu")[None]
    if not max_new_tokens and not written(update, torch.tensor([ids], device="cpu"), positions, generated=False).any():
        raise ValueError(f"update={update!r} writes none of the context's {len(ids)} tokens")
    fast = attach(model, layers, rule, linears, rank, overflow, budget=budget, over_budget=over_budget)
    try:
        target = Target(model, tokenizer, context, question, answers)
        record = _run(Episode(model), tokenizer, target, ids, update, max_new_tokens, probe_every, on_event, progress)
    finally:
        detach(model)
    settings: dict = {
        "context": context,
        "question": question,
        "rule": repr(rule),
        "layers": sorted({layer for layer, _ in fast.linears}),
    }
    every = [*model.config.family.linears] if linears is None else linears
    names = [every] if isinstance(every, str) else [*every]
    settings |= {"linears": names, "rank": rank, "overflow": overflow, "dtype": str(model.dtype)[6:]}
    settings |= {"budget": budget, "over_budget": over_budget}
    said = update if isinstance(update, (str, list)) else repr(update)
    settings |= {"device": str(model.device), "update": said}
    versions = {"fastweights": __version__, "torch": torch.__version__, "python": platform.python_version()}
    settings |= {"versions": versions}
    return replace(record, settings=settings)


@dataclass(frozen=True)
class Result:
    """One asking of the question."""

    logprob_A: Tensor
    top: list[tuple[str, float]]
    hidden_LD: Tensor  # at the answer position, float64, on the CPU
    delta_norm: float


class Target:
    """The question as an exam, and what the untouched model says to it, with the context in front and without.

    Row 0 of an exam of one prompt is that prompt or begins with it, and the first of its columns is the answer
    position.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, context: str, question: str, answers: Sequence[str]):
        self.exam = Exam(tokenizer, [question], answers)
        seam = "" if context[-1:].isspace() or question[:1].isspace() else "\n\n"
        informed = Exam(tokenizer, [context + seam + question], answers)
        for length in (len(informed.prompt_ids[0]) + len(ids) - 1 for ids in informed.answer_ids[0]):
            if length > model.config.max_position_embeddings:
                raise ValueError(
                    f"context, question and answer have {length} tokens, "
                    f"but this model has positions up to {model.config.max_position_embeddings}"
                )
        frozen = Episode(model)
        (target,) = _ask(frozen, informed, [0])
        self.logprob, self.hidden_LD, self.top = target.logprob_A, target.hidden_LD, target.top
        (self.untouched,) = _ask(frozen, self.exam, [0])

    def distances(self, hidden_LD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L2, cosine and relative distance from the target, each [L+1]."""
        distance_L = (hidden_LD - self.hidden_LD).norm(dim=-1)
        cosine_L = 1 - torch.cosine_similarity(hidden_LD, self.hidden_LD, dim=-1)
        return distance_L, cosine_L, distance_L / self.hidden_LD.norm(dim=-1)


def _ask(episode: Episode, exam: Exam, events: Sequence[int], progress: Progress | None = None) -> list[Result]:
    """What the model says after each of `events`, in batches, with the fast weights of an episode of one row."""
    trace = episode.probe(exam.rows, sites=["resid_post"], at=list(events), positions=exam.columns, progress=progress)
    norm_M = delta_norms(episode.logs, events, row=0)
    hidden_MLD = trace.hidden_states[:, :, 0, 0].cpu().double()
    logprob_MA = exam.score(trace.logits, exam.columns).logprob[:, 0].cpu()
    results = []
    for m, norm in enumerate(norm_M.tolist()):
        logprob_V = trace.logits[m, 0, 0].double().log_softmax(-1)
        best = logprob_V.topk(min(5, len(logprob_V)))
        pieces = exam.tokenizer.tokens(best.indices.tolist())
        top = list(zip(pieces, best.values.tolist(), strict=True))
        results.append(Result(logprob_MA[m], top, hidden_MLD[m], norm))
    return results


def _run(
    episode: Episode,
    tokenizer: Tokenizer,
    target: Target,
    context_ids: list[int],
    update: Update,
    max_new_tokens: int,
    probe_every: int,
    on_event: Callable[[Episode, Event], None] | None,
    progress: Progress | None,
) -> Record:
    positions = torch.arange(len(context_ids), device="cpu")[None]
    write_1T = written(update, torch.tensor([context_ids], device="cpu"), positions, generated=False)
    reading = _Reading(episode, tokenizer, target, probe_every, on_event)
    # a log that overflows forgets its earlier moments: they must be looked at as they come
    one_by_one = on_event is not None or any(log.overflow in ("compress", "evict") for log in episode.logs.values())
    if not one_by_one:
        episode.feed(context_ids, update=write_1T, logits="last")
        for token, writes in zip(context_ids, write_1T[0].tolist(), strict=True):
            reading.read(token, writes, generated=False)
    else:
        for token, writes in zip(context_ids, write_1T[0].tolist(), strict=True):
            episode.feed([token], update=torch.tensor([[writes]], device="cpu"), logits="last")
            reading.read(token, writes, generated=False)
            reading.look()
    for step in episode.generate(None, max_new_tokens, update=update) if max_new_tokens else ():
        position = torch.tensor([[len(reading.tokens)]], device="cpu")
        writes = bool(written(update, step.token_ids[:, None], position, generated=True))
        reading.read(int(step.token_ids[0]), writes, generated=True)
        if one_by_one:
            reading.look()
    if not one_by_one:
        reading.look(progress)
    events, probed, results = reading.events, reading.probed, reading.results
    distance_NL, cosine_NL, relative_NL = zip(*(target.distances(r.hidden_LD) for r in results), strict=True)
    return Record(
        tokens=tokenizer.tokens(reading.tokens),
        token_ids=reading.tokens,
        question_ids=target.exam.prompt_ids[0],
        answers=target.exam.answers[0],
        answer_ids=target.exam.answer_ids[0],
        events=events,
        probed=probed,
        logprob=torch.stack([r.logprob_A for r in results]),
        target_logprob=target.logprob,
        distance=torch.stack(distance_NL),
        cosine=torch.stack(cosine_NL),
        relative=torch.stack(relative_NL),
        delta_norm=torch.tensor([r.delta_norm for r in results], dtype=torch.float64, device="cpu"),
        top=[r.top for r in results],
        target_top=target.top,
        drift=episode.drift(),
        lens=_lens(episode.model, tokenizer, results[0].hidden_LD, results[-1].hidden_LD, target.hidden_LD),
    )


@torch.no_grad()
def _lens(model: Llama, tokenizer: Tokenizer, *states_LD: Tensor) -> list[list[list[tuple[str, float]]]]:
    """The likeliest tokens of every residual stream, as `Record.top` has them."""
    hidden_ND = torch.cat(states_LD).to(model.device, model.dtype)
    logits_NV = model.unembed(hidden_ND[None])[0].to(torch.promote_types(model.dtype, torch.float32))
    best = logits_NV.topk(min(5, logits_NV.shape[-1]))
    logprob_NK = best.values - logits_NV.logsumexp(-1, keepdim=True)
    rows = zip(best.indices.tolist(), logprob_NK.tolist(), strict=True)
    table = [list(zip(tokenizer.tokens(ids), values, strict=True)) for ids, values in rows]
    depth = len(states_LD[0])
    return [table[n : n + depth] for n in range(0, len(table), depth)]


class _Reading:
    """The tokens read so far, the events they brought, and the probes after them."""

    def __init__(self, episode: Episode, tokenizer: Tokenizer, target: Target, probe_every: int, on_event):
        self.episode, self.tokenizer, self.target = episode, tokenizer, target
        self.probe_every, self.on_event = probe_every, on_event
        self.tokens: list[int] = []
        self.waiting: list[tuple[int, bool]] = []  # written, but a gradient event waits for the next token
        self.events: list[Event] = []
        self.probed, self.results = [0], [target.untouched]

    def read(self, token: int, writes: bool, generated: bool) -> None:
        self.tokens.append(token)
        if writes:
            self.waiting.append((len(self.tokens) - 1, generated))

    def look(self, progress: Progress | None = None) -> None:
        """Probes after the new events, all in one go, and reports each."""
        new = range(len(self.events) + 1, self.episode.events + 1)
        due = [number for number in new if number % self.probe_every == 0]
        if due:
            self.results += _ask(self.episode, self.target.exam, due, progress)
            self.probed += due
        for number in new:
            position, generated = self.waiting.pop(0)
            token, logprob_A, distance_L = self.tokens[position], None, None
            if number in due:
                result = self.results[self.probed.index(number)]
                logprob_A, distance_L = result.logprob_A, self.target.distances(result.hidden_LD)[0]
            piece = self.tokenizer.tokens([token])[0]
            self.events.append(Event(number, position, token, piece, generated, logprob_A, distance_L))
            if self.on_event is not None:
                before = (self.episode.lengths, self.episode.event_counts)
                self.on_event(self.episode, self.events[-1])
                if before != (self.episode.lengths, self.episode.event_counts):
                    raise ValueError(f"on_event changed the episode at event {number}: it may only read it")
