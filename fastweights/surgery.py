"""The experiment: read a context with fast weights, and after each event ask the question without it.

Shape suffixes: N rows of the record (the untouched model, then one per probed event), A answers, L layers,
D model width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from .episode import Episode
from .inputs import Update, written
from .model import Llama
from .plastic import attach, detach, plastic_linears
from .rules import Rule
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Event:
    """One write: the `number`-th (from 1), made by the token at `position`.

    logprob [A] and distance [L+1] are of the probe after it; None where `probe_every` left it out.
    """

    number: int
    position: int
    token_id: int
    token: str
    generated: bool
    logprob: Tensor | None = None
    distance: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """What an experiment returns. Row 0 of every array is the untouched model without the context.

    settings: rule, layers, linears, … as the caller gave them.
    tokens, token_ids: what was read (and generated, if asked for).
    events: every event; `probed` [N] tells which row stands behind how many events.
    logprob [N, A]: log-probability of each answer after the question, summed over its tokens, in nats.
    target_logprob [A]: the same of the untouched model with the context in front.
    distance, cosine, relative [N, L+1]: of the hidden state at the answer position from the one with context:
        ‖test − target‖, 1 − cos(test, target), ‖test − target‖ / ‖target‖. Column ℓ is the residual stream
        after ℓ layers (0 = embedding, L = before the final norm).
    top: the likeliest next tokens after the question, per row: (token, log-probability).
    delta_norm [N]: Frobenius norm of ΔW over all plastic linears together.
    """

    tokens: list[str]
    token_ids: list[int]
    question_ids: list[int]
    answers: list[str]
    answer_ids: list[list[int]]
    events: list[Event]
    probed: list[int]
    logprob: Tensor
    target_logprob: Tensor
    distance: Tensor
    cosine: Tensor
    relative: Tensor
    delta_norm: Tensor
    top: list[list[tuple[str, float]]]
    target_top: list[tuple[str, float]]
    settings: dict = field(default_factory=dict)

    ARRAYS: ClassVar = ("logprob", "target_logprob", "distance", "cosine", "relative", "delta_norm")

    def to_dict(self) -> dict:
        """Everything as plain JSON values."""
        whole = {key: value for key, value in self.__dict__.items() if key not in (*self.ARRAYS, "events")}
        whole |= {name: getattr(self, name).tolist() for name in self.ARRAYS}
        drop = ("logprob", "distance")  # they are the record's rows
        whole["events"] = [
            {key: value for key, value in asdict(event).items() if key not in drop} for event in self.events
        ]
        return whole

    def save(self, folder: str | Path) -> None:
        """Writes record.json (everything) and arrays.safetensors (the arrays, exact) into `folder`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(self, name).contiguous() for name in self.ARRAYS}
        save_file(arrays, folder / "arrays.safetensors")
        (folder / "record.json").write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")


def surgery(
    model: Llama,
    tokenizer: Tokenizer,
    *,
    context: str,
    question: str,
    answers: Sequence[str],
    layers: Sequence[int],
    rule: Rule,
    linears: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    rank: int = 64,
    overflow: str = "grow",
    update: Update = "all",
    max_new_tokens: int = 0,
    probe_every: int = 1,
    on_event: Callable[[Episode, Event], None] | None = None,
) -> Record:
    """Reads the context through the plastic model; after each event asks the question without the context.

    The target is what the untouched model holds at the answer position when the context stands before the
    question; the two are joined by a blank line unless there is white space at the seam already.

    Args:
        answers: texts that may follow the question, scored over all their tokens; the first is the one that
            the context argues for.
        layers, rule, linears, rank, overflow: as in `attach`.
        update: which tokens are written, as in `feed` and `generate`.
        max_new_tokens: how many tokens the model goes on to generate (greedily) after the context.
        probe_every: probe after every this many events.
        on_event: called after each event and its probe; it may run anything on the episode that only reads.

    Raises:
        ValueError: before the model is touched; the model is as it was afterwards, whatever happens.
    """
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
    positions = torch.arange(len(ids))[None]
    if not max_new_tokens and not written(update, torch.tensor([ids]), positions, generated=False).any():
        raise ValueError(f"update={update!r} writes none of the context's {len(ids)} tokens")
    attach(model, layers, rule, linears, rank, overflow)
    try:
        exam = Exam(model, tokenizer, context, question, answers)
        record = _run(model, tokenizer, exam, ids, update, max_new_tokens, probe_every, on_event)
    finally:
        detach(model)
    settings: dict = {"context": context, "question": question, "rule": repr(rule), "layers": [*layers]}
    settings |= {"linears": [*linears], "rank": rank, "overflow": overflow, "dtype": str(model.dtype)[6:]}
    said = update if isinstance(update, (str, list)) else repr(update)
    settings |= {"device": str(model.device), "update": said}
    return replace(record, settings=settings)


