"""The cases: each builds what it times, the reference that must agree first, and the counts beside it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastweights as fw
from fastweights.config import LlamaConfig
from fastweights.model import Llama

from . import measure, peers
from .measure import Check, Experiment, Trial, Unavailable

CONTEXT = 256  # tokens in the KV cache when a decode run begins
STEPS = 8  # tokens of a decode run
ALL = ("gate_proj", "up_proj", "down_proj")

# vocabulary, width, MLP width, layers, heads, KV heads, tied, rope base
SHAPES = {
    "135m": (49152, 576, 1536, 30, 9, 3, True, 100000.0),  # SmolLM2-135M
    "1b": (128256, 2048, 8192, 16, 32, 8, True, 500000.0),  # Llama-3.2-1B
    "8b": (128256, 4096, 14336, 32, 32, 8, False, 500000.0),  # Llama-3.1-8B
}


def shape(name: str) -> LlamaConfig:
    vocabulary, width, mlp, layers, heads, groups, tied, theta = SHAPES[name]
    return LlamaConfig.from_dict(
        {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary,
            "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5, "rope_theta": theta, "tie_word_embeddings": tied,
        },
        f"shape {name}",
    )  # fmt: skip


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """Random weights of a scale that keeps activations of the order of 1."""
    need = dtype.itemsize * (measure.linear_parameters(config) * (1 if config.tie_word_embeddings else 2))
    if need * 1.3 > available_bytes(device):
        raise Unavailable(f"{need / 1e9:.1f} GB of weights, {available_bytes(device) / 1e9:.1f} GB are free")
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    model.frequency = None
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            else:
                scale = 0.5 / weight.shape[-1] ** 0.5
                weight.normal_(
                    0, 1 if "embed" in name and not config.tie_word_embeddings else scale, generator=generator
                )
    return model.requires_grad_(False).eval()


class Bed:
    """The model under test and what the cases share; a fresh `peer` is made once."""

    def __init__(self, model: Llama, name: str, tokenizer: Any = None, folder: Path | None = None):
        self.model, self.name, self.tokenizer, self.folder = model, name, tokenizer, folder
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        # relative, of logits: float32 as DESIGN §8 asks of the real model; half precision by its epsilon
        self.tolerance = 1e-5 if self.dtype.itemsize >= 4 else 16 * torch.finfo(self.dtype).eps

    @cached_property
    def peer(self) -> Any:
        need = measure.decode_bytes(self.config, self.dtype.itemsize, 0)
        if need * 1.2 > available_bytes(self.device):
            raise Unavailable(f"no memory for a copy of {need / 1e9:.1f} GB of weights for transformers")
        return peers.transformers_model(self.model)

    def ids(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.config.vocab_size, (1, tokens), generator=generator)

    def layers(self, count: int | None = 3) -> list[int]:
        """`count` layers from a third of the depth on (11, 12, 13 of 30), or all."""
        depth = self.config.num_hidden_layers
        if count is None or count >= depth:
            return list(range(depth))
        first = 11 if depth >= 14 else (depth - count) // 2
        return list(range(first, first + count))


RULE = fw.Hebbian(rate=1e-3)


class Plastic:
    """An episode of a plastic model; the model is plastic only while it runs, so others may use it frozen."""

    def __init__(self, bed: Bed, layers: Sequence[int], linears: Sequence[str], rank: int, length: int):
        self.bed = bed
        swap = [(bed.model.model.layers[n].mlp, name) for n in layers for name in linears]
        fw.detach(bed.model)
        fw.attach(bed.model, layers, RULE, linears=linears, rank=rank, overflow="grow")
        self.linears = [(mlp, name, getattr(mlp, name)) for mlp, name in swap]
        self.episode = fw.Episode(bed.model, max_length=length)

    def on(self) -> None:
        fw.detach(self.bed.model)
        for mlp, name, linear in self.linears:
            setattr(mlp, name, linear)


def decoded(episode: fw.Episode, update: str, steps: int) -> Tensor:
    """Greedy tokens; the logits after the last of them, [1, V]."""
    for _ in episode.generate(None, steps, update=update, stop_token_ids=()):
        pass
    assert episode.logits_BV is not None
    return episode.logits_BV


# ---- decode


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


# ---- prefill


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


# ---- many moments at once


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
    if not hasattr(fw, "surgery"):
        raise Unavailable("fastweights has no surgery yet")
    if bed.tokenizer is None:
        raise Unavailable("this model has no tokenizer")
    model, tokenizer, rule = bed.model, bed.tokenizer, fw.Hebbian(rate=0.01)
    fw.detach(model)
    context = fitted(tokenizer.encode, CONTEXT_TEXT, context_tokens, "start")
    question = fitted(tokenizer.encode, QUESTION_TEXT, question_tokens, "end")
    layers = bed.layers()
    loop = peers.HookLoop(bed.peer, layers, ALL, rule)
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
        return torch.cat([record.distance.flatten(), record.logprob.flatten()])

    def theirs_checked() -> Tensor:
        loop.reset()
        distance, logprob = theirs()
        return torch.cat([distance.flatten(), logprob.flatten()])

    return Experiment(
        [Trial("surgery", ours, 1, partial(fw.detach, model)), Trial("hook loop", theirs, 1, loop.reset)],
        # the loop rounds 62 dense updates, and both go through 62 events of a growing response
        [
            Check(
                "distances and log-probabilities = hook loop",
                ours_checked,
                theirs_checked,
                100 * bed.tolerance,
            )
        ],
        [("hook loop", "surgery")],
        {"context": len(ids), "probe tokens": len(asked), "probes": len(ids) + 1, "layers": layers}
        | {"linears": list(ALL), "rule": repr(rule)},
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


# ---- all of them


@dataclass(frozen=True)
class Case:
    name: str
    about: str
    build: Callable[[Bed], Experiment] | None = None
    measure: Callable[[Bed], dict[str, Any]] | None = None  # a case that times in its own way


def _cases() -> list[Case]:
    cases = [Case("decode.frozen", f"one token, context {CONTEXT}: against transformers", frozen_decode)]
    for rank in (16, 64, 256):
        about = f"3 layers, three linears, R = {rank}: against frozen"
        cases.append(Case(f"decode.plastic.r{rank}", about, partial(plastic_decode, rank=rank)))
    about = "all layers, three linears, R = 64: against frozen"
    cases.append(Case("decode.plastic.all-layers", about, partial(plastic_decode, rank=64, count=None)))
    for name, linears in (*((n, (n,)) for n in ALL), ("gate_proj+up_proj", ("gate_proj", "up_proj"))):
        about = f"3 layers, {name} alone, R = 64: against frozen"
        cases.append(Case(f"decode.plastic.{name}", about, partial(plastic_decode, rank=64, linears=linears)))
    for tokens in (128, 512, 2048):
        about = f"{tokens} tokens in one pass, all written: against frozen and transformers"
        cases.append(Case(f"prefill.{tokens}", about, partial(prefill, tokens=tokens)))
    cases.append(Case("reads.moments", "a probe at many moments in one batch: against one by one", moments))
    cases.append(Case("surgery", "the experiment: against a hook loop on transformers with dense updates", surgery))
    cases.append(Case("load", "load time and peak memory: against reading the file", measure=load))
    return cases


CASES = {case.name: case for case in _cases()}
