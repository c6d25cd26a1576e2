"""Many at once: a prompt in one pass, a probe at many moments in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastweights as fw
from fastweights.state.slots import Slots

from . import measure
from .bed import RULE, Bed, Plastic
from .measure import Check, Experiment, Trial, Unavailable


def frozen_trial(bed: Bed, tokens: int) -> Trial:
    """A prompt in one pass of the frozen model."""
    fw.detach(bed.model)
    episode = fw.Episode(bed.model, max_length=tokens)

    def prepare() -> None:
        fw.detach(bed.model)
        episode.reset()

    run = partial(episode.feed, bed.ids(tokens), update="none", logits="last")
    weights = measure.decode_bytes(bed.config, bed.dtype.itemsize, tokens)
    return Trial("frozen", run, 1, prepare, weights, measure.forward_flops(bed.config, tokens))


def prefill(bed: Bed, tokens: int, count: int | None = 3, linears: Sequence[str] | None = None) -> Experiment:
    """A prompt in one pass, frozen and with every token written (full history: as many slots as tokens)."""
    ids, layers, stepped = bed.ids(tokens), bed.layers(count), min(16, tokens // 2)
    linears = bed.linears if linears is None else linears
    frozen = frozen_trial(bed, tokens)
    prepare, flops = frozen.prepare, frozen.flops
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

    checks = [Check(f"one pass = its last {stepped} tokens stepped", at_once, end_stepped, bed.amplified(20))]
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

        checks.append(Check("frozen logits = transformers", ours, theirs, bed.amplified(2)))
        trials.append(replace(frozen, name="transformers", run=theirs, prepare=lambda: None))
        ratios.append(("transformers", "frozen"))
    except Unavailable as reason:
        notes["transformers"] = f"not measured: {reason}"
    bar = {}
    if count == 3 and linears == bed.linears:
        if bed.device.type == "cpu" and tokens == 512:
            bar = {"plastic ÷ frozen": "≤ 1.25"}
        if bed.device.type == "cuda" and tokens == 512:
            bar = {"plastic ÷ frozen": "≤ 1.08"}
        if bed.device.type == "cuda" and tokens == 2048:
            bar = {"plastic ÷ frozen": "≤ 1.08", "frozen share of matmul": "≥ 88 %"}
    return Experiment(trials, checks, ratios, notes, "matmul", bar)


def overflow(bed: Bed, tokens: int = 512, rank: int = 64) -> Experiment:
    """A prompt in one pass that writes more events than the logs hold, under each policy."""
    ids, layers, stepped = bed.ids(tokens), bed.layers(), min(16, tokens // 2)
    trials, checks = [frozen_trial(bed, tokens)], []
    for policy in ("compress", "evict", "grow"):
        plastic = Plastic(bed, layers, bed.linears, rank, tokens, policy)

        def prepare(plastic: Plastic = plastic) -> None:
            plastic.on()
            plastic.episode.reset()

        def fed(first: int, plastic: Plastic = plastic) -> Tensor:
            """Logits after the last token; those from `first` on are fed one at a time."""
            prepare(plastic)
            logits = plastic.episode.feed(ids[:, :first], update="all", logits="last")
            for t in range(first, tokens):
                logits = plastic.episode.feed(ids[:, t : t + 1], update="all", logits="last")
            return logits[:, -1]

        run = partial(plastic.episode.feed, ids, update="all", logits="last")
        trials.append(Trial(policy, run, 1, prepare))
        about = f"{policy}: one pass = its last {stepped} tokens stepped"
        checks.append(Check(about, partial(fed, tokens), partial(fed, tokens - stepped), bed.amplified(20)))
    slots = Slots.of("compress", rank, bed.config.intermediate_size, bed.config.hidden_size)
    folds = 1 + (tokens - slots.capacity) // (slots.capacity - slots.kept)
    return Experiment(
        trials,
        checks,
        [(trial.name, "frozen") for trial in trials[1:]],
        {"tokens": tokens, "layers": layers, "linears": list(bed.linears), "rank": rank, "rule": repr(RULE)}
        | {"folds": f"{folds} of each linear"},
        "matmul",
        {"compress ÷ frozen": "≤ 1.3"},
    )


def moments(
    bed: Bed, events: int = 128, tokens: int = 45, counts: Sequence[int] = (8, 32, 128), max_bytes: int = 4 << 30
) -> Experiment:
    """A probe of many moments, spread evenly over the episode, against one probe of the last."""
    layers = bed.layers()
    plastic = Plastic(bed, layers, bed.linears, events, events)
    episode, ids = plastic.episode, bed.ids(events + tokens)
    context, question = ids[:, :events], ids[:, events:]
    episode.feed(context, update="all", logits="last")
    at = {count: [events * (n + 1) // count for n in range(count)] for count in counts}
    batches: list[str] = []

    def batched(count: int, progress: Callable[[int, int], None] | None = None) -> Tensor:
        return episode.probe(question, at=at[count], logits="last", max_bytes=max_bytes, progress=progress).logits

    def together() -> Tensor:
        plastic.on()
        seen = []
        for count in counts:
            done: list[int] = []
            seen.append(batched(count, lambda moments, _, done=done: done.append(moments)))  # type: ignore[misc]
            batches.append(f"{count} in {len(done)}")
        return torch.cat(seen)

    def one_by_one() -> Tensor:
        plastic.on()
        episode.reset()
        seen = {}
        for n in range(events):
            episode.feed(context[:, n : n + 1], update="all", logits="last")
            seen[n + 1] = episode.probe(question, logits="last").logits
        return torch.stack([seen[n] for count in counts for n in at[count]])

    # every moment reads the same factors, through its own weights; the layers below the first plastic one run once
    read = tokens * measure.plastic_decode_bytes(bed.config, len(layers), bed.linears, events) // 2
    flops = measure.forward_flops(bed.config, tokens) + read
    below = (measure.forward_flops(bed.config, tokens, heads=0)) * layers[0] // bed.config.num_hidden_layers
    now = Trial(
        "one probe",
        lambda: episode.probe(question, logits="last"),
        prepare=plastic.on,
        flops=flops,
        memory=True,
    )
    trials = [now]
    ratios: list[tuple[str, str] | tuple[str, str, int]] = []
    for count in counts:
        name, all_flops = f"{count} moments", below + count * (flops - below)
        trials.append(replace(now, name=name, run=partial(batched, count), flops=all_flops))
        ratios += [(name, "one probe"), (name, "one probe", count)]
    return Experiment(
        trials,
        [Check("batched = token by token, a probe after each", together, one_by_one, bed.amplified(10))],
        ratios,
        {"events": events, "probe tokens": tokens, "layers": layers, "linears": list(bed.linears)}
        | {"factors": f"{sum(log.bytes for log in episode.logs.values()) / 1e6:.1f} MB, shared by all moments"}
        | {"budget": f"{max_bytes / 16e6:.0f} MB a batch", "batches": batches}
        | {"peak": "above the resting level, of one run"},
        "matmul",
        {f"{counts[-1]} moments share of matmul": "≥ 60 %"} if bed.device.type == "cuda" else {},
    )