@dataclass(frozen=True)
class Result:
    """One asking of the question."""

    logprob_A: Tensor
    hidden_LD: Tensor  # at the answer position, float64
    top: list[tuple[str, float]]
    delta_norm: float


class Exam:
    """The question without its context, its answers, and the target: how far is the model from knowing?"""

    def __init__(self, model: Llama, tokenizer: Tokenizer, context: str, question: str, answers: Sequence[str]):
        if isinstance(answers, str) or not answers:
            raise ValueError(f"answers={answers!r}: expected a list of one or more texts")
        self.tokenizer = tokenizer
        self.question_ids = tokenizer.encode(question)
        self.answers = list(answers)
        self.answer_ids = [_continuation(tokenizer, question, answer) for answer in answers]
        self.rows = _unique([self.question_ids + ids[:-1] for ids in self.answer_ids])
        seam = "" if context[-1:].isspace() or question[:1].isspace() else "\n\n"
        prompt_ids = tokenizer.encode(context + seam + question)
        answer_ids = [_continuation(tokenizer, context + seam + question, answer) for answer in answers]
        rows = _unique([prompt_ids + ids[:-1] for ids in answer_ids])
        for row in (*rows, *self.rows):
            if len(row) > model.config.max_position_embeddings:
                raise ValueError(
                    f"context, question and answer have {len(row)} tokens, "
                    f"but this model has positions up to {model.config.max_position_embeddings}"
                )
        frozen = Episode(model)
        trace = frozen.probe(rows, sites=["resid_post"])
        self.target_LD = trace.hidden_states[:, 0, len(prompt_ids) - 1].double()
        self.target_logprob, self.target_top = self._score(trace.logits, rows, prompt_ids, answer_ids)
        self.untouched = self.ask(frozen)

    def ask(self, episode: Episode) -> Result:
        """What the model says now, with the fast weights of an episode of one row."""
        trace = episode.probe(self.rows, sites=["resid_post"])
        hidden_LD = trace.hidden_states[:, 0, len(self.question_ids) - 1].double()
        logprob_A, top = self._score(trace.logits, self.rows, self.question_ids, self.answer_ids)
        norm = sum(float(log.delta_norm(0)) ** 2 for log in episode.logs.values()) ** 0.5
        return Result(logprob_A, hidden_LD, top, norm)

    def _score(
        self, logits_BTV: Tensor, rows: list[list[int]], prompt_ids: list[int], answer_ids: list[list[int]]
    ) -> tuple[Tensor, list[tuple[str, float]]]:
        start = len(prompt_ids) - 1
        logprob_BTV = logits_BTV[:, start:].double().log_softmax(-1)
        scores = []
        for ids in answer_ids:
            row = rows.index(prompt_ids + ids[:-1])
            scores.append(sum(float(logprob_BTV[row, t, token]) for t, token in enumerate(ids)))
        best = logprob_BTV[0, 0].topk(min(5, logprob_BTV.shape[-1]))
        pieces = self.tokenizer.tokens(best.indices.tolist())
        return torch.tensor(scores, dtype=torch.float64), list(zip(pieces, best.values.tolist(), strict=True))

    def distances(self, hidden_LD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L2, cosine and relative distance from the target, each [L+1]."""
        distance_L = (hidden_LD - self.target_LD).norm(dim=-1)
        cosine_L = 1 - torch.cosine_similarity(hidden_LD, self.target_LD, dim=-1)
        return distance_L, cosine_L, distance_L / self.target_LD.norm(dim=-1)


def _run(
    model: Llama,
    tokenizer: Tokenizer,
    exam: Exam,
    context_ids: list[int],
    update: Update,
    max_new_tokens: int,
    probe_every: int,
    on_event: Callable[[Episode, Event], None] | None,
) -> Record:
    episode = Episode(model)
    results, probed = [exam.untouched], [0]
    events: list[Event] = []
    tokens: list[int] = []
    waiting: list[tuple[int, bool]] = []  # written, but a gradient event waits for the next token

    def moved(token: int, writes: bool, generated: bool) -> None:
        """Probes and reports the events that reading this token has brought."""
        tokens.append(token)
        if writes:
            waiting.append((len(tokens) - 1, generated))
        while len(events) < episode.events:
            number, (position, generated) = len(events) + 1, waiting.pop(0)
            logprob_A = distance_L = None
            if number % probe_every == 0:
                results.append(exam.ask(episode))
                probed.append(number)
                logprob_A, distance_L = results[-1].logprob_A, exam.distances(results[-1].hidden_LD)[0]
            piece = tokenizer.tokens([tokens[position]])[0]
            events.append(Event(number, position, tokens[position], piece, generated, logprob_A, distance_L))
            if on_event is not None:
                before = (episode.lengths, episode.event_counts)
                on_event(episode, events[-1])
                if before != (episode.lengths, episode.event_counts):
                    raise ValueError(f"on_event changed the episode at event {number}: it may only read it")

    positions = torch.arange(len(context_ids))[None]
    write_T = written(update, torch.tensor([context_ids]), positions, generated=False)[0]
    for token, writes in zip(context_ids, write_T.tolist(), strict=True):
        episode.feed([token], update=torch.tensor([[writes]]), logits="last")
        moved(token, writes, generated=False)
    for step in episode.generate(None, max_new_tokens, update=update) if max_new_tokens else ():
        position = torch.tensor([[len(tokens)]])
        writes = bool(written(update, step.token_ids[:, None], position, generated=True))
        moved(int(step.token_ids[0]), writes, generated=True)

    distance_NL, cosine_NL, relative_NL = zip(*(exam.distances(r.hidden_LD) for r in results), strict=True)
    return Record(
        tokens=tokenizer.tokens(tokens),
        token_ids=tokens,
        question_ids=exam.question_ids,
        answers=exam.answers,
        answer_ids=exam.answer_ids,
        events=events,
        probed=probed,
        logprob=torch.stack([r.logprob_A for r in results]),
        target_logprob=exam.target_logprob,
        distance=torch.stack(distance_NL),
        cosine=torch.stack(cosine_NL),
        relative=torch.stack(relative_NL),
        delta_norm=torch.tensor([r.delta_norm for r in results], dtype=torch.float64),
        top=[r.top for r in results],
        target_top=exam.target_top,
    )


def _continuation(tokenizer: Tokenizer, prompt: str, answer: str) -> list[int]:
    """The answer's ids as they follow the prompt; by itself where the tokenizer would merge the two."""
    if not answer:
        raise ValueError("answers holds an empty text: expected at least one token each")
    ids, both = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    return both[len(ids) :] if both[: len(ids)] == ids else tokenizer.encode(answer, add_special_tokens=False)


def _unique(rows: list[list[int]]) -> list[list[int]]:
    return [row for n, row in enumerate(rows) if row not in rows[:n]]
