"""Records as lines for people, and the page with the last run of every case on every device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .bed import SHAPES
from .cases import CASES


def duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _ratio(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f} to {values['max']:.3f})"


def table(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(heading, rows) of one measured case."""
    rows = []
    for name, trial in record["trials"].items():
        # of the ceiling's unit alone: decode is bytes, prefill is FLOPs
        unit, word = {"stream": ("bytes", "GB/s"), "matmul": ("flops", "GFLOP/s")}[
            record.get("ceiling_trial", "stream")
        ]
        rate = [f"{trial[f'G{unit}_per_s']:.1f} {word}"] if unit in trial else []
        share = [f"{v['median']:.0%} of {k[9:]}" for k, v in trial.items() if k.startswith("share_of_")]
        peak = [f"{trial['peak_bytes'] / 1e6:.0f} MB peak"] if "peak_bytes" in trial else []
        spread = trial["seconds"]
        times = [duration(spread[key]) for key in ("median", "min", "max")]
        rows.append([name, *times, ", ".join(rate + peak), ", ".join(share)])
    return ["", "median", "min", "max", "rate", "share"], rows


def verdict(record: dict[str, Any], bar: str) -> tuple[str, bool | None]:
    """(the figure a bar speaks of, whether it is met)."""
    figure = record["ratios"].get(bar)
    if figure is None and " share of " in bar:
        trial, _, ceiling = bar.partition(" share of ")
        figure = record["trials"].get(trial, {}).get(f"share_of_{ceiling}")
    sign, number = record["bars"][bar].split(maxsplit=1)
    if number.endswith(" ms") and bar in record["trials"]:
        value = record["trials"][bar]["seconds"]["median"] * 1e3
        return f"{value:.3g} ms", value <= float(number.removesuffix(" ms"))
    if figure is None:
        return "not measured", None
    limit = float(number.rstrip(" %")) / (100 if number.endswith("%") else 1)
    value = figure["median"]
    return f"{value:.3g}", value >= limit if sign == "≥" else value <= limit


def notes(record: dict[str, Any]) -> list[str]:
    """Ratios, bars, context and checks of one measured case, a line each."""
    lines = [f"{name}: {_ratio(values)}" for name, values in record["ratios"].items()]
    for name, spread in record.get("times", {}).items():
        median, low, high = (duration(spread[key]) for key in ("median", "min", "max"))
        lines.append(f"{name}: {median} ({low} to {high})")
    for bar, wanted in record["bars"].items() if record["status"] == "measured" else ():
        value, met = verdict(record, bar)
        lines.append(f"bar: {bar} {wanted}: {value}, {'met' if met else 'not met' if met is not None else '?'}")
    lines.append(", ".join(f"{key} {value}" for key, value in record["context"].items()))
    if record["checks"]:
        lines.append("checked: " + "; ".join(f"{name} (error {error:.1e})" for name, error in record["checks"].items()))
    return lines + record.get("kernels", [])


def one_line(record: dict[str, Any]) -> str:
    """Times, shares of the ceiling, and the figures that have a bar, of one measured case."""
    times, *_ = brief(record)
    held = [(bar, wanted, *verdict(record, bar)) for bar, wanted in record["bars"].items()]
    bars = [f"[{bar} {value}, bar {wanted}, {'met' if met else 'NOT MET'}]" for bar, wanted, value, met in held]
    return " ".join([times, *bars])


def brief(record: dict[str, Any]) -> list[str]:
    """One measured case in a few lines: times and shares, ratios, bars, the heaviest kernels."""
    top = record.get("ceiling_trial")
    parts = []
    for name, trial in record["trials"].items():
        share = trial.get(f"share_of_{top}")
        parts += [f"{name} {duration(trial['seconds']['median'])}" + (f" {share['median']:.0%}" if share else "")]
    lines = ["; ".join(parts) + (f" (shares of {top})" if top else "")]
    if record["ratios"]:
        lines.append("; ".join(f"{name} {values['median']:.3f}" for name, values in record["ratios"].items()))
    for bar, wanted in record["bars"].items():
        value, met = verdict(record, bar)
        lines.append(f"bar: {bar} {wanted}: {value}, {'met' if met else 'not met' if met is not None else '?'}")
    if "kernels" in record:
        lines.append(f"{record['context']['kernels']} kernels; " + "; ".join(k[:60] for k in record["kernels"][:4]))
    return lines


