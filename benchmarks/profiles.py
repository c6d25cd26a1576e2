"""Where a pass spends its time: kernels, time on the device, and time in which the device waits."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fastweights as fw

from . import measure
from .bed import RULE, Bed, Plastic
from .decode import CONTEXT, decoded, frozen_trial

TOP = 12  # kernels that are named


def profiled(bed: Bed, run: Callable[[], Any], prepare: Callable[[], Any], units: int = 1) -> dict[str, Any]:
    """What one run does, per unit: wall time without the profiler, and what the profiler saw of the same run."""
    cuda = bed.device.type == "cuda"

    def ready() -> None:
        prepare()
        if cuda:
            torch.cuda.synchronize(bed.device)

    walls = []
    for _ in range(5):  # the first two warm up
        ready()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize(bed.device)
        walls.append((time.perf_counter() - start) / units)
    ready()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        run()
        if cuda:
            torch.cuda.synchronize(bed.device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        if event.device_type == kind
    ]
    busy = covered((start, end) for _, start, end in events) / 1e6 / units
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in events:
        by_name[name].append(end - start)
    heaviest = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    wall = measure.spread(walls[2:])
    return {
        "trials": {
            "wall": {"seconds": wall},
            "on the device": {"seconds": measure.spread([busy])},
            "waiting": {"seconds": measure.spread([max(w - busy, 0.0) for w in walls[2:]])},
        },
        "ratios": {"on the device ÷ wall": measure.spread([busy / w for w in walls[2:]])},
        "context": {"kernels": round(len(events) / units, 1), "units": units},
        "kernels": [
            f"{sum(times) / 1e3 / units:.3f} ms, {len(times) / units:g} ×, {name[:90]}"
            for name, times in heaviest[:TOP]
        ],
        "bars": {},
        "checks": {},
        "repeats": len(walls) - 2,
    }


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union: kernels that overlap count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def frozen_decode(bed: Bed, context: int = CONTEXT, steps: int = 4) -> dict[str, Any]:
    trial, _, _ = frozen_trial(bed, context, steps)
    found = profiled(bed, trial.run, trial.prepare, steps)
    found["context"] |= {"context": context, "unit": "token"}
    return found


def plastic_decode(bed: Bed, context: int = CONTEXT, steps: int = 4, rank: int = 64) -> dict[str, Any]:
    plastic = Plastic(bed, bed.layers(), bed.linears, rank, context + steps)
    episode = plastic.episode
    written = list(range(max(context - (rank - steps), 0), context))
    episode.feed(bed.ids(context), update=written, logits="last")
    start = episode.snapshot()

    def prepare() -> None:
        plastic.on()
        episode.restore(start)

    found = profiled(bed, lambda: decoded(episode, "generated", steps), prepare, steps)
    found["context"] |= {"context": context, "unit": "token", "rank": rank, "layers": bed.layers(), "rule": repr(RULE)}
    return found


def plastic_prefill(bed: Bed, tokens: int = 2048) -> dict[str, Any]:
    plastic = Plastic(bed, bed.layers(), bed.linears, tokens, tokens)
    ids = bed.ids(tokens)

    def prepare() -> None:
        plastic.on()
        plastic.episode.reset()

    found = profiled(bed, lambda: plastic.episode.feed(ids, update="all", logits="last"), prepare)
    found["context"] |= {"tokens": tokens, "layers": bed.layers(), "rule": repr(RULE)}
    return found


def frozen_prefill(bed: Bed, tokens: int = 2048) -> dict[str, Any]:
    fw.detach(bed.model)
    episode = fw.Episode(bed.model, max_length=tokens)
    ids = bed.ids(tokens)
    found = profiled(bed, lambda: episode.feed(ids, update="none", logits="last"), episode.reset)
    found["context"] |= {"tokens": tokens}
    return found


def probe(bed: Bed, tokens: int = 45, events: int = 64, at: str = "now") -> dict[str, Any]:
    """A probe of the fast weights as they are now, or as they were after every event."""
    plastic = Plastic(bed, bed.layers(), bed.linears, events, events)
    ids = bed.ids(events + tokens)
    plastic.episode.feed(ids[:, :events], update="all", logits="last")
    found = profiled(bed, lambda: plastic.episode.probe(ids[:, events:], at=at, logits="last"), plastic.on)
    found["context"] |= {"probe tokens": tokens, "events": events, "layers": bed.layers()}
    return found
