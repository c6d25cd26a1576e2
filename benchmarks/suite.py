"""The tests that use a GPU, run by pytest in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_AFTER = re.compile(rf"^(\S+\.py::.+?) ({STATUS})(?:\s|$)")  # tests/test_a.py::test_b PASSED   [ 1%]
_BEFORE = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] )?({STATUS}) (\S+\.py::.+?)(?: - .*)?\s*$")  # side by side, summary


def gpu_tests(folder: Path) -> list[Path]:
    """The files of tests that look whether there is a GPU."""
    return [p for p in sorted(folder.glob("test_*.py")) if "cuda.is_available" in p.read_text("utf-8")]


def outcomes(log: str) -> dict[str, str]:
    """Test → its outcome, from pytest's output with -v, alone or side by side."""
    found = {}
    for line in log.splitlines():
        if match := _AFTER.match(line):
            found[match[1]] = match[2]
        elif match := _BEFORE.match(line):
            found[match[2]] = match[1]
    return found


def run_tests(folder: Path, log: Path, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs them for at most `seconds`; all output goes to `log`."""
    files = gpu_tests(folder) if folder.is_dir() else []
    if not files:
        summary = f"no tests that use a GPU in {folder}"
        return {"summary": summary, "counts": {}, "failures": [], "finished": False, "seconds": 0}
    workers = min(8, (os.cpu_count() or 1) // 2) if importlib.util.find_spec("xdist") else 0
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "-rfE", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-n", str(workers)] if workers > 1 else []
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(folder.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    began = time.monotonic()
    finished = False
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *(f"{folder.name}/{path.name}" for path in files)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=folder.parent,
            env=environment,
            start_new_session=True,
        )
        try:
            finished = _waited(process, seconds, log, say)
            if not finished:
                process.send_signal(signal.SIGINT)  # it still says what has failed
                _waited(process, 10, log, lambda _: None)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text("utf-8", errors="replace")
    counts = Counter(outcomes(text).values())
    failures = [line for line in text.splitlines() if re.match(r"(FAILED|ERROR) \S+\.py", line)]
    failures = list(dict.fromkeys(failures)) or [
        f"{outcome} {test}" for test, outcome in outcomes(text).items() if outcome in ("FAILED", "ERROR")
    ]
    if finished and not counts:
        failures = ["ERROR pytest ran no test: " + " ".join(text.splitlines()[-3:])[:300]]
    took = time.monotonic() - began
    said = ", ".join(f"{counts[key]} {key.lower()}" for key in sorted(counts)) or "no outcome"
    end = f"in {took:.0f} s" if finished else f"when stopped at {seconds:.0f} s: not all have run"
    names = ", ".join(path.name for path in files)
    return {
        "summary": f"{said} {end} ({names}; {max(workers, 1)} at a time)",
        "counts": dict(counts),
        "failures": failures,
        "finished": finished,
        "seconds": round(took),
    }


def _waited(process: subprocess.Popen, seconds: float, log: Path, say: Callable[[str], None]) -> bool:
    """Whether it ended within `seconds`; says every ten how far it is."""
    began = time.monotonic()
    while (left := seconds - (time.monotonic() - began)) > 0:
        try:
            process.wait(min(left, 10))
            return True
        except subprocess.TimeoutExpired:
            counts = Counter(outcomes(log.read_text("utf-8", errors="replace")).values())
            say(f"tests: {dict(counts)}")
    return process.poll() is not None
