"""Token after token: choose, read, write as `update` says, yield."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .feed import Reader
from .inputs import Update
from .sampling import Sampling
from .tokenizer import Tokenizer

Prompt = tuple[Tensor, Tensor | None] | None  # ids [B, T] and mask


@dataclass(frozen=True)
class Step:
    """One generated token of each row, already read by the model, and written if `update` says so.

    token_ids: [B] int64; rows that had ended repeat their last token.
    logits: [B, V], what the token was chosen from.
    text: what each row's token adds to its text, when `generate` got a tokenizer.
    ended: whether each row has ended.
    """

    token_ids: Tensor
    logits: Tensor
    text: list[str]
    ended: list[bool]


def generate(
    reader: Reader,
    prompt: Prompt,
    max_new_tokens: int,
    update: Update,
    sampling: Sampling,
    seed: int | None,
    stop_token_ids: Iterable[int],
    stop_strings: Sequence[str],
    tokenizer: Tokenizer | None,
) -> Iterator[Step]:
    """See `Episode.generate`; what it refuses is refused here and now, before the first step is asked for."""
    state = reader.state
    stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
    if stop_strings and tokenizer is None:
        raise ValueError("generate(stop_strings=...) needs tokenizer= to know the text")
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"generate(max_new_tokens={max_new_tokens!r}): expected a whole number, 0 or more")
    if prompt is None and state.logits_BV is None:
        raise ValueError("generate() without input_ids goes on from what was read, but nothing was: give a prompt")
    longest = max(state.lengths) + max_new_tokens + (0 if prompt is None else prompt[0].shape[1])
    if longest > state.cache.limit:
        raise ValueError(
            f"a prompt that ends at {longest - max_new_tokens} tokens and {max_new_tokens} new ones do not fit: "
            f"the KV cache holds {state.cache.limit} per row"
        )
    if seed is not None:
        state.generator.manual_seed(seed)
    return _steps(reader, prompt, max_new_tokens, update, sampling, set(stop_token_ids), stop_strings, tokenizer)


def _steps(
    reader: Reader,
    prompt: Prompt,
    max_new_tokens: int,
    update: Update,
    sampling: Sampling,
    stop: set[int],
    stop_strings: list[str],
    tokenizer: Tokenizer | None,
) -> Iterator[Step]:
    state = reader.state
    if prompt is not None:
        with state.alone():
            reader.read(prompt[0], prompt[1], update, generated=False, logits="last")
    if 0 in state.lengths:
        raise ValueError(f"row {state.lengths.index(0)} has read no token: generate() has nothing to go on from there")
    ended = [False] * state.batch_size
    streams = [tokenizer.stream() for _ in ended] if tokenizer else []
    texts = [""] * state.batch_size
    for _ in range(max_new_tokens):
        assert state.logits_BV is not None
        logits_BV = state.logits_BV
        with state.alone(), state.attempt():
            chosen_B = sampling.choose(logits_BV, state.token_ids, state.generator).cpu()
            chosen = [
                s[-1] if done else c for s, done, c in zip(state.token_ids, ended, chosen_B.tolist(), strict=True)
            ]
            ids_B1 = torch.tensor(chosen)[:, None]
            mask_B1 = ~torch.tensor(ended)[:, None] if any(ended) else None
            reader.read(ids_B1, mask_B1, update, generated=True, logits="last")
        pieces = ["" if done else s.push(c) for s, done, c in zip(streams, ended, chosen, strict=False)]
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)] if pieces else texts
        ended = [
            done or token in stop or any(s in text for s in stop_strings)
            for done, token, text in zip(ended, chosen, texts, strict=True)
        ]
        yield Step(ids_B1[:, 0], logits_BV, pieces, ended)
        if all(ended):
            return
