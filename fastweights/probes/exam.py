"""Exams: prompts with answers, the rows of ids that ask for them, and the scores in the logits of those rows.

Shape suffixes: P prompts, A answers of a prompt, R rows of ids, T′ columns, V vocabulary; N everything in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..files import warn
from ..inputs import whole_numbers
from ..tokenizer import Tokenizer
from .lens import higher

SLICE_BYTES = 1 << 23  # of float64 log-probabilities at a time: they stay in the cache

UNORDERED = (str, bytes, Mapping, Set)  # no list, though Python walks through it; of answers the order counts

Prompts = Sequence[str] | Sequence[Sequence[int]]
Answers = Sequence[str] | Sequence[Sequence[str]]


@dataclass(frozen=True)
class Scores:
    """What an exam found, with the leading axes of the logits.

    logprob: [.., P, A] float64, log-probability of each answer after its prompt, summed over its tokens, in nats.
    rank: [.., P, A] int64, how many tokens stand strictly higher, of the answer's tokens the worst; 0 = greedy
        decoding says the answer. A NaN counts as higher.
    """

    logprob: Tensor
    rank: Tensor

    @property
    def difference(self) -> Tensor:
        """[.., P] logprob of the first answer minus the best other; of one-token answers the logit difference.

        Raises:
            ValueError: the exam has a single answer.
        """
        if self.logprob.shape[-1] < 2:
            raise ValueError("scores.difference needs two answers or more per prompt, and this exam has one")
        return self.logprob[..., 0] - self.logprob[..., 1:].max(-1).values


class Exam:
    """Prompts with answers: the ids to run, and how their logits are scored.

    Args:
        tokenizer: turns the texts into ids.
        prompts: texts, or lists of ids.
        answers: texts that may follow, of any number of tokens: one list for all prompts, or one list per prompt,
            all of the same length. Their ids are those that follow the prompt in the joint text. Where the tokenizer
            would merge the two, the answer is encoded by itself, and a warning says so.

    Attributes:
        rows: lists of ids to run. Of one-token answers these are the prompts in order. A longer answer needs its
            tokens but the last behind the prompt.
        columns: the columns of the rows whose logits `score` needs, over all rows, sorted.
        row_columns: the same per row.
        starts: per row the column of the prompt's last token. From there on each column chooses an answer's token.
        prompt_ids, answer_ids: lists of ids, one for each prompt, and one for each prompt and answer.

    Raises:
        ValueError: no prompts, an empty text, answers that are no lists of texts or differ in number, or two answers
            of one prompt with the same ids.

    Example:
        exam = fw.Exam(tokenizer, ["The capital of France is"], [" Paris", " London"])
        exam.score(model(torch.tensor(exam.rows))).difference          # [1]
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Prompts, answers: Answers):
        if tokenizer is None:  # what load() returns for a checkpoint without one
            raise ValueError("Exam() got None for the tokenizer: it turns the texts into ids")
        self.tokenizer = tokenizer
        texts, self.prompt_ids = _prompts(tokenizer, prompts)
        self.answers = _answers(answers, len(texts))
        self.answer_ids = [
            _answer_ids(tokenizer, number, text, ids, wanted)
            for number, (text, ids, wanted) in enumerate(zip(texts, self.prompt_ids, self.answers, strict=True))
        ]
        self._warn(texts)
        self.rows: list[list[int]] = []
        self.starts: list[int] = []
        self._row_of: list[list[int]] = []  # [P][A]
        for prompt, ids_A in zip(self.prompt_ids, self.answer_ids, strict=True):
            own = _longest([ids[:-1] for ids in ids_A])
            holds = [next(n for n, row in enumerate(own) if row[: len(ids) - 1] == ids[:-1]) for ids in ids_A]
            self._row_of.append([len(self.rows) + n for n in holds])
            self.rows += [prompt + row for row in own]
            self.starts += [len(prompt) - 1] * len(own)
        self._tokens = self._places()  # (row, column) → the tokens that are looked up there
        self.row_columns = [sorted({column for r, column in self._tokens if r == row}) for row in range(len(self.rows))]
        self.columns = sorted({column for _, column in self._tokens})

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.prompt_ids)

    def __repr__(self) -> str:
        prompts, answers = len(self), len(self.answers[0])
        lengths = sorted({len(row) for row in self.rows})
        span = f"{lengths[0]} tokens" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]} tokens"
        lines = [f"Exam: prompts {prompts}, answers to each {answers}, rows {len(self.rows)} of {span}"]
        for number in range(min(prompts, 4)):
            end = self.tokenizer.tokens(self.prompt_ids[number][-4:])
            dots = "…" if len(self.prompt_ids[number]) > 4 else ""
            said = [self.tokenizer.tokens(ids) for ids in self.answer_ids[number][:4]]
            more = " …" if answers > 4 else ""
            lines.append(f"  {number}: {dots}{'|'.join(end)} → {', '.join(map(repr, map('|'.join, said)))}{more}")
        return "\n".join([*lines, *(["  …"] if prompts > 4 else [])])

    def score(self, logits: Tensor, columns: Sequence[int] | Tensor | None = None) -> Scores:
        """Scores of the logits of `rows`; differentiable, in float64, a few rows and columns at a time.

        Args:
            logits: [.., R, T′, V] of `rows` padded on the right, with any axes in front. Where the exam has one row,
                any number of rows: each is scored as a prompt of its own, and P is their number.
            columns: the columns of the rows that T′ holds: [T′], or [R, T′] where rows differ (-1: nothing there);
                None = 0 to T′ − 1.

        Raises:
            ValueError: other numbers of rows, columns or tokens than the exam needs.
        """
        if logits.dim() < 3 or not logits.is_floating_point():
            got = f"{list(logits.shape)} of {logits.dtype}"
            raise ValueError(f"score() got logits {got}: expected floats [.., R, T′, V]")
        each = len(self.rows) == 1 and logits.shape[-3] != 1
        if each:
            logits = logits.unsqueeze(-3)  # [.., B, 1, T′, V]
        R, T, V = logits.shape[-3:]
        if len(self.rows) != R:
            raise ValueError(f"score() got logits of {R} rows, but exam.rows has {len(self.rows)}")
        if (largest := max(max(tokens) for tokens in self._tokens.values())) >= V:
            raise ValueError(f"score() got logits of {V} tokens, but an answer holds the token id {largest}")
        where = self._index(columns, T)
        lead = logits.shape[:-3]
        logprob: dict[tuple[int, int, int], Tensor] = {}
        rank: dict[tuple[int, int, int], Tensor] = {}
        for (row, column), x in _chosen(logits, where):
            tokens = self._tokens[row, column]
            logprob_NK, rank_NK = _look_up(x, tokens)
            for k, token in enumerate(tokens):
                logprob[row, column, token], rank[row, column, token] = logprob_NK[:, k], rank_NK[:, k]
        starts = [len(prompt) - 1 for prompt in self.prompt_ids]
        pairs = [
            [(row, start + t, token) for t, token in enumerate(ids)]
            for rows_A, ids_A, start in zip(self._row_of, self.answer_ids, starts, strict=True)
            for row, ids in zip(rows_A, ids_A, strict=True)
        ]
        shape = (*lead, len(self), len(self.answers[0]))
        summed = torch.stack([torch.stack([logprob[p] for p in answer]).sum(0) for answer in pairs], -1)
        worst = torch.stack([torch.stack([rank[p] for p in answer]).amax(0) for answer in pairs], -1)
        scores = Scores(summed.reshape(shape), worst.reshape(shape))
        return Scores(scores.logprob.squeeze(-2), scores.rank.squeeze(-2)) if each else scores

    def _places(self) -> dict[tuple[int, int], list[int]]:
        tokens: dict[tuple[int, int], list[int]] = {}
        for prompt, rows_A, ids_A in zip(self.prompt_ids, self._row_of, self.answer_ids, strict=True):
            for row, ids in zip(rows_A, ids_A, strict=True):
                for t, token in enumerate(ids):
                    here = tokens.setdefault((row, len(prompt) - 1 + t), [])
                    if token not in here:
                        here.append(token)
        return tokens

    def _index(self, columns: Sequence[int] | Tensor | None, width: int) -> dict[tuple[int, int], int]:
        """(row, column) → its place in the T′ axis."""
        given = torch.arange(width, device="cpu") if columns is None else torch.as_tensor(columns).cpu()
        if given.dim() not in (1, 2) or given.shape[-1] != width or (given.dim() == 2 and len(given) != len(self.rows)):
            wanted = f"[{width}] or [{len(self.rows)}, {width}]"
            raise ValueError(f"score(columns=…) has shape {list(given.shape)}, but these logits want {wanted}")
        rows = given.expand(len(self.rows), -1).tolist()
        held = [{column: n for n, column in enumerate(row)} for row in rows]
        for row, column in self._tokens:
            if column not in held[row]:
                raise ValueError(f"score() needs the logits of row {row}, column {column}, and columns lack it")
        return {(row, column): held[row][column] for row, column in self._tokens}

    def _warn(self, texts: list[str | None]) -> None:
        """Says once what is legal and rarely meant."""
        for text, prompt, wanted, ids_A in zip(texts, self.prompt_ids, self.answers, self.answer_ids, strict=True):
            by_ids = {tuple(ids): answer for ids, answer in zip(ids_A, wanted, strict=True)}
            for ids, answer in by_ids.items():
                for end in range(1, len(ids)):
                    if short := by_ids.get(ids[:end]):
                        warn(f"the answer {answer!r} begins with the tokens of {short!r}: it is never the likelier one")
                        return
            for answer in wanted:
                if text and text[-1].isspace() and not _continuation(self.tokenizer, text, prompt, answer)[1]:
                    warn(
                        f"the prompt …{text[-20:]!r} ends in white space that belongs to the token of the answer "
                        f"{answer!r}: it is scored without it; put the space before the answer"
                    )
                    return


