"""Shapes in which the same weights are read: behind long contexts, for many rows, for short prompts, for a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastweights as fw

from . import measure
from .bed import RULE, Bed, Plastic
from .decode import CONTEXT, STEPS, decoded, frozen_trial
from .measure import Check, Experiment, Trial, Unavailable


def behind(bed: Bed, contexts: Sequence[int] = (1024, 4096, 8000), steps: int = STEPS) -> Experiment:
    """Frozen decode behind long contexts, against the same behind a short one."""
    trials, checks = [], []
    for context in (CONTEXT, *contexts):
        trial, episode, _ = frozen_trial(bed, context, steps)
        trials.append(replace(trial, name=f"behind {context}"))

        def stepped(trial: Trial = trial) -> Tensor:
            trial.prepare()
            return trial.run()

        def at_once(episode: fw.Episode = episode) -> Tensor:
            fw.detach(bed.model)
            return fw.Episode(bed.model).feed(episode.token_ids, update="none", logits="last")[:, -1]

        checks.append(Check(f"behind {context}: steps = one pass", stepped, at_once, bed.amplified(4)))
    return Experiment(
        trials,
        checks,
        [(trial.name, trials[0].name) for trial in trials[1:]],
        {"contexts": [CONTEXT, *contexts], "tokens": steps},
        bars={f"{trial.name} share of stream": "≥ 75 %" for trial in trials[1:]} if bed.device.type == "cuda" else {},
    )


def rows(bed: Bed, counts: Sequence[int] = (1, 4, 16, 64), rank: int = 64, context: int = CONTEXT) -> Experiment:
    """A step of many rows, frozen and plastic, against a step of one."""
    steps, layers = STEPS, bed.layers()
    written = list(range(context - (rank - steps), context))
    trials, checks = [], []
    ratios: list[tuple[str, str] | tuple[str, str, int]] = []
    notes: dict[str, Any] = {"context": context, "tokens": steps, "layers": layers, "rank": rank, "rule": repr(RULE)}
    for count in counts:
        fw.detach(bed.model)
        ids = bed.ids(context, count)
        try:
            frozen = _decoding(bed, fw.Episode(bed.model, count, context + steps), ids, [])
            plastic = Plastic(bed, layers, bed.linears, rank, context + steps, rows=count)
            fast = _decoding(bed, plastic.episode, ids, written, plastic)
        except torch.OutOfMemoryError:
            notes[f"{count} rows"] = "not measured: out of memory"
            continue
        extra = count * measure.plastic_decode_bytes(bed.config, len(layers), bed.linears, rank - steps // 2)
        cache = measure.decode_bytes(bed.config, bed.dtype.itemsize, context + steps // 2)
        weights = measure.decode_bytes(bed.config, bed.dtype.itemsize, 0)
        read = weights + count * (cache - weights)
        names = f"frozen, {count} rows", f"plastic, {count} rows"
        trials += [replace(frozen, name=names[0], bytes=read), replace(fast, name=names[1], bytes=read + extra)]
        ratios.append((names[1], names[0]))
        if count != counts[0]:
            ratios.append((names[0], f"frozen, {counts[0]} rows"))
        ends = sorted({0, count - 1})

        def together(fast: Trial = fast, ends: list[int] = ends) -> Tensor:
            fast.prepare()
            return fast.run()[ends]

        def alone(plastic: Plastic = plastic, ends: list[int] = ends) -> Tensor:
            plastic.on()
            return torch.cat([_alone(bed, plastic.episode.token_ids[row], context, written) for row in ends])

        checks.append(Check(f"{count} rows: the first and last = alone", together, alone, bed.amplified(10)))
    bars = {}
    if bed.device.type == "cuda":
        limits = ((4, 1.15), (16, 1.25), (64, 1.5))
        bars = {f"frozen, {n} rows ÷ frozen, {counts[0]} rows": f"≤ {most}" for n, most in limits if n in counts}
    return Experiment(trials, checks, ratios, notes, bars=bars)


def _decoding(bed: Bed, episode: fw.Episode, ids: Tensor, written: list[int], plastic: Plastic | None = None) -> Trial:
    """Greedy steps from behind a prompt, again and again."""
    episode.feed(ids, update=written or "none", logits="last")
    start = episode.snapshot()

    def prepare() -> None:
        if plastic is None:
            fw.detach(bed.model)
        else:
            plastic.on()
        episode.restore(start)

    return Trial("", partial(decoded, episode, "generated" if written else "none", STEPS), STEPS, prepare)


def _alone(bed: Bed, tokens: list[int], context: int, written: list[int]) -> Tensor:
    """Logits after the last token of one row by itself; those behind the prompt go one at a time."""
    episode = fw.Episode(bed.model, max_length=len(tokens))
    logits = episode.feed(tokens[:context], update=written, logits="last")
    for token in tokens[context:]:
        logits = episode.feed([token], update="all", logits="last")
    return logits[:, -1]


def short(bed: Bed, counts: Sequence[int] = (1, 8, 45, 128)) -> Experiment:
    """`model(ids)` of a short prompt, against transformers."""
    trials, checks = [], []
    ratios: list[tuple[str, str] | tuple[str, str, int]] = []
    notes: dict[str, Any] = {"rows": 1, "logits": "of every token"}
    weights = measure.decode_bytes(bed.config, bed.dtype.itemsize, 0)
    for count in counts:
        ids = bed.ids(count).to(bed.device)
        flops = measure.forward_flops(bed.config, count, heads=count)

        def ours(ids: Tensor = ids) -> Tensor:
            return bed.model(ids)

        def stepped(ids: Tensor = ids) -> Tensor:
            fw.detach(bed.model)
            episode = fw.Episode(bed.model)
            return torch.cat([episode.feed(ids[:, t : t + 1], update="none") for t in range(ids.shape[1])], dim=1)

        name = f"{count} tokens"
        trial = Trial(name, ours, 1, partial(fw.detach, bed.model), weights, flops)
        trials.append(trial)
        checks.append(Check(f"{name} = token by token", ours, stepped, bed.amplified(4)))
        try:
            theirs = partial(_peer_logits, bed.peer, ids)
        except Unavailable as reason:
            notes["transformers"] = f"not measured: {reason}"
            continue
        checks.append(Check(f"{name} = transformers", ours, theirs, bed.amplified(2)))
        trials.append(replace(trial, name=f"transformers, {count}", run=theirs))
        ratios.append((f"transformers, {count}", name))
    fw.detach(bed.model)
    bars = {f"{count} tokens": "≤ 6 ms" for count in counts} if _large(bed) else {}
    return Experiment(trials, checks, ratios, notes, bars=bars)


def _large(bed: Bed) -> bool:
    """Whether the bars in milliseconds hold: they were set for this shape on a Hopper GPU."""
    return bed.device.type == "cuda" and bed.name == "random 8b"


@torch.no_grad()
def _peer_logits(peer: Any, ids: Tensor) -> Tensor:
    return peer(ids, use_cache=False).logits


def gradient(bed: Bed, tokens: int = 12, context: int = CONTEXT) -> Experiment:
    """Gradient ascent after every token, against frozen decode; per token."""
    layers, rule = bed.layers(), fw.GradientAscent(rate=1e-3)
    frozen, _, _ = frozen_trial(bed, context, STEPS)
    plastic = Plastic(bed, layers, bed.linears, max(64, tokens), context + tokens, rule=rule)
    episode, ids = plastic.episode, bed.ids(context + tokens)
    episode.feed(ids[:, :context], update="none", logits="last")
    start = episode.snapshot()

    def prepare() -> None:
        plastic.on()
        episode.restore(start)

    def fed(*cuts: int) -> Tensor:
        prepare()
        ends = [context, *(context + cut for cut in cuts), context + tokens]
        for begin, end in itertools.pairwise(ends):
            logits = episode.feed(ids[:, begin:end], update="all", logits="last")
        return logits[:, -1]

    run = partial(episode.feed, ids[:, context:], update="all", logits="last")
    return Experiment(
        [frozen, Trial("gradient ascent", run, tokens, prepare)],
        [Check("one feed = three", fed, partial(fed, 1, tokens // 2), bed.amplified(10))],
        [("gradient ascent", "frozen")],
        {"context": context, "tokens": tokens, "layers": layers, "linears": list(bed.linears), "rule": repr(rule)},
        bars={"gradient ascent": "≤ 12 ms"} if _large(bed) else {},
    )
