"""One token after another: frozen and plastic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastweights as fw

from . import measure, peers
from .bed import ALL, RULE, Bed, Plastic
from .measure import Check, Experiment, Trial, Unavailable

CONTEXT = 256  # tokens in the KV cache when a decode run begins
STEPS = 8  # tokens of a decode run


def decoded(episode: fw.Episode, update: str, steps: int) -> Tensor:
    """Greedy tokens; the logits after the last of them, [1, V]."""
    for _ in episode.generate(None, steps, update=update, stop_token_ids=()):
        pass
    assert episode.logits_BV is not None
    return episode.logits_BV


def frozen_trial(bed: Bed, context: int, steps: int) -> tuple[Trial, fw.Episode, fw.episode.Snapshot]:
    fw.detach(bed.model)
    episode = fw.Episode(bed.model, max_length=context + steps)
    episode.feed(bed.ids(context), update="none", logits="last")
    start = episode.snapshot()

    def prepare() -> None:
        fw.detach(bed.model)
        episode.restore(start)

    trial = Trial(
        "frozen",
        partial(decoded, episode, "none", steps),
        steps,
        prepare,
        measure.decode_bytes(bed.config, bed.dtype.itemsize, context + steps // 2),
        measure.forward_flops(bed.config, 1, context + steps // 2),
    )
    return trial, episode, start


def frozen_decode(bed: Bed, context: int = CONTEXT, steps: int = STEPS) -> Experiment:
    frozen, episode, _ = frozen_trial(bed, context, steps)
    trials, checks, ratios = [frozen], [], []
    notes: dict[str, Any] = {"context": context, "tokens": steps}

    def ours() -> Tensor:
        frozen.prepare()
        return decoded(episode, "none", steps)

    def theirs(decoder: peers.Decoder) -> Tensor:
        decoder.rewind()
        return decoder.run()[1]

    for name, static in (("transformers", False), ("transformers-static", True)):
        try:
            decoder = peers.Decoder(bed.peer, bed.ids(context).to(bed.device), steps, static)
            check = Check(f"logits after {steps} tokens = {name}", ours, partial(theirs, decoder), bed.tolerance)
            if static:  # a peer that does not run here is reported, not fatal
                check.error()
        except Unavailable as reason:
            notes[name] = f"not measured: {reason}"
            continue
        except Exception as error:
            if not static:
                raise
            notes[name] = f"not measured: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        checks.append(check)
        trials.append(replace(frozen, name=name, run=decoder.run, prepare=decoder.rewind))
        ratios.append((name, "frozen"))
    if not checks:  # without a peer: one pass over everything says what the steps must say

        def at_once() -> Tensor:
            fw.detach(bed.model)
            tokens = torch.tensor([episode.seen[0]])
            return fw.Episode(bed.model).feed(tokens, update="none", logits="last")[:, -1]

        checks.append(Check("steps = one pass", ours, at_once, bed.tolerance))
    bars = {"transformers ÷ frozen": "≥ 1.6", "frozen share of stream": "≥ 80 %"} if bed.device.type == "cpu" else {}
    return Experiment(trials, checks, ratios, notes, "stream", bars)


def plastic_decode(
    bed: Bed,
    rank: int,
    count: int | None = 3,
    linears: Sequence[str] = ALL,
    context: int = CONTEXT,
    steps: int = STEPS,
) -> Experiment:
    """Decoding that reads and writes, from rank − steps to rank events."""
    frozen, _, _ = frozen_trial(bed, context, steps)
    layers = bed.layers(count)
    plastic = Plastic(bed, layers, linears, rank, context + steps)
    episode, ids = plastic.episode, bed.ids(context)
    written = list(range(context - (rank - steps), context))
    episode.feed(ids, update=written, logits="last")
    start = episode.snapshot()

    def prepare() -> None:
        plastic.on()
        episode.restore(start)

    def fast() -> Tensor:
        prepare()
        return decoded(episode, "generated", steps)

    def one_by_one() -> Tensor:
        """The same tokens, the written ones fed one at a time."""
        plastic.on()
        slow = fw.Episode(bed.model, max_length=context + steps)
        tokens = torch.tensor(episode.seen)
        slow.feed(tokens[:, : written[0]], update="none", logits="last")
        for t in range(written[0], context + steps):
            slow.feed(tokens[:, t : t + 1], update="all", logits="last")
        assert slow.logits_BV is not None
        return slow.logits_BV

    extra = measure.plastic_decode_bytes(bed.config, len(layers), linears, rank - steps // 2)
    trial = replace(
        frozen,
        name="plastic",
        run=partial(decoded, episode, "generated", steps),
        prepare=prepare,
        bytes=frozen.bytes + extra,
        flops=frozen.flops + extra // 2,
    )
    bar = {}
    if (rank, count, tuple(linears)) == (64, 3, ALL):
        bar = {"plastic ÷ frozen": "≤ 1.05" if bed.device.type == "cpu" else "≤ 1.01"}
    elif (rank, count, tuple(linears)) == (64, None, ALL) and bed.device.type == "cuda":
        bar = {"plastic ÷ frozen": "≤ 1.03"}
    return Experiment(
        [frozen, trial],
        # one pass and steps round differently, and Hebbian writes amplify that
        [Check("prompt in one pass = token by token", fast, one_by_one, 10 * bed.tolerance)],
        [("plastic", "frozen")],
        {"context": context, "tokens": steps, "layers": layers, "linears": list(linears), "rank": rank}
        | {"events": f"{rank - steps} to {rank}", "rule": repr(RULE)},
        "stream",
        bar,
    )
