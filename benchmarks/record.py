"""One case on one model, and what stands beside its figures. A check runs first: what is wrong is not timed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastweights as fw
from fastweights import hub, weights

from . import measure
from .bed import Bed, byte_tokenizer, random_model, shape_config
from .cases import CASES, Case
from .measure import Ceiling, Patience, Unavailable, Wrong

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def select(names: list[str]) -> list[Case]:
    """The cases that are named or begin with a name; all of them without names."""
    chosen: dict[str, Case] = {}
    for name in names or [""]:
        found = {key: case for key, case in CASES.items() if key == name or key.startswith(name)}
        if not found:
            raise ValueError(f"no case {name!r}: there are {', '.join(CASES)}")
        chosen |= {name: found[name]} if name in found else found
    return list(chosen.values())


def make_bed(name: str | None, shape: str | None, dtype: torch.dtype, device: torch.device) -> Bed:
    if name is not None and shape is not None:
        raise ValueError("--model and --shape name two models: give one")
    if shape is None:
        model, tokenizer = fw.load(name, dtype=dtype, device=device)
        folder = Path(name) if name else hub.default_folder(weights.gguf_to_folder)
        return Bed(model, Path(name or "SmolLM2-135M-Instruct").name, tokenizer, folder if folder.is_dir() else None)
    try:
        model = random_model(shape_config(shape), dtype, device)
    except Unavailable as reason:
        raise ValueError(f"--shape {shape} --dtype {str(dtype)[6:]}: {reason}") from reason
    return Bed(model, f"random {shape}", byte_tokenizer(model.config.vocab_size))


def run_case(
    case: Case,
    bed: Bed,
    ceiling: Ceiling,
    repeats: int,
    seconds: float = 0.25,
    patience: float = 60.0,
    say: Any = lambda text: None,
) -> dict[str, Any]:
    """status "measured" with its figures; "disturbed" with figures that do not count; "refused" by a check or
    "unavailable" with none; these three with the reason."""
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    record: dict[str, Any] = {"time": started, "about": case.about}
    try:
        if case.measure is not None:
            say(f"{case.name}: measuring")
            return record | {"status": "measured", **case.measure(bed)}
        assert case.build is not None
        say(f"{case.name}: building")
        experiment = case.build(bed)
        record |= {"context": experiment.context, "bars": experiment.bars, "checks": {}}
        for check in experiment.checks:
            say(f"{case.name}: checking {check.name}")
            record["checks"][check.name] = check.error()
        peaks = {trial.name: measure.peak_bytes(trial, bed.device) for trial in experiment.trials if trial.memory}
        trials = [*experiment.trials, ceiling.trial(experiment.ceiling)]
        waiting = Patience(patience, lambda text: say(f"{case.name}: {text}"))
        rounds, noise = measure.alternate(trials, bed.device, repeats, seconds, waiting)
    except Unavailable as reason:
        return record | {"status": "unavailable", "reason": str(reason)}
    except Wrong as reason:
        return record | {"status": "refused", "reason": str(reason)}
    finally:
        fw.detach(bed.model)
    top = trials[-1]
    figures: dict[str, Any] = {}
    for trial in trials:
        figures[trial.name] = {"seconds": measure.spread([r[trial.name] for r in rounds])}
        for unit, count, peak in (("bytes", trial.bytes, top.bytes), ("flops", trial.flops, top.flops)):
            if count:
                rates = [count / r[trial.name] / 1e9 for r in rounds]
                figures[trial.name] |= {unit: count, f"G{unit}_per_s": statistics.median(rates)}
            if count and peak and trial is not top:  # the ceiling of the same round
                shares = [count / r[trial.name] * r[top.name] / peak for r in rounds]
                figures[trial.name][f"share_of_{top.name}"] = measure.spread(shares)
        if peaks.get(trial.name) is not None:
            figures[trial.name]["peak_bytes"] = peaks[trial.name]
    ratios = {" ÷ ".join(map(str, names)): measure.ratio(rounds, *names) for names in experiment.ratios}
    record |= {"status": "measured", "trials": figures, "ratios": ratios, "ceiling_trial": top.name}
    record["times"] = experiment.times(rounds)
    record |= {"repeats": len(rounds), "noise": noise}
    if noise > measure.QUIET:
        record["status"] = "disturbed"
        record["reason"] = f"other processes took up to {noise:.0%} of the CPU in every round: run it again"
    if bed.device.type == "cuda":
        record["peak_bytes"] = torch.cuda.max_memory_allocated(bed.device)
    return record


def where(bed: Bed) -> dict[str, Any]:
    """What stands beside every figure: device, dtype, model, threads, commit, versions."""
    return {
        "device": device_name(bed.device),
        "device_type": bed.device.type,
        "dtype": str(bed.dtype)[6:],
        "model": bed.name,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # its metadata leaves out which CUDA it is for
            **_versions("transformers", "triton", "fastweights"),
        },
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
            elif line.startswith("flags"):
                words = set(line.split(":")[1].split())
                flags = next((f" {f}" for f in ("avx512f", "avx2") if f in words), "")
    except OSError:
        pass
    return f"{name}{flags}, {os.cpu_count()} CPUs"


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit of this checkout, with + when the library differs from it; "unknown" outside one."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "../fastweights", "../kernels")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
