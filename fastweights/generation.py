"""Token after token: choose, read, write as `update` says, yield."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .binding import Call
from .episode_state import EpisodeState
from .feed import Reader
from .inputs import Update, whole_numbers
from .probes.places import Reading
from .probes.taps import Bound, Taps
from .sampling import Sampling
from .stream import Texts
from .tokenizer import Tokenizer

Prompt = tuple[Tensor, Tensor | None] | None  # ids [B, T] and mask
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Step:
    """One generated token of each row, already read by the model, and written if `update` says so.

    token_ids: [B] int64 on the CPU; rows that had ended repeat their last token.
    logits: [B, V], what the token was chosen from.
    text: what each row's token adds to its text, when `generate` got a tokenizer. Joined, the pieces of a row are
        what its new tokens add to the decoded text; a piece is held back while later tokens could change it.
    ended: whether each row has come to a stop token or a stop string.
    finish_reason: why each row stops here or has stopped: "stop_token", "stop_string", "length" (the last step,
        by max_new_tokens or because the KV cache is full), or None: it goes on.
    """

    token_ids: Tensor
    logits: Tensor
    text: list[str]
    ended: list[bool]
    finish_reason: list[str | None]


@dataclass(frozen=True)
class Stops:
    """What ends a row, and whether its text keeps the end."""

    token_ids: frozenset[int]
    strings: tuple[str, ...]
    include: bool


def stops(token_ids: Any, strings: Any, include: Any, tokenizer: Any) -> Stops:
    """What `generate` was told about stopping, checked."""
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"generate(tokenizer=...) is a {type(tokenizer).__name__}: expected a fastweights Tokenizer, as fw.load "
            "returns it (of transformers' fast tokenizers: fw.Tokenizer(theirs.backend_tokenizer))"
        )
    ids = whole_numbers("stop_token_ids", token_ids)
    strings = [strings] if isinstance(strings, str) else list(strings)
    if wrong := [s for s in strings if not isinstance(s, str) or not s]:
        raise ValueError(f"generate(stop_strings={strings}): {wrong[0]!r} is no text to stop at")
    if strings and tokenizer is None:
        raise ValueError("generate(stop_strings=...) needs tokenizer= to know the text")
    return Stops(frozenset(ids), tuple(strings), bool(include))


def generate(
    reader: Reader,
    prompt: Prompt,
    max_new_tokens: int | None,
    update: Update,
    sampling: Sampling,
    seed: int | Sequence[int] | None,
    stops: Stops,
    tokenizer: Tokenizer | None,
    edits: Sequence[Bound],
) -> Iterator[Step]:
    """See `Episode.generate`; what it refuses is refused here and now, before the first step is asked for."""
    state = reader.state
    with state.alone():
        if prompt is None and state.logits_BV is None:
            raise ValueError("generate() without input_ids goes on from what was read, but nothing was: give a prompt")
        count = _room(state, prompt, max_new_tokens)
        if seed is not None:
            state.generator.manual_seed(seed)
        for bound in edits:
            bound.edit.places.check_rows(state.batch_size)
        if prompt is not None and edits:
            ids_BT, mask_BT = prompt
            there = state.cache.positions((ids_BT.shape[0], ids_BT.shape[1]), mask_BT, torch.device("cpu"))
            Taps(edits).begin(Reading.of(ids_BT, there))
    around = [call for call in reader.engine.model.binding.taps if call.what.edits]  # blocks of `edited`
    return _steps(reader, prompt, count, update, sampling, stops, tokenizer, edits, around)


def _room(state: EpisodeState, prompt: Prompt, max_new_tokens: int | None) -> int:
    """How many tokens to generate at most; refuses a number that the KV cache cannot hold, and an empty row."""
    good = isinstance(max_new_tokens, Integral) and not isinstance(max_new_tokens, bool) and max_new_tokens >= 0
    if max_new_tokens is not None and not good:
        raise ValueError(f"generate(max_new_tokens={max_new_tokens!r}): expected a whole number, 0 or more, or None")
    ends = state.lengths
    if prompt is not None:
        ids_BT, mask_BT = prompt
        new = [ids_BT.shape[1]] * len(ids_BT) if mask_BT is None else mask_BT.sum(1).tolist()
        ends = [end + more for end, more in zip(ends, new, strict=True)]
    if 0 in ends:
        raise ValueError(f"row {ends.index(0)} has read no token: generate() has nothing to go on from there")
    limit, longest = state.cache.limit, state.cache.longest
    room = limit - max(ends)
    wanted = 1 if max_new_tokens is None else max_new_tokens
    if wanted > room:
        hints = []
        if limit < max(ends) + wanted <= longest:
            hints.append(f"make the episode with max_length={max(ends) + wanted} or more, up to {longest}")
        if room > 0:
            hints.append(f"ask for at most {room} new tokens")
        if not hints:
            hints.append("begin a new episode with a shorter prompt: this model has no more positions")
        raise ValueError(
            f"a prompt that ends at {max(ends)} tokens and {wanted} new ones do not fit: the KV cache holds {limit} "
            f"per row; {', or '.join(hints)}"
        )
    return min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens


def _steps(
    reader: Reader,
    prompt: Prompt,
    count: int,
    update: Update,
    sampling: Sampling,
    stops: Stops,
    tokenizer: Tokenizer | None,
    edits: Sequence[Bound],
    around: Sequence[Call],
) -> Iterator[Step]:
    state = reader.state
    if prompt is not None:
        _check_around(around)
        with state.alone():
            reader.read(prompt[0], prompt[1], update, generated=False, logits="last", edits=edits)
    texts = None if tokenizer is None else Texts.of(state.texts, tokenizer, state.token_ids)
    if texts is not None:
        texts = texts.begun(stops.strings, stops.include)
    reasons: list[str | None] = [None] * state.batch_size
    for number in range(1, count + 1):
        running = [row for row, reason in enumerate(reasons) if reason is None]
        mask_B1 = None if len(running) == len(reasons) else torch.tensor([[r is None] for r in reasons], device="cpu")
        _check_around(around)
        with state.alone(), state.attempt():  # a number that is drawn for a token which is not read is drawn again
            logits_BV, chosen = state.logits_BV, [ids[-1] for ids in state.token_ids]
            assert logits_BV is not None
            for row, token in zip(running, _choose(state, logits_BV, running, sampling), strict=True):
                chosen[row] = token
            ids_B1 = torch.tensor(chosen, device="cpu")[:, None]
            reader.read(ids_B1, mask_B1, update, generated=True, logits="last", edits=edits)
            pieces, found = [""] * len(chosen) if texts else [], [False] * len(chosen)
            if texts is not None:
                texts = texts.rows(range(len(chosen)))  # a copy: the attempt goes back to what stood before it
                for row in running:
                    stop_token = chosen[row] in stops.token_ids
                    pieces[row], found[row] = texts.texts[row].add(chosen[row], number == count, stop_token)
                state.texts = Texts(texts.tokenizer, texts.texts, Texts.ends(state.token_ids))
        for row in running:
            if chosen[row] in stops.token_ids:
                reasons[row] = "stop_token"
            elif found[row] or number == count:
                reasons[row] = "stop_string" if found[row] else "length"
        ended = [reason in ("stop_token", "stop_string") for reason in reasons]
        yield Step(ids_B1[:, 0], logits_BV, pieces, ended, list(reasons))
        if None not in reasons:
            return


def _check_around(around: Sequence[Call]) -> None:
    if not all(call.runs and call.thread == threading.get_ident() for call in around):
        raise ValueError(
            "this generation began inside a block of fw.edited that has ended, or that belongs to another thread: use "
            "it up inside, or pass its edits to generate(edits=...)"
        )


def _choose(state: EpisodeState, logits_BV: Tensor, rows: list[int], sampling: Sampling) -> list[int]:
    """The next token of these rows; nothing is chosen from logits that are not finite."""
    seen, generator = state.token_ids, state.generator
    if len(rows) < len(seen):
        logits_BV, seen, generator = logits_BV[rows], [seen[row] for row in rows], generator.of(rows)
    best, chosen = logits_BV.amax(-1).tolist(), sampling.choose(logits_BV, seen, generator).tolist()
    for row, value in zip(rows, best, strict=True):
        if not math.isfinite(value):
            raise ValueError(
                f"the logits of row {row} are not finite after {state.lengths[row]} tokens: no token was chosen; "
                "restore a snapshot, or begin again with a smaller rate or a budget"
            )
    return chosen
