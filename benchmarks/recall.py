"""Associative recall on one plastic linear by itself: what the rules and the rank policies remember.

    python -m fastweights.benchmarks.recall [--picture recall.png] [--json]

N random keys are written with a value each, then all of them again, in another order, with new values (the shape of
Schlag et al. 2021, arXiv 2102.11174, §6.1, where the sum rule cannot overwrite a key). The frozen weight is zero, so
that what is read is ΔW k. Rows of one episode are independent streams.
Shape suffixes: B streams, N keys, T writes (2 N), I in, O out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastweights as fw
from fastweights.activations import phi_of
from fastweights.kernels.read import read
from fastweights.numbers import as_float
from fastweights.report import canvas
from fastweights.rules import Local, Rule, event, value_of
from fastweights.state import EventLog
from fastweights.state.events import Events
from fastweights.state.reads import Reads

KEYS = (5, 10, 20, 40, 80, 160)
WIDTH, RANK, STREAMS = 64, 32, 8
POLICIES = ("compress", "evict", "grow")


@dataclass(frozen=True, eq=False)
class Sum(fw.Delta):
    """Add a given v* whatever is there: value = β v*, the sum of outer products."""

    def value(self, a: Tensor, z: Tensor, at: Local) -> Tensor:
        return super().value(torch.zeros_like(a), z, at)


RULES: dict[str, Any] = {
    "sum": lambda target: Sum(1.0, target, mu=0.0),
    "sum, decay 0.02": lambda target: Sum(1.0, target, mu=0.0, decay=0.02),
    "delta, β 0.5": lambda target: fw.Delta(0.5, target, mu=0.0),
    "delta, β 1": lambda target: fw.Delta(1.0, target, mu=0.0),
}


class Stream(NamedTuple):
    """Keys and values, all of length 1, and which key each write takes: every key once, then every key again."""

    keys_BNI: Tensor
    values_BTO: Tensor
    key_BT: Tensor

    @property
    def written_BTI(self) -> Tensor:
        return self.keys_BNI.gather(1, self.key_BT[..., None].expand(-1, -1, self.keys_BNI.shape[-1]))

    @property
    def last_BN(self) -> Tensor:
        """The write that gave each key its value that counts."""
        return self.key_BT.shape[1] // 2 + self.key_BT[:, self.key_BT.shape[1] // 2 :].argsort(1)


def stream(count: int, width: int = WIDTH, streams: int = STREAMS, seed: int = 0) -> Stream:
    generator = torch.Generator().manual_seed(1000 * seed + count)
    keys_BNI = F.normalize(torch.randn(streams, count, width, generator=generator), dim=-1)
    values_BTO = F.normalize(torch.randn(streams, 2 * count, width, generator=generator), dim=-1)
    orders = [torch.randperm(count, generator=generator) for _ in range(2 * streams)]
    return Stream(keys_BNI, values_BTO, torch.stack(orders).view(streams, 2 * count))


def written(one: Stream, rule: Rule, overflow: str, rank: int) -> EventLog:
    """A log after the stream's writes, each of which reads it first; with every event in its archive."""
    h_BTI, (B, T, O) = one.written_BTI, one.values_BTO.shape
    size = (B, O, h_BTI.shape[-1], rank)
    log = EventLog("recall", *size, overflow, as_float(rule.decay), h_BTI.dtype, h_BTI.device, archive=True)
    phi, row_B1 = phi_of("identity"), torch.arange(B)[:, None]
    for t in range(T):
        h_B1I = h_BTI[:, t : t + 1]
        a_B1O = recalled(log, h_B1I)
        at = Local(torch.zeros_like(a_B1O), phi, torch.full((B, 1), t), row_B1)
        u, k, bias = event(rule, h_B1I, value_of(rule, a_B1O, phi, at), row_B1)
        log.write(Events(u, k, bias, torch.ones(B, 1, dtype=torch.bool)))
    return log


def recalled(log: EventLog, h_BTI: Tensor) -> Tensor:
    """ΔW h, [B, T, O]."""
    return read(h_BTI, *Reads.of(log), "torch")


def scores(one: Stream, read_BNO: Tensor, last: int | None = None) -> dict[str, float]:
    """Of what every key reads: how often the nearest of all values is the one it was given last, how often the one it
    had before, and ‖read − value‖ / ‖value‖; of the `last` keys written alone, if asked."""
    last_BN = one.last_BN
    first_BN = one.key_BT[:, : last_BN.shape[1]].argsort(1)
    nearest_BN = (read_BNO @ one.values_BTO.mT).argmax(-1)
    value_BNO = one.values_BTO.gather(1, last_BN[..., None].expand_as(read_BNO))
    away_BN = (read_BNO - value_BNO).norm(dim=-1)
    chosen_BN = last_BN >= (0 if last is None else one.key_BT.shape[1] - last)
    measures = {"right": nearest_BN == last_BN, "old": nearest_BN == first_BN, "error": away_BN}
    return {name: float(x_BN[chosen_BN].double().mean()) for name, x_BN in measures.items()}


def least_squares(one: Stream) -> Tensor:
    """What the best linear map for the last values reads: what no rule can exceed in squared error."""
    last_BNO = one.values_BTO.gather(1, one.last_BN[..., None].expand(-1, -1, one.values_BTO.shape[-1]))
    keys = one.keys_BNI.double()
    return (keys @ (torch.linalg.pinv(keys) @ last_BNO.double())).float()


