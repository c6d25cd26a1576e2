"""One token after another: frozen and plastic."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastweights as fw
from fastweights.state.factors import Factors
from fastweights.state.slots import Slots

from . import measure, peers
from .bed import RULE, Bed, Plastic
from .measure import Check, Experiment, Trial, Unavailable

CONTEXT = 256  # tokens in the KV cache when a decode run begins
STEPS = 8  # tokens of a decode run


def decoded(episode: fw.Episode, update: str, steps: int, ticks: list[list[float]] | None = None) -> Tensor:
    """Greedy tokens; the logits after the last of them, [1, V]. Adds the seconds of each token to `ticks`."""
    stamps = [time.perf_counter()]
    for _ in episode.generate(None, steps, update=update, stop_token_ids=()):
        stamps.append(time.perf_counter())
    if ticks is not None:
        ticks.append([after - before for before, after in itertools.pairwise(stamps)])
    assert episode.logits is not None
    return episode.logits


def frozen_trial(bed: Bed, context: int, steps: int) -> tuple[Trial, fw.Episode, fw.Snapshot]:
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


def frozen_decode(bed: Bed, context: int = CONTEXT, steps: int = STEPS, compiled: bool = False) -> Experiment:
    """Against transformers, its static cache too on a CPU; with `compiled` against that one alone, as a CUDA graph."""
    cuda = bed.device.type == "cuda"
    if compiled and not cuda:
        raise Unavailable("only on a GPU is transformers' step compiled")
    against = (
        ["transformers-static"] if compiled else ["transformers"] if cuda else ["transformers", "transformers-static"]
    )
    frozen, episode, _ = frozen_trial(bed, context, steps)
    trials, checks, ratios = [frozen], [], []
    notes: dict[str, Any] = {"context": context, "tokens": steps}

    def ours() -> Tensor:
        frozen.prepare()
        return decoded(episode, "none", steps)

    def theirs(decoder: peers.Decoder) -> Tensor:
        decoder.rewind()
        return decoder.run(episode.token_ids[0][context:])[1]  # our tokens: in half precision the best two may tie

    for name in against:
        static = name == "transformers-static"
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
            tokens = torch.tensor([episode.token_ids[0]])
            return fw.Episode(bed.model).feed(tokens, update="none", logits="last")[:, -1]

        checks.append(Check("steps = one pass", ours, at_once, bed.tolerance))
    f32 = bed.device.type == "cpu" and bed.dtype == torch.float32
    bars = {"transformers ÷ frozen": "≥ 1.6", "frozen share of stream": "≥ 80 %"} if f32 else {}
    if cuda:
        bars = {"transformers-static ÷ frozen": "≥ 1.5"} if compiled else {"frozen share of stream": "≥ 83 %"}
    return Experiment(trials, checks, ratios, notes, "stream", bars)


def plastic_decode(
    bed: Bed,
    rank: int,
    count: int | None = 3,
    linears: Sequence[str] | None = None,
    context: int = CONTEXT,
    steps: int = STEPS,
) -> Experiment:
    """Decoding that reads and writes, from rank − steps to rank events; linears: None: all of the MLP."""
    linears = bed.linears if linears is None else linears
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
        tokens = torch.tensor(episode.token_ids)
        slow.feed(tokens[:, : written[0]], update="none", logits="last")
        for t in range(written[0], context + steps):
            slow.feed(tokens[:, t : t + 1], update="all", logits="last")
        assert slow.logits is not None
        return slow.logits

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
    if (rank, count, linears) == (64, 3, bed.linears) and (bed.device.type == "cuda" or bed.dtype == torch.float32):
        bar = {"plastic ÷ frozen": "≤ 1.05" if bed.device.type == "cpu" else "≤ 1.01"}
    elif (rank, count, linears) == (64, None, bed.linears) and bed.device.type == "cuda":
        bar = {"plastic ÷ frozen": "≤ 1.03"}
    return Experiment(
        [frozen, trial],
        # one pass and steps round differently, and Hebbian writes amplify that
        [Check("prompt in one pass = token by token", fast, one_by_one, bed.amplified(10))],
        [("plastic", "frozen")],
        {"context": context, "tokens": steps, "layers": layers, "linears": list(linears), "rank": rank}
        | {"events": f"{rank - steps} to {rank}", "rule": repr(RULE)},
        "stream",
        bar,
    )


def overflow(bed: Bed, rank: int = 64, context: int = CONTEXT, folds: int = 3) -> Experiment:
    """Decoding that writes every token into logs that are full: `folds` blocks of tokens under each policy.

    All begin just after the event that fills a log under "compress", so every block of tokens has one fold.
    """
    layers = bed.layers()
    slots = Slots.of("compress", rank, bed.config.intermediate_size, bed.config.hidden_size)
    full, block = slots.capacity, slots.capacity - slots.kept
    steps, linears = folds * block, len(layers) * len(bed.linears)
    if context <= full:
        raise ValueError(f"a context of {context} tokens cannot write {full} of them after the first")
    ids, written = bed.ids(context), list(range(context - full, context))
    frozen, frozen_episode, _ = frozen_trial(bed, context, steps)
    ticks: dict[str, list[list[float]]] = {name: [] for name in ("frozen", "compress", "evict", "grow")}
    trials = [replace(frozen, run=partial(decoded, frozen_episode, "none", steps, ticks["frozen"]))]
    episodes = {}
    read = {"compress": rank + block // 2, "evict": rank, "grow": full + steps // 2}
    for policy in read:
        plastic = Plastic(bed, layers, bed.linears, rank, context + steps, policy)
        episodes[policy] = plastic.episode
        plastic.episode.feed(ids, update=written, logits="last")
        start = plastic.episode.snapshot()

        def prepare(plastic: Plastic = plastic, start: Any = start) -> None:
            plastic.on()
            plastic.episode.reset()  # new buffers: "grow" doubles its own again in every run
            plastic.episode.restore(start)

        extra = measure.plastic_decode_bytes(bed.config, len(layers), bed.linears, read[policy])
        trials.append(
            replace(
                frozen,
                name=policy,
                run=partial(decoded, plastic.episode, "generated", steps, ticks[policy]),
                prepare=prepare,
                bytes=frozen.bytes + extra,
                flops=frozen.flops + extra // 2,
            )
        )
    trial = {each.name: each for each in trials}

    def after(policy: str) -> Tensor:
        trial[policy].prepare()
        return decoded(episodes[policy], "generated", steps)

    def at_once(policy: str) -> Tensor:
        """The same tokens, all in one pass."""
        episode = Plastic(bed, layers, bed.linears, rank, context + steps, policy).episode
        everything = list(range(context - full, context + steps))
        return episode.feed(episodes[policy].token_ids, update=everything, logits="last")[:, -1]

    def archived(policy: str) -> list[Factors]:
        """The archives of an episode that reads the same tokens one by one: every event as it was written."""
        episode = Plastic(bed, layers, bed.linears, rank, context + steps, policy, archive=True).episode
        episode.feed(ids, update=written, logits="last")
        for token in episodes[policy].token_ids[0][context:]:
            episode.feed([[token]], update="all", logits="last")
        return [log.archive for log in episode.logs.values() if log.archive is not None]

    def rings() -> Tensor:
        after("evict")
        logs = episodes["evict"].logs.values()
        return torch.cat([log.delta_weight(0, torch.float64).flatten().cpu() for log in logs])

    def windows() -> Tensor:
        last = [[factor[0, -rank:].double() for factor in log.factors()[:2]] for log in archived("evict")]
        return torch.cat([(U_RO.T @ K_RI).flatten() for U_RO, K_RI in last])

    after("compress")
    logs = episodes["compress"].logs.values()
    lost = [
        float((exact.delta_weight(0, torch.float64) - log.delta_weight(0, torch.float64).cpu()).norm())
        for exact, log in zip(archived("compress"), logs, strict=True)
    ]
    bound, norm = [log.certificate(0)[1] for log in logs], [log.delta_norm(0) for log in logs]

    def share(errors: list[float]) -> str:
        return f"{max(error / whole for error, whole in zip(errors, norm, strict=True)):.1e}"

    def times(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
        found = {f"{name}, slowest token": _slowest(runs[1:]) for name, runs in ticks.items()}  # the first is warm-up
        for policy in read:
            each = measure.spread([(r[policy] - r["frozen"]) / linears for r in rounds])
            found[f"{policy} − frozen, an event of one linear"] = each
        return found

    return Experiment(
        trials,
        [
            Check(
                f"compress: ‖exact − kept‖ ≤ its certificate in {linears} linears",
                lambda: (torch.tensor(lost) / torch.tensor(bound)).clamp(min=1),
                lambda: torch.ones(linears),
                0.0,
            ),
            Check(f"evict: ΔW = the last {rank} events", rings, windows, bed.tolerance),
            *(
                Check(f"{name}: steps = one pass", partial(after, name), partial(at_once, name), bed.amplified(10))
                for name in ("evict", "grow")
            ),
        ],
        [("compress", "evict"), *((policy, "frozen") for policy in read)],
        {"context": context, "tokens": steps, "layers": layers, "linears": list(bed.linears), "rank": rank}
        | {"events": f"{full} to {full + steps}", "folds": f"{folds} of each linear, every {block} events"}
        | {"compress, at the end, largest of the linears": f"certificate {share(bound)} of ‖ΔW‖, error {share(lost)}"}
        | {"rule": repr(RULE)},
        "stream",
        times=times,
    )


def _slowest(runs: list[list[float]]) -> dict[str, float]:
    """Over the runs, the seconds of the token that has the largest median."""
    return max((measure.spread(each) for each in zip(*runs, strict=True)), key=lambda found: found["median"])
