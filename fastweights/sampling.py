"""From logits to the next token, in Hugging Face's order and under its names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 = greedy; logits are divided by it otherwise.
        top_k: only the k most likely tokens; None = all.
        top_p: only the smallest set of tokens whose probability reaches p.
        min_p: only tokens at least min_p times as likely as the likeliest.
        repetition_penalty: > 1 makes tokens already in the row less likely (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        wanted = {
            "temperature": (self.temperature >= 0, "a number >= 0"),
            "top_k": (self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1), "1 or more, or None"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and up to 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "a number > 0"),
        }
        for name, (good, expected) in wanted.items():
            if not good:
                raise ValueError(f"generate({name}={getattr(self, name)!r}): expected {expected}")

    def choose(self, logits_BV: Tensor, seen: list[list[int]], generator: torch.Generator) -> Tensor:
        """The next token of each row, [B] int64; `seen` holds each row's tokens so far."""
        logits_BV = logits_BV.float()
        if self.repetition_penalty != 1:
            logits_BV = self._penalised(logits_BV, seen)
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        return torch.multinomial(self.filtered(logits_BV).softmax(-1), 1, generator=generator)[:, 0]

    def filtered(self, logits_BV: Tensor) -> Tensor:
        """Logits after temperature, top-k, top-p and min-p; what is left out is -inf."""
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

    def _penalised(self, logits_BV: Tensor, seen: list[list[int]]) -> Tensor:
        logits_BV = logits_BV.clone()
        for row, ids in enumerate(seen):
            index = torch.tensor(sorted(set(ids)), dtype=torch.int64, device=logits_BV.device)
            score = logits_BV[row, index]
            logits_BV[row, index] = torch.where(
                score < 0, score * self.repetition_penalty, score / self.repetition_penalty
            )
        return logits_BV
