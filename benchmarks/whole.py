"""Whole programs as a user runs them: the experiment, and loading a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastweights as fw

from . import measure, peers
from .bed import Bed
from .measure import Check, Experiment, Trial, Unavailable

# ---- the experiment

CONTEXT_TEXT = (
    "As of August 24, 2025, the current President of the United States is **Donald J. Trump**. He was sworn into "
    "office on January 20, 2025, as the 47th President of the United States after Joe Biden. He is the president now."
)
QUESTION_TEXT = (
    "Here is a question about politics with two options. Please answer it with one letter, (A) or (B).\n"
    "Question: Who is the current US president?\nOption (A): Donald Trump.\nOption (B): Joe Biden.\nAnswer: ("
)


def fitted(encode: Callable[[str], list[int]], text: str, tokens: int, keep: str) -> str:
    """The text cut at its "start" or "end" kept, so that it has `tokens` tokens (or the nearest number below)."""
    cuts = [text[:n] for n in range(len(text), 0, -1)] if keep == "start" else [text[n:] for n in range(len(text))]
    return next((cut for cut in cuts if len(encode(cut)) <= tokens and cut.strip() == cut), text)


def surgery(bed: Bed, context_tokens: int = 62, question_tokens: int = 45) -> Experiment:
    """fw.surgery, a probe with all layers captured after every event, against the hook loop on transformers."""
    if bed.tokenizer is None:
        raise Unavailable("this model has no tokenizer")
    model, tokenizer, rule = bed.model, bed.tokenizer, fw.Hebbian(rate=0.01)
    fw.detach(model)
    context = fitted(tokenizer.encode, CONTEXT_TEXT, context_tokens, "start")
    question = fitted(tokenizer.encode, QUESTION_TEXT, question_tokens, "end")
    layers = bed.layers()
    loop = peers.HookLoop(bed.peer, layers, bed.linears, rule)
    ids, asked = tokenizer.encode(context), tokenizer.encode(question)
    prompt = tokenizer.encode(context + "\n\n" + question)
    answers = [tokenizer.encode(text, add_special_tokens=False)[0] for text in "AB"]

    def ours() -> Any:
        return fw.surgery(
            model, tokenizer, context=context, question=question, answers=["A", "B"], layers=layers, rule=rule
        )

    def theirs() -> Any:
        return loop.run(ids, asked, prompt, answers)

    def ours_checked() -> Tensor:
        fw.detach(model)
        record = ours()
        return torch.cat([each.flatten().double().cpu() for each in (record.distance, record.logprob)])

    def theirs_checked() -> Tensor:
        loop.reset()
        distance, logprob = theirs()
        return torch.cat([each.flatten().double().cpu() for each in (distance, logprob)])

    return Experiment(
        [Trial("surgery", ours, 1, partial(fw.detach, model)), Trial("hook loop", theirs, 1, loop.reset)],
        # the loop rounds 62 dense updates, and both go through 62 events of a growing response
        [
            Check(
                "distances and log-probabilities = hook loop",
                ours_checked,
                theirs_checked,
                bed.amplified(100),
            )
        ],
        [("hook loop", "surgery")],
        {"context": len(ids), "probe tokens": len(asked), "probes": len(ids) + 1, "layers": layers}
        | {"linears": list(bed.linears), "rule": repr(rule)},
        "matmul",
        {"hook loop ÷ surgery": "≥ 4" if bed.device.type == "cpu" else "≥ 30"},
    )


# ---- loading

# VmHWM, not ru_maxrss: that one survives exec, so a child begins with its parent's
_PEAK = """
import sys, time
import torch

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
"""
_LOAD = """
import fastweights as fw
torch.zeros(1)
before = peak()
start = time.perf_counter()
model, _ = fw.load(sys.argv[1])
sums = [float(p.flatten()[:: 1024 // p.element_size()].sum()) for p in model.parameters()]  # every page is read
seconds = time.perf_counter() - start
print(seconds, peak() - before, sum(p.nbytes for p in model.parameters()), sum(sums))
"""
_READ = """
import pathlib
torch.zeros(1)
before, size, held, start = peak(), 0, [], time.perf_counter()
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors")):
    held.append(torch.empty(path.stat().st_size, dtype=torch.uint8))  # into memory of its own, as a model needs it
    with open(path, "rb", buffering=0) as file:
        while size < sum(map(len, held)):
            size += file.readinto(memoryview(held[-1].numpy())[size - sum(map(len, held[:-1])) :])
print(time.perf_counter() - start, peak() - before, size, 0)
"""


def _subprocess(code: str, folder: Path) -> tuple[float, float, float, float]:
    done = subprocess.run(
        [sys.executable, "-c", _PEAK + code, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"the load process failed: {done.stderr.strip().splitlines()[-1][:200]}")
    seconds, peak, size, total = map(float, done.stdout.split()[-4:])
    return seconds, peak, size, total


def load(bed: Bed, runs: int = 5) -> dict[str, Any]:
    """Load time and peak memory in fresh processes, file in the page cache, in alternation with reading it.

    Its own loop: what is timed is in another process.
    """
    if not Path("/proc/self/status").exists():
        raise Unavailable("peak memory is read from /proc, which this system does not have")
    if bed.folder is None or not list(bed.folder.glob("*.safetensors")):
        raise Unavailable("needs a model in a folder of safetensors files")
    _subprocess(_READ, bed.folder)
    pairs = [(_subprocess(_LOAD, bed.folder), _subprocess(_READ, bed.folder)) for _ in range(runs)]
    total = sum(float(p.flatten()[:: 1024 // p.element_size()].sum()) for p in bed.model.parameters())
    loaded_total = pairs[0][0][3]
    if bed.model.dtype.itemsize * sum(p.numel() for p in bed.model.parameters()) == pairs[0][0][2]:
        error = abs(loaded_total - total) / max(abs(total), 1e-30)
        if error > 1e-4:
            raise measure.Wrong(f"loaded weights sum to {loaded_total}, this model's to {total}")
    size = pairs[0][0][2]
    if bed.device.type == "cpu" and min(a[1] for a, _ in pairs) < 0.9 * size:
        raise measure.Wrong("the process that loaded never held the whole model: its peak memory was not measured")
    return {
        "trials": {
            "load": {
                "seconds": measure.spread([a[0] for a, _ in pairs]),
                "peak_bytes": max(a[1] for a, _ in pairs),
            },
            "read file": {"seconds": measure.spread([b[0] for _, b in pairs]), "peak_bytes": pairs[0][1][1]},
        },
        "ratios": {
            "load ÷ read file": measure.spread([a[0] / b[0] for a, b in pairs]),
            "peak memory ÷ model": measure.spread([a[1] / size for a, _ in pairs]),
        },
        "context": {
            "model_bytes": int(size),
            "folder": bed.folder.name,
            "page cache": "warm",
            "peak": "after imports",
        },
        "bars": {"load ÷ read file": "≤ 1.5", "peak memory ÷ model": "≤ 1.15"},
        "checks": {"sum of every 1024th byte's weight": 0.0},
        "repeats": runs,
    }
