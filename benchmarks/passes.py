"""Many at once: a prompt in one pass, a probe at many moments in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastweights as fw

from . import measure
from .bed import ALL, RULE, Bed, Plastic
from .measure import Check, Experiment, Trial, Unavailable


def prefill(bed: Bed, tokens: int, count: int | None = 3, linears: Sequence[str] = ALL) -> Experiment:
    """A prompt in one pass, frozen and with every token written (full history: as many slots as tokens)."""
    ids, layers, stepped = bed.ids(tokens), bed.layers(count), min(16, tokens // 2)
    fw.detach(bed.model)
    frozen_episode = fw.Episode(bed.model, max_length=tokens)
    flops = measure.forward_flops(bed.config, tokens)

    def prepare() -> None:
        fw.detach(bed.model)
        frozen_episode.reset()

    frozen = Trial(
        "frozen",
        partial(frozen_episode.feed, ids, update="none", logits="last"),
        1,
        prepare,
        measure.decode_bytes(bed.config, bed.dtype.itemsize, tokens),
        flops,
    )
    plastic = Plastic(bed, layers, linears, tokens, tokens)
    plastic_episode = plastic.episode

    def prepare_plastic() -> None:
        plastic.on()
        plastic_episode.reset()

    extra = measure.plastic_prefill_flops(bed.config, len(layers), linears, tokens)
    trial = replace(
        frozen,
        name="plastic",
        run=partial(plastic_episode.feed, ids, update="all", logits="last"),
        prepare=prepare_plastic,
        flops=flops + extra,
    )

    def at_once() -> Tensor:
        prepare_plastic()
        return trial.run()[:, -1]

    def end_stepped() -> Tensor:
        prepare_plastic()
        plastic_episode.feed(ids[:, :-stepped], update="all", logits="last")
        for t in range(tokens - stepped, tokens):
            last = plastic_episode.feed(ids[:, t : t + 1], update="all", logits="last")
        return last[:, -1]

    def prepare_step() -> None:
        prepare_plastic()
        plastic_episode.feed(ids[:, :-4], update="all", logits="last")

    def step() -> None:
        for t in range(tokens - 4, tokens):
            plastic_episode.feed(ids[:, t : t + 1], update="all", logits="last")

    checks = [Check(f"one pass = its last {stepped} tokens stepped", at_once, end_stepped, 20 * bed.tolerance)]
    trials, ratios = [frozen, trial], [("plastic", "frozen")]
    notes: dict[str, Any] = {"tokens": tokens, "layers": layers, "linears": list(linears), "rule": repr(RULE)}
    notes["work added"] = f"{extra / flops:.1%} of the frozen FLOPs"
    if tokens <= 512:
        trials.append(Trial("plastic-step", step, 4, prepare_step))
        notes["plastic-step"] = "one token at a time, after all but 4 of the prompt's tokens; per token"
    try:
        peer, device_ids = bed.peer, ids.to(bed.device)

        @torch.no_grad()
        def theirs() -> Tensor:
            return peer(device_ids, use_cache=True, logits_to_keep=1).logits[:, -1]

        def ours() -> Tensor:
            prepare()
            return frozen.run()[:, -1]

        checks.append(Check("frozen logits = transformers", ours, theirs, 2 * bed.tolerance))
        trials.append(replace(frozen, name="transformers", run=theirs, prepare=lambda: None))
        ratios.append(("transformers", "frozen"))
    except Unavailable as reason:
        notes["transformers"] = f"not measured: {reason}"
    bar = {}
    if count == 3 and tuple(linears) == ALL:
        if bed.device.type == "cpu" and tokens == 512:
            bar = {"plastic ÷ frozen": "≤ 1.25"}
        if bed.device.type == "cuda" and tokens == 2048:
            bar = {"plastic ÷ frozen": "≤ 1.08"}
    return Experiment(trials, checks, ratios, notes, "matmul", bar)


def moments(bed: Bed, context: int = 64, tokens: int = 45, every: int = 4) -> Experiment:
    """One probe of many moments against one probe per moment."""
    plastic = Plastic(bed, bed.layers(), ALL, context, context)
    plastic.on()
    episode, ids = plastic.episode, bed.ids(context + tokens)
    question = ids[:, context:]
    at = list(range(0, context + 1, every))
    snapshots = []
    for t in range(context + 1):
        if t in at:
            snapshots.append(episode.snapshot())
        if t < context:
            episode.feed(ids[:, t : t + 1], update="all", logits="last")
    end = episode.snapshot()
    try:
        episode.probe(question, at=at, logits="last")
    except (ValueError, TypeError, NotImplementedError) as error:
        raise Unavailable(f"episode.probe(at=[...]) refuses: {str(error).splitlines()[0][:120]}") from error

    def prepare() -> None:
        plastic.on()
        episode.restore(end)

    def batched() -> Tensor:
        return episode.probe(question, at=at, logits="last").logits

    def one_by_one() -> Tensor:
        seen = []
        for snapshot in snapshots:
            episode.restore(snapshot)
            seen.append(episode.probe(question, logits="last").logits)
        return torch.stack(seen)

    def checked(run: Callable[[], Tensor]) -> Tensor:
        prepare()
        return run()

    flops = measure.forward_flops(bed.config, tokens)
    below = (flops - measure.forward_flops(bed.config, 0)) * bed.layers()[0] // bed.config.num_hidden_layers
    shared = flops - below * (len(at) - 1) // len(at)  # the layers below the first plastic one run once
    return Experiment(
        [
            Trial("batched", batched, len(at), prepare, flops=shared),
            Trial("one by one", one_by_one, len(at), prepare, flops=flops),
        ],
        [
            Check(
                "batched = one by one",
                partial(checked, batched),
                partial(checked, one_by_one),
                10 * bed.tolerance,
            )
        ],
        [("one by one", "batched")],
        {
            "moments": len(at),
            "events": context,
            "probe tokens": tokens,
            "layers": bed.layers(),
            "per": "moment",
        },
        "matmul",
    )