def _answer_ids(
    tokenizer: Tokenizer, number: int, text: str | None, prompt: list[int], answers: list[str]
) -> list[list[int]]:
    """The ids of each answer to the prompt of that number."""
    first: dict[tuple[int, ...], str] = {}
    for answer in answers:
        ids = tuple(_continuation(tokenizer, text, prompt, answer)[0])
        if ids in first:
            same = f"{first[ids]!r} and {answer!r}"
            raise ValueError(f"prompt {number}: the answers {same} have the same ids {[*ids]}, expected different ones")
        first[ids] = answer
    return [[*ids] for ids in first]


def _continuation(tokenizer: Tokenizer, text: str | None, prompt: list[int], answer: str) -> tuple[list[int], bool]:
    """The answer's ids as they follow the prompt, and True; by itself, and False, where the tokenizer merges the two.

    Args:
        text: of the prompt, with or without the special tokens that stand in its ids; None: no text gives them, and
            the answer is encoded by itself.
    """
    if not answer:
        raise ValueError("answers holds an empty text: expected at least one token each")
    for special in (True, False):
        if text is not None and tokenizer.encode(text, special) == prompt:
            both = tokenizer.encode(text + answer, special)
            if both[: len(prompt)] == prompt and len(both) > len(prompt):
                return both[len(prompt) :], True
    if not (alone := tokenizer.encode(answer, add_special_tokens=False)):
        raise ValueError(f"the answer {answer!r} has no token: expected at least one")
    return alone, False