def ceilings(run: dict[str, Any]) -> str:
    found = run["ceiling"]
    threads = ", ".join(f"{n} threads {rate:.1f}" for n, rate in found["stream_GBps_by_threads"].items())
    stream = f"read stream of {found['stream_buffer_MB']} MB {found['stream_GBps']:.1f} GB/s" + (
        f" ({threads})" if threads else f" (torch.sum {found['sum_GBps']:.1f})" if "sum_GBps" in found else ""
    )
    return f"{stream}; {found['matmul_size']}³ matmul {found['matmul_GFLOPs']:.0f} GFLOP/s"


# ---- the page

INTRO = """# Results

The last run of every case on every device. Written by `fastweights bench --out benchmarks/RESULTS.md` from
`RESULTS.jsonl`; not edited by hand. Every case was checked against its reference in the same run before it was
timed. Times are per token for decode, per prompt for prefill, per probe (all its moments) for reads; trials ran in
alternation, shares and ratios are medians over the rounds, of figures of the same round, with the lowest and highest in
brackets. `+` after a commit: the library differed from it.
"""


def write_results(path: Path, records: list[dict[str, Any]]) -> None:
    """Adds this run's records to the .jsonl beside `path`, the last of each case counting, and writes the page."""
    store = path.with_suffix(".jsonl")
    kept: dict[tuple, dict[str, Any]] = {}
    old = [json.loads(line) for line in store.read_text(encoding="utf-8").splitlines()] if store.exists() else []
    for record in [*old, *records]:
        key = tuple(record[key] for key in ("device", "model", "dtype", "case"))
        if record["status"] != "disturbed" or key not in kept:  # a disturbed run says nothing new
            kept[key] = record
    lines = [json.dumps(record, ensure_ascii=False) for record in kept.values()]
    store.write_text("\n".join(lines) + "\n", encoding="utf-8")
    path.write_text(page(list(kept.values())), encoding="utf-8")


def page(records: list[dict[str, Any]]) -> str:
    parts = [INTRO]
    for group in dict.fromkeys((r["device"], r["model"], r["dtype"]) for r in records):
        mine = {r["case"]: r for r in records if (r["device"], r["model"], r["dtype"]) == group}
        device, model, dtype = group
        parts.append(f"## {device}: {model}, {dtype}\n")
        missing = [f"{name} (not run)" for name in CASES if name not in mine]
        for record in mine.values():
            if record["status"] == "measured":
                parts.append(_section(record))
            else:
                missing.append(f"{record['case']} ({record['status']}: {record['reason']})")
        newest = max(mine.values(), key=lambda record: record["time"])["commit"]
        older = [f"{r['case']} ({r['commit']})" for r in mine.values() if r["commit"] != newest]
        if older:
            parts.append(f"**Not run again at {newest}, the last commit run here:** {', '.join(older)}.\n")
        if missing:
            parts.append("**Not measured here:** " + "; ".join(missing) + ".\n")
    unseen = [name for name in SHAPES if not any(r["model"] == f"random {name}" for r in records)]
    if unseen := [name for name in unseen if name not in ("135m", "tiny")]:
        parts.append(f"**Not measured on any device:** the shapes {', '.join(unseen)} with random weights.\n")
    if not any(r["device_type"] == "cuda" for r in records):
        parts.append(
            "## CUDA\n\n**Not measured: no GPU has run this.** "
            "That is every case above on a GPU, and with it every GPU bar ("
            "frozen decode ≥ 83 % of a read-only stream at 8B shape in bfloat16; plastic ÷ frozen ≤ 1.01 with 3 "
            "layers and ≤ 1.03 with all; prefill of 2048 tokens ≤ 1.08; the experiment ≥ 30 times a hook loop).\n"
        )
    return "\n".join(parts)


def _section(record: dict[str, Any]) -> str:
    heading, rows = table(record)
    lines = [f"### {record['case']}", "", f"{record['about']}.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (heading, ["---"] * len(heading), *rows)]
    lines += ["", *(f"- {line}" for line in notes(record))]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    state = f"commit {record['commit']}, {record['threads']} threads, {record['repeats']} rounds"
    lines.append(f"- {record['time']}, {state}; {versions}")
    lines.append(f"- ceilings of that run: {ceilings(record)}")
    return "\n".join(lines) + "\n"
