"""fastweights bench: checks, then times in alternation, and says how far from the ceiling.

A table for people while it runs, one JSON line per case for machines (--json), and a page with the last run of
every case on every device (--out).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastweights as fw
from fastweights import hub, weights

from . import measure
from .bed import SHAPES, Bed, byte_tokenizer, random_model, shape_config
from .cases import CASES, Case
from .measure import Ceiling, Patience, Unavailable, Wrong
from .results import ceilings, notes, table, write_results

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(argv: list[str] | None = None) -> int:
    """0, or 1 when a check refused a case."""
    arguments = sys.argv[2:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    if options.list:
        for case in CASES.values():
            print(f"{case.name:32} {case.about}")
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch {torch.__version__} sees no CUDA device on this machine")
    if not options.check and (options.resume or options.no_tests):
        raise ValueError("--resume and --no-tests belong to --check: give that too")
    if options.check:
        from .check import main as check

        return check(options, arguments)
    chosen = select(options.case)
    repeats = 10 if options.repeats is None else options.repeats
    seconds = 0.25 if options.seconds is None else options.seconds
    patience = 60.0 if options.patience is None else options.patience
    torch.set_grad_enabled(False)
    if options.threads:
        torch.set_num_threads(options.threads)
    show = Display()
    bed = make_bed(options.model, options.shape, DTYPES[options.dtype or "float32"], device)
    show.say("measuring the ceilings")
    ceiling = Ceiling(bed.device, bed.dtype)
    run = {"ceiling": ceiling.measure(repeats, Patience(patience, show.say)), **where(bed)}
    show.header(run)
    records = []
    for case in chosen:
        record = {
            "case": case.name,
            **run,
            **run_case(case, bed, ceiling, repeats, seconds, patience, show.say),
        }
        records.append(record)
        show.record(record)
        if options.json:
            with open(options.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if options.out:  # after every case: a run that is stopped loses nothing
            write_results(Path(options.out), records)
    return 1 if any(record["status"] == "refused" for record in records) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastweights bench", description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help="a case, or all that begin so")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--model", metavar="NAME", help="folder or name; default: SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: float32; bfloat16 in a --check of a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, help="rounds of A B A B (default 10; 1 to 3 in a --check)")
    parser.add_argument("--seconds", type=float, help="on the clock per sample (default 0.25; 0.1 in a --check)")
    parser.add_argument("--patience", type=float, help="seconds per case for disturbed samples (60; 0 in a --check)")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per case")
    parser.add_argument("--out", metavar="RESULTS.md", help="write the page; RESULTS.jsonl beside it keeps the records")
    parser.add_argument(
        "--check", action="store_true", help="GPU tests, then the cases by importance; --out is a folder"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long a --check may take (default 5)")
    parser.add_argument("--no-tests", action="store_true", help="a --check of the cases alone")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # the process that a --check starts
    parser.add_argument("--resume", action="store_true", help="goes on with a --check that was stopped")
    return parser


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


# ---- for people


class Display:
    """Tables on stdout, what is going on now on stderr; plain text where rich is missing or nobody watches."""

    def __init__(self) -> None:
        try:
            from rich.console import Console

            self.console: Any = Console()
            self.status: Any = Console(stderr=True).status("") if sys.stderr.isatty() else None
        except ImportError:
            self.console = self.status = None
        if self.status is not None:
            self.status.start()

    def say(self, text: str) -> None:
        if self.status is not None:
            self.status.update(text)

    def print(self, text: str = "") -> None:
        print(text) if self.console is None else self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def header(self, run: dict[str, Any]) -> None:
        self.print(f"{run['model']}, {run['dtype']}, {run['device']}, {run['threads']} threads, commit {run['commit']}")
        self.print(f"ceilings: {ceilings(run)}")

    def record(self, record: dict[str, Any]) -> None:
        self.print()
        self.print(f"{record['case']}: {record['about']}")
        if record["status"] != "measured":
            self.print(f"  {record['status']}: {record['reason']}")
        if record["status"] not in ("measured", "disturbed"):
            return
        heading, rows = table(record)
        if self.console is None:
            widths = [max(len(row[n]) for row in (heading, *rows)) for n in range(len(heading))]
            for row in (heading, *rows):
                self.print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
        else:
            from rich.table import Column, Table

            grid = Table(*(Column(name, no_wrap=True) for name in heading), box=None)
            for row in rows:
                grid.add_row(*row)
            self.console.print(grid)
        for line in notes(record):
            self.print(f"  {line}")