def prompt_ids(tokenizer: Tokenizer, prompt: Any, name: str) -> tuple[str | None, list[int]]:
    """A prompt's text (None where no text gives these ids) and its ids; `name` is what a refusal calls it."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt) if prompt else []
        text: str | None = prompt
    else:
        ids = whole_numbers(name, prompt)
        text = tokenizer.decode(ids)
        text = text if any(tokenizer.encode(text, special) == ids for special in (True, False)) else None
    if not ids:
        raise ValueError(f"{name} is empty: expected a text or a list of ids")
    return text, ids


def _prompts(tokenizer: Tokenizer, prompts: Any) -> tuple[list[str | None], list[list[int]]]:
    if isinstance(prompts, UNORDERED) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={prompts!r}: expected a list of texts or of id lists")
    given = list(prompts)
    if not given:
        raise ValueError("prompts is empty: expected a list of one or more texts or id lists")
    if not isinstance(given[0], str | Iterable) or getattr(given[0], "ndim", 1) == 0:
        raise ValueError(f"prompts is a list of {type(given[0]).__name__}: expected a list of texts or of id lists")
    pairs = [prompt_ids(tokenizer, prompt, f"prompts[{number}]") for number, prompt in enumerate(given)]
    return [text for text, _ in pairs], [ids for _, ids in pairs]


def _answers(answers: Any, prompts: int) -> list[list[str]]:
    """[P][A] texts."""
    given = answers if isinstance(answers, UNORDERED) or not isinstance(answers, Iterable) else list(answers)
    if not isinstance(given, list) or not given:
        raise ValueError(f"answers={answers!r}: expected a list of one or more texts")
    if all(isinstance(answer, str) for answer in given):
        return [given] * prompts
    if any(isinstance(answer, UNORDERED) or not isinstance(answer, Iterable) for answer in given):
        raise ValueError(f"answers={answers!r}: expected one list of texts, or one such list per prompt")
    lists = [list(each) for each in given]
    if len(lists) != prompts:
        raise ValueError(f"answers holds {len(lists)} lists, but there are {prompts} prompts")
    for number, each in enumerate(lists):
        if not each or not all(isinstance(answer, str) for answer in each):
            raise ValueError(f"answers[{number}]={each!r}: expected a list of one or more texts")
        if len(each) != len(lists[0]):
            raise ValueError(
                f"answers[{number}] has {len(each)} texts and answers[0] has {len(lists[0])}: expected as many for each"
            )
    return lists


def _longest(rows: list[list[int]]) -> list[list[int]]:
    """The rows in order without those that begin another or repeat one."""
    kept = [row for n, row in enumerate(rows) if row not in rows[:n]]
    return [row for row in kept if not any(len(other) > len(row) and other[: len(row)] == row for other in kept)]


def _chosen(logits: Tensor, where: dict[tuple[int, int], int]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """The logits [.., V] of every (row, column), given the column's place in T′."""
    if not logits.requires_grad:
        yield from ((pair, logits[..., pair[0], place, :]) for pair, place in where.items())
        return
    # one gather: the gradient is then one scatter, and not a tensor of zeros as large as the logits for each pair
    rows, places = [row for row, _ in where], list(where.values())
    yield from zip(where, logits[..., rows, places, :].unbind(-2), strict=True)


def _look_up(logits: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probability (float64) and rank of each token, both [N, K]; logits [.., V]."""
    x_NV = logits.reshape(-1, logits.shape[-1])
    size = max(1, SLICE_BYTES // (8 * x_NV.shape[1]))
    index_K = torch.tensor(tokens, device=x_NV.device)
    logprob, rank = [], []
    for x_nV in x_NV.split(size):
        wide_nV = x_nV.double()
        logprob.append(wide_nV[:, index_K] - wide_nV.logsumexp(-1, keepdim=True))
        rank.append(torch.stack([higher(x_nV.detach(), x_nV.detach()[:, token, None]) for token in tokens], -1))
    return torch.cat(logprob), torch.cat(rank)