def bounds(log: EventLog) -> dict[str, float]:
    """The mean over rows of ‖ΔW_exact − ΔW‖ / ‖ΔW_exact‖ in both norms, and of the certificates' over the same."""
    assert log.archive is not None or log.overflow == "grow"
    found: dict[str, list[float]] = {"error_2": [], "error_F": [], "bound_2": [], "bound_F": []}
    for row in range(len(log.event_counts)):
        exact = log.every.delta_weight(row, torch.float64)
        apart = exact - log.delta_weight(row, torch.float64)
        for name, order, bound in zip("2F", (2, "fro"), log.certificate(row), strict=True):
            size = float(torch.linalg.matrix_norm(exact, order))
            found[f"error_{name}"].append(float(torch.linalg.matrix_norm(apart, order)) / size)
            found[f"bound_{name}"].append(bound / size)
    return {name: sum(values) / len(values) for name, values in found.items()}


def measure(
    keys: Sequence[int] = KEYS, width: int = WIDTH, rank: int = RANK, streams: int = STREAMS
) -> dict[str, dict[str, dict[int, dict[str, float]]]]:
    """rules: with every event kept, {rule: {N: scores}}; policies: of delta and sum writes, {rule policy: {N: …}}."""
    rules: dict[str, dict[int, dict[str, float]]] = {}
    policies: dict[str, dict[int, dict[str, float]]] = {}
    for count in keys:
        one = stream(count, width, streams)
        for name, rule in RULES.items():
            log = written(one, rule(one.values_BTO), "grow", rank)
            rules.setdefault(name, {})[count] = scores(one, recalled(log, one.keys_BNI))
        rules.setdefault("least squares", {})[count] = scores(one, least_squares(one))
        for name in ("delta, β 1", "sum"):
            for policy in POLICIES:
                log = written(one, RULES[name](one.values_BTO), policy, rank)
                read_BNO = recalled(log, one.keys_BNI)
                late = scores(one, read_BNO, min(count, rank // 2))
                found = {**scores(one, read_BNO), **{f"late {key}": value for key, value in late.items()}}
                policies.setdefault(f"{name}, {policy}", {})[count] = {**found, **bounds(log)}
    return {"rules": rules, "policies": policies}


# ---- for people


def lines(found: dict[str, Any], rank: int = RANK) -> list[str]:
    """Tables in Markdown."""
    keys = [*next(iter(found["rules"].values()))]
    head = ["| | " + " | ".join(f"N = {n}" for n in keys) + " |", "|---" * (len(keys) + 1) + "|"]

    def table(title: str, part: str, cell: Any, leaving: str = "–") -> list[str]:
        chosen = {name: by for name, by in found[part].items() if leaving not in name}
        rows = ["| ".join([f"| {name} ", *(f"{cell(by[n])} " for n in keys)]) + "|" for name, by in chosen.items()]
        return ["", title, "", *head, *rows]

    return [
        *table(
            f"Right (old) answers of all keys, {WIDTH} inputs, every event kept:",
            "rules",
            lambda s: f"{s['right']:.0%} ({s['old']:.0%})",
        ),
        *table("Distance from the value that was written, relative:", "rules", lambda s: f"{s['error']:.2f}"),
        *table(
            f"Logs of rank {rank}: right answers of all keys, of the last {rank // 2}:",
            "policies",
            lambda s: f"{s['right']:.0%}, {s['late right']:.0%}",
        ),
        *table(
            "‖ΔW_exact − ΔW‖₂ / ‖ΔW_exact‖₂, and its certificate; exact is the sum of all events:",
            "policies",
            lambda s: f"{s['error_2']:.2f}, {s['bound_2']:.2f}",
            leaving="evict",  # whose certificate speaks of the window alone
        ),
    ]


def picture(found: dict[str, Any], path: Path, width: int = WIDTH, rank: int = RANK) -> None:
    with canvas.style():
        fig = canvas.figure(9.6, 3.6)
        left, middle, right = fig.subplots(1, 3)
        for n, (name, by) in enumerate(found["rules"].items()):
            colour = canvas.INK if name == "least squares" else canvas.COLOURS[n]
            shares = [100 * s["right"] for s in by.values()]
            left.plot([*by], shares, color=colour, lw=1.6, marker="o", markersize=3, label=name)
        for n, policy in enumerate(POLICIES):
            by, look = found["policies"][f"delta, β 1, {policy}"], {"lw": 1.6, "marker": "o", "markersize": 3}
            middle.plot([*by], [100 * s["right"] for s in by.values()], color=canvas.COLOURS[n], label=policy, **look)
            middle.plot([*by], [100 * s["late right"] for s in by.values()], color=canvas.COLOURS[n], ls=":", lw=1.2)
            right.plot([*by], [s["error_F"] for s in by.values()], color=canvas.COLOURS[n], label=policy, **look)
        by = found["policies"]["delta, β 1, compress"]
        right.plot([*by], [s["bound_F"] for s in by.values()], color=canvas.COLOURS[0], ls="--", label="certificate")
        left.set(title="Rules, every event kept", ylabel="right answers (%)")
        left.axvline(width, color=canvas.INK, lw=0.8, ls=":")
        middle.set(title=f"Policies at rank {rank}, delta", ylabel=f"right (%); dotted: the last {rank // 2} keys")
        right.set(title="What the log lost", ylabel="‖ΔW_exact − ΔW‖ / ‖ΔW_exact‖ (F)")
        for axes in (left, middle, right):
            axes.set_xscale("log")
            axes.set_xticks([*by], [str(n) for n in by], fontsize=canvas.TICK)
            axes.minorticks_off()
            axes.set_xlabel("keys, each written twice")
            axes.grid(axis="y")
            axes.tick_params(labelsize=canvas.TICK, length=2)
            axes.legend()
        canvas.save(fig, path)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="recall", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw it: .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    found = measure()
    print("\n".join(lines(found)[1:]))
    if options.picture:
        picture(found, options.picture)
    if options.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
