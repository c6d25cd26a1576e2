"""fastweights bench --check: the tests and cases of a device by their importance, within a number of minutes.

Every step stands by itself: what fails or hangs is written down and the rest goes on; what does not fit into the time
is named. All results lie in one folder while it runs, so a run that is stopped loses nothing and `--resume` goes on.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastweights as fw

from . import decode, record
from .bed import Bed
from .cases import CASES, Case
from .measure import Ceiling, Patience
from .results import brief, ceilings, one_line, write_results
from .suite import run_tests

CHECK_FOLDER = "bench-check"
AGAIN = 75  # the exit status of a process after which another is to go on
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
# case, seconds on an H200 at the shape of 8B, rounds; in the order of what one wants to know first. The profiler comes
# after what is timed with care: what it leaves behind in the driver may slow launches down.
ORDER = (
    ("decode.frozen", 14, 3),
    ("decode.plastic.r64", 7, 3),
    ("prefill.2048", 6, 3),
    ("surgery", 18, 2),
    ("decode.plastic.all-layers", 6, 3),
    ("kernels.rows1", 6, 3),
    ("forward.short", 6, 3),
    ("decode.behind", 6, 3),
    ("decode.rows", 14, 2),
    ("decode.gradient", 10, 2),
    ("kernels.rows16", 6, 2),
    ("profile.decode.frozen", 5, 1),
    ("profile.decode.plastic", 3, 1),
    ("profile.prefill.plastic", 3, 1),
    ("profile.probe", 3, 1),
    ("profile.moments", 4, 1),
    ("profile.prefill.frozen", 3, 1),
    ("prefill.512", 7, 3),
    ("prefill.overflow", 12, 2),
    ("reads.moments", 13, 2),
)
LAST = (("decode.compiled", 55, 3), ("decode.overflow", 20, 2))  # long ones, of the first shape alone


@dataclass(frozen=True)
class Item:
    shape: str
    case: Case
    seconds: float  # about how long it takes: with less left it is passed over
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.shape}/{self.case.name}"


def plan(shapes: Sequence[str]) -> list[Item]:
    """Everything at the first shape but what is long, everything at the others, and what is long."""
    items = [Item(shapes[0], CASES[name], seconds, rounds) for name, seconds, rounds in ORDER]
    for shape in shapes[1:]:
        items += [Item(shape, CASES[name], 3 + seconds / 3, rounds) for name, seconds, rounds in ORDER]
    short = {"decode.overflow": partial(decode.overflow, folds=1)}
    for name, seconds, rounds in LAST:
        case = CASES[name]
        case = Case(name, case.about, short.get(name, case.build), case.measure)
        items.append(Item(shapes[0], case, seconds, rounds))
    return items


class Journal:
    """One line per step in `check.jsonl`, written as soon as it ends."""

    def __init__(self, folder: Path, resume: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.entries = folder / "check.jsonl", list[dict[str, Any]]()
        if resume and self.path.exists():
            self.entries = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            if self.entries and self.entries[-1].get("status") == "began":
                self.add({**self.entries[-1], "status": "crashed", "reason": "the process ended in the middle of it"})
        else:
            self.path.write_text("", encoding="utf-8")
        if not self.entries:
            self.add({"step": "begin", "time": time.time()})
        self.began: float = self.entries[0]["time"]

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def has(self, step: str) -> bool:
        """Whether it has run; what was skipped has not."""
        return any(entry["step"] == step and entry.get("status") not in ("skipped", "began") for entry in self.entries)

    def elapsed(self) -> float:
        return time.time() - self.began


class TooLong(BaseException):  # not an Exception: what a case catches of its peers must not swallow it
    """A step took far longer than it should."""


@contextlib.contextmanager
def limited(seconds: float, hung: Callable[[], None], grace: float = 15.0) -> Iterator[None]:
    """TooLong in what runs inside after `seconds`; `hung()`, in a thread, if that does not end it either."""

    def stop(*_: Any) -> None:
        raise TooLong(f"stopped after {seconds:.3g} s")

    watchdog = threading.Timer(seconds + grace, hung)
    watchdog.daemon = True
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    watchdog.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watchdog.cancel()


class Check:
    """A run over the items of a plan.

    again: ends this process, so that another goes on with the rest, after what leaves the device unusable.
    rounds, seconds, patience: as of `bench`; rounds None: as the plan says.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path,
        minutes: float,
        again: Callable[[], None],
        resume: bool = False,
        rounds: int | None = None,
        seconds: float = 0.1,
        patience: float = 0.0,
    ):
        self.device, self.dtype, self.folder, self.budget, self.again = device, dtype, folder, minutes * 60, again
        self.rounds, self.seconds, self.patience = rounds, seconds, patience
        self.journal = Journal(folder, resume)
        self.bed: Bed | None = None
        self.ceiling: Ceiling | None = None
        self.run_facts: dict[str, Any] = {}

    def say(self, text: str) -> None:
        print(f"[{self.journal.elapsed():6.1f}] {text}", flush=True)

    def left(self) -> float:
        return self.budget - self.journal.elapsed()

    def tests(self, seconds: float, tests: Path) -> None:
        """The tests that use a GPU, in a process of their own, for a part of the time."""
        if self.journal.has("tests"):
            return
        self.say(f"tests: at most {seconds:.0f} s")
        found = run_tests(tests, self.folder / "tests.log", seconds, self.say)
        self.say(f"tests: {found['summary']}")
        self.journal.add({"step": "tests", **found})

    def items(self, items: Sequence[Item]) -> None:
        for item in items:
            if self.journal.has(item.name):
                continue
            if self.left() < item.seconds:
                self.say(f"{item.name}: skipped, {item.seconds:.0f} s do not fit into the {self.left():.0f} s left")
                self.journal.add({"step": item.name, "status": "skipped"})
                continue
            began = self.journal.elapsed()
            self.journal.add({"step": item.name, "case": item.case.name, "status": "began"})
            entry = self.guarded(item)
            entry["took"] = round(self.journal.elapsed() - began, 1)
            self.journal.add(entry)
            self.say(f"{item.name}: {entry['status']} in {entry['took']} s")
            for line in brief(entry) if entry["status"] in ("measured", "disturbed") else [entry["reason"]]:
                self.say(f"  {line}")
            records = [entry for entry in self.journal.entries if "device_type" in entry]
            if records:
                write_results(self.folder / "RESULTS.md", records)
            if entry["status"] == "crashed" and broken(self.device):
                self.say("the device does not answer any more: going on in a new process")
                self.again()

    def guarded(self, item: Item) -> dict[str, Any]:
        """The record of one item, whatever happens in it."""
        entry: dict[str, Any] = {
            "step": item.name,
            "case": item.case.name,
            "about": item.case.about,
            "status": "crashed",
        }
        entry["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

        def hung() -> None:
            self.journal.add({**entry, "reason": "hung: nothing ended it but the end of the process"})
            self.say(f"{item.name}: hung, going on in a new process")
            self.again()

        limit = min(max(self.left(), 1.0), 30 + 3 * item.seconds)
        try:
            with limited(limit, hung):
                bed = self.bed_of(item.shape)
                assert self.ceiling is not None
                entry |= self.run_facts
                rounds = self.rounds or item.rounds
                entry |= record.run_case(item.case, bed, self.ceiling, rounds, self.seconds, self.patience)
        except (Exception, TooLong) as error:
            lines = traceback.format_exception(error)
            entry["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            entry["traceback"] = "".join(lines[-6:])[-3000:]
            print(entry["traceback"], file=sys.stderr, flush=True)
            traceback.clear_frames(error.__traceback__)
            self.recover()
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
        return entry

    def recover(self) -> None:
        """After a crash: nothing of it may reach the next item."""
        if self.bed is not None:
            with contextlib.suppress(Exception):
                fw.detach(self.bed.model)

    def bed_of(self, shape: str) -> Bed:
        if self.bed is not None and self.bed.name == f"random {shape}":
            return self.bed
        self.bed = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"{shape}: making random weights")
        bed = record.make_bed(None, shape, self.dtype, self.device)
        if self.ceiling is None:
            self.say("measuring the ceilings")
            self.ceiling = Ceiling(self.device, self.dtype)
            self.found = self.ceiling.measure(3, Patience(0.0))
            self.say(ceilings({"ceiling": self.found}))
        self.run_facts = {"ceiling": self.found, **record.where(bed)}
        self.bed = bed
        return bed


def broken(device: torch.device) -> bool:
    """Whether the device is of no use to this process any more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        return float((torch.zeros(1, device=device) + 1)[0]) != 1
    except RuntimeError:
        return True


# ---- the end


def report(check: Check) -> tuple[list[str], dict[str, Any]]:
    """(a short table, the same as one JSON object: milliseconds of every trial)."""
    entries = {entry["step"]: entry for entry in check.journal.entries}
    facts = next((e for e in entries.values() if "versions" in e), {})
    versions = facts.get("versions", {})
    whole: dict[str, Any] = {key: facts.get(key) for key in ("device", "dtype", "commit", "versions")}
    whole |= {"seconds": round(check.journal.elapsed()), "budget": round(check.budget)}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"{facts.get('device')}, {facts.get('dtype')}, commit {facts.get('commit')}; {said}"]
    if "ceiling" in facts:
        lines.append(f"ceilings: {ceilings(facts)}")
        whole["ceiling"] = {key: value for key, value in facts["ceiling"].items() if not isinstance(value, dict)}
    if "tests" in entries:
        tests = entries["tests"]
        lines += [f"tests: {tests['summary']}", *(f"  {line[:180]}" for line in tests["failures"][:12])]
        whole["tests"] = {key: tests[key] for key in ("counts", "finished", "seconds")}
        whole["tests"]["failures"] = [line[:120] for line in tests["failures"][:12]]
    whole["cases"] = {}
    rest: dict[str, list[str]] = {"skipped": [], "crashed": [], "refused": [], "unavailable": []}
    for step, entry in entries.items():
        status = entry.get("status")
        if status in ("measured", "disturbed"):
            lines.append(step + (": " if status == "measured" else " (disturbed): ") + one_line(entry))
            whole["cases"][step] = {
                name: float(f"{trial['seconds']['median'] * 1e3:.4g}")
                for name, trial in entry["trials"].items()
                if name != entry.get("ceiling_trial")
            }
        elif status in rest:
            rest[status].append(step if status == "skipped" else f"{step}: {entry['reason'][:200]}")
    for status, steps in rest.items():
        whole[status] = steps
        if steps and status == "skipped":
            lines.append(f"skipped for time: {', '.join(steps)}")
        else:
            lines += [f"{status}: {step}" for step in steps]
    return lines, whole


def supervised(arguments: Sequence[str]) -> int:
    """Runs the check in a process of its own, and in another one what is left when that dies."""
    command = [sys.executable, "-m", "fastweights", "bench", *arguments, "--worker"]
    code = subprocess.run(command).returncode
    for _ in range(20):
        if code >= 0 and code != AGAIN:
            break
        print(f"the process ended with {code}: going on in a new one", flush=True)
        code = subprocess.run([*command, "--resume"]).returncode
    return code if code >= 0 else 1


@torch.no_grad()
def main(options: Any, arguments: Sequence[str]) -> int:
    """0; 1 when a test or a check failed or a step crashed."""
    for name in ("model", "json"):
        if getattr(options, name) is not None:
            raise ValueError(f"--check takes no --{name}: it runs random weights and writes {CHECK_FOLDER}/check.jsonl")
    if not 0 < options.minutes < float("inf"):
        raise ValueError(f"--minutes {options.minutes}: expected a number above 0")
    device = torch.device(options.device)
    folder = Path(options.out or CHECK_FOLDER)
    if not options.worker:
        return supervised(arguments)

    def again() -> None:
        sys.stdout.flush()
        os._exit(AGAIN)

    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers: they would fill the output
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = record.DTYPES[options.dtype] if options.dtype else DTYPES[device.type]
    given = {name: getattr(options, name) for name in ("seconds", "patience") if getattr(options, name) is not None}
    check = Check(device, dtype, folder, options.minutes, again, options.resume, options.repeats, **given)
    tests = Path(fw.__file__).resolve().parent.parent / "tests"
    if device.type != "cuda":
        check.say(f"tests: those of a GPU are left out on {device}")
    elif not options.no_tests:
        check.tests(0.35 * check.budget, tests)
    chosen = {case.name for case in record.select(options.case)}
    items = plan([options.shape] if options.shape else ["8b", "1b"])
    check.items([item for item in items if item.case.name in chosen])
    lines, whole = report(check)
    (folder / "check.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print()
    print("\n".join(lines))
    print(json.dumps(whole, ensure_ascii=False), flush=True)
    failed = whole["crashed"] or whole["refused"] or whole.get("tests", {}).get("failures")
    return 1 if failed else 0
