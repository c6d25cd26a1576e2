"""fastweights bench: checks, then times in alternation, and says how far from the ceiling.

A table for people while it runs, one JSON line per case for machines (--json), and a page with the last run of
every case on every device (--out).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .bed import SHAPES
from .cases import CASES
from .check import main as check
from .measure import Ceiling, Patience
from .record import DTYPES, make_bed, run_case, select, where
from .results import ceilings, notes, table, write_results


@torch.no_grad()
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
        return check(options, arguments)
    chosen = select(options.case)
    repeats = 10 if options.repeats is None else options.repeats
    seconds = 0.25 if options.seconds is None else options.seconds
    patience = 60.0 if options.patience is None else options.patience
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
