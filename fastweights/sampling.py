"""From logits to the next token, in Hugging Face's order and under its names; and the random numbers of each row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


class RowGenerator:
    """Random numbers for each row of a batch, so that what a row draws does not depend on the other rows.

    The n-th number of a row is a hash of (the row's seed, n): the same on every machine and device, and the same
    for a row of a batch as for that row alone with the same seed. A row counts its own draws, so a row that has
    ended draws nothing. The whole state is one int64 tensor [B, 2]: seed and count of each row.
    """

    def __init__(self, rows: int):
        self._rows = [[row, 0] for row in range(rows)]

    def manual_seed(self, seed: int | Sequence[int]) -> RowGenerator:
        """Starts all rows again: row b gets `seed + b`, or `seed[b]` of a list.

        Raises:
            ValueError: not one number, or not one per row; a number below 0 or above 2**63 - 1.
        """
        if isinstance(seed, Integral) and not isinstance(seed, bool):
            seeds = [int(seed) + row for row in range(len(self._rows))]
        elif isinstance(seed, Iterable) and not isinstance(seed, str):
            seeds = [each.item() if isinstance(each, Tensor) else each for each in seed]
        else:
            raise ValueError(f"seed={seed!r}: expected a whole number from 0 to 2**63 - 1, or one per row")
        if len(seeds) != len(self._rows):
            raise ValueError(
                f"seed holds {len(seeds)} numbers: expected one, or one for each of {len(self._rows)} rows"
            )
        for number in seeds:
            if not _is(number, lambda n: 0 <= n < 1 << 63, Integral):
                raise ValueError(f"seed={number!r}: expected a whole number from 0 to 2**63 - 1, or one per row")
        for state, number in zip(self._rows, seeds, strict=True):
            state[:] = int(number), 0
        return self

    def draw(self) -> Tensor:
        """One number from 0 up to below 1 for each row, float64 [B] on the CPU."""
        numbers = []
        for state in self._rows:
            digest = hashlib.blake2b(b"%d %d" % tuple(state), digest_size=8).digest()
            numbers.append((int.from_bytes(digest, "little") >> 12) / (1 << 52))
            state[1] += 1
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def of(self, rows: Sequence[int]) -> RowGenerator:
        """Some of these rows: what they draw, they draw here as well."""
        some = RowGenerator(0)
        some._rows = [self._rows[row] for row in rows]
        return some

    def get_state(self) -> Tensor:
        """Seed and count of each row, int64 [B, 2]."""
        return torch.tensor(self._rows, device="cpu")

    def set_state(self, state: Tensor) -> None:
        """Goes on where a generator of as many rows had the state `state`."""
        if tuple(state.shape) != (len(self._rows), 2):
            raise ValueError(f"the random state has shape {list(state.shape)}, expected {[len(self._rows), 2]}")
        self._rows = state.tolist()

    def rows(self, chosen: Sequence[int]) -> RowGenerator:
        """A copy whose row n goes on from row `chosen[n]`.

        The first copy of a row draws what that row would have drawn. Every further copy gets a seed of its own:
        with the same one, all continuations of a row would be the same.
        """
        other = RowGenerator(0)
        for n, row in enumerate(chosen):
            seed, count = self._rows[row]
            if copy := list(chosen[:n]).count(row):
                digest = hashlib.blake2b(b"%d %d copy %d" % (seed, count, copy), digest_size=8).digest()
                seed = int.from_bytes(digest, "little") >> 1
            other._rows.append([seed, count])
        return other


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 = greedy; logits are divided by it otherwise.
        top_k: only the k most likely tokens; None = all.
        top_p: only the smallest set of tokens whose probability reaches p.
        min_p: only tokens at least min_p times as likely as the likeliest.
        repetition_penalty: > 1 makes tokens already in the row less likely (Keskar et al. 2019).

    Example:
        sampling = fw.Sampling(temperature=0.8, top_p=0.9)
        episode.feed(input_ids)
        while episode.length < 100:
            next_B = sampling.choose(episode.logits, episode.token_ids, episode.generator)
            episode.feed(next_B[:, None], update="all")
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wanted = {
            "temperature": (_is(self.temperature, lambda t: 0 <= t < float("inf")), "a number >= 0"),
            "top_k": (self.top_k is None or _is(self.top_k, lambda k: k >= 1, Integral), "1 or more, or None"),
            "top_p": (_is(self.top_p, lambda p: 0 < p <= 1), "a number above 0 and up to 1"),
            "min_p": (_is(self.min_p, lambda p: 0 <= p <= 1), "a number from 0 to 1"),
            "repetition_penalty": (_is(self.repetition_penalty, lambda r: 0 < r < float("inf")), "a number > 0"),
        }
        for name, (good, expected) in wanted.items():
            if not good:
                raise ValueError(f"generate({name}={getattr(self, name)!r}): expected {expected}")

    def choose(
        self,
        logits_BV: Tensor,
        seen: Sequence[Sequence[int]] | None = None,
        generator: RowGenerator | torch.Generator | None = None,
    ) -> Tensor:
        """The next token of each row, [B] int64 on the logits' device.

        Args:
            logits_BV: [B, V], after the last token of each row: `episode.logits`.
            seen: each row's tokens so far, which the repetition penalty counts: `episode.token_ids`.
            generator: where random numbers come from: `episode.generator`, or a torch.Generator.

        Raises:
            ValueError: logits of another shape or not finite; a penalty without `seen`, a temperature without
                `generator`.
        """
        if logits_BV.dim() != 2:
            raise ValueError(f"logits have shape {list(logits_BV.shape)}: expected [B, V], the last token of each row")
        logits_BV = logits_BV.float()
        if self.repetition_penalty != 1:
            if seen is None:
                raise ValueError("choose() with a repetition penalty needs seen=, each row's tokens so far")
            logits_BV = self._penalised(logits_BV, seen)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        if generator is None:
            raise ValueError("choose() with a temperature needs generator=, where random numbers come from")
        if isinstance(generator, torch.Generator):
            drawn_B = torch.rand(len(logits_BV), dtype=torch.float64, generator=generator, device=generator.device)
        else:
            drawn_B = generator.draw()
        # the first token at which the summed probability passes the number drawn; in float64, where a sum over a
        # vocabulary keeps every token's share
        sum_BV = self.filtered(logits_BV).softmax(-1).double().cumsum(-1)
        aim_B = drawn_B.to(sum_BV.device) * sum_BV[:, -1]
        return torch.searchsorted(sum_BV, aim_B[:, None], right=True)[:, 0]

    def filtered(self, logits_BV: Tensor) -> Tensor:
        """Logits [B, V] after temperature, top-k, top-p and min-p; what is left out is -inf."""
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None:
            least = logits_BV.topk(min(self.top_k, logits_BV.shape[-1])).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least, -torch.inf)
        if self.top_p < 1:
            ordered, index = logits_BV.sort(descending=False)
            out = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            out[:, -1] = False
            logits_BV = logits_BV.masked_fill(out.scatter(1, index, out), -torch.inf)
        if self.min_p > 0:
            probability = logits_BV.softmax(-1)
            out = probability < self.min_p * probability.amax(-1, keepdim=True)
            logits_BV = logits_BV.masked_fill(out, -torch.inf)
        return logits_BV

    def _penalised(self, logits_BV: Tensor, seen: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] after the repetition penalty on each row's tokens so far."""
        logits_BV = logits_BV.clone()
        for row, ids in enumerate(seen):
            index = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=logits_BV.device)
            score = logits_BV[row, index]
            logits_BV[row, index] = torch.where(
                score < 0, score * self.repetition_penalty, score / self.repetition_penalty
            )
        return logits_BV


def _is(value: object, good: Callable[[Any], bool], kind: type = Real) -> bool:
    """Whether `value` is a number of this kind, Python's or numpy's and no bool, that is `good`."""
    return isinstance(value, kind) and not isinstance(value, bool) and good(value)
