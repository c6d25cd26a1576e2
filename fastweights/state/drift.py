"""The drift report: what changed, where, and how much of it the capacity lost. From the factors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from .compress import effective_rank
from .log import EventLog


@dataclass(frozen=True)
class LinearDrift:
    """How far one linear has moved in one row of an episode.

    events: written so far; `forgotten` of them have left a ring ("evict").
    norm, relative, norm_2: ‖ΔW‖_F, ‖ΔW‖_F / ‖W‖_F, ‖ΔW‖₂.
    effective_rank: exp of the entropy of ΔW's normalised singular values.
    slots, capacity: in use, and there are.
    error_2, error_F: bounds on ‖ΔW_exact − ΔW‖, see `EventLog.certificate`; `lost` = error_F / ‖ΔW‖_F.
    scaled: events after which the budget scaled ΔW.
    bytes: of this row's buffers, the archive's included.
    event_norms: ‖u‖ ‖k‖ of every event as it was written, NaN where a fold or a ring has swallowed it.
    """

    name: str
    layer: int
    linear: str
    row: int
    events: int
    forgotten: int
    norm: float
    relative: float
    norm_2: float
    effective_rank: float
    slots: int
    capacity: int
    error_2: float
    error_F: float
    lost: float
    scaled: int
    bytes: int
    event_norms: list[float]

    @property
    def largest_event(self) -> int | None:
        """The number (from 1) of the largest event that is still known by itself."""
        known = [(norm, -n) for n, norm in enumerate(self.event_norms, 1) if not math.isnan(norm)]
        return -max(known)[1] if known else None

    def to_dict(self) -> dict:
        """Plain JSON values; None where a number is not finite."""

        def plain(value):
            return None if isinstance(value, float) and not math.isfinite(value) else value

        values = {key: plain(value) for key, value in asdict(self).items()}
        norms = [plain(norm) for norm in self.event_norms]
        return {**values, "event_norms": norms, "largest_event": self.largest_event}


@dataclass(frozen=True)
class Drift:
    """One entry per plastic linear and row of an episode, in the order of the forward pass; prints worst first."""

    rows: list[LinearDrift]

    def to_list(self) -> list[dict]:
        return [row.to_dict() for row in self.rows]

    def __str__(self) -> str:
        if not self.rows:
            return "no plastic linears: nothing can drift"
        several = max(each.row for each in self.rows) > 0
        lines = [["linear", *["row"] * several, "events", "‖ΔW‖/‖W‖", "‖ΔW‖", "‖ΔW‖₂", "rank", "slots"]]
        lines[0] += ["lost ≤", "scaled", "largest event"]
        # to the digits that can be seen: a budget holds several at one limit, but for rounding
        ordered = sorted(self.rows, key=lambda each: -float(f"{each.relative:.4g}"))
        for each in ordered:
            number = each.largest_event
            largest = "" if number is None else f"{each.event_norms[number - 1]:.3g} (#{number})"
            line = [each.name, *[str(each.row)] * several, str(each.events), f"{each.relative:.3%}", f"{each.norm:.4g}"]
            line += [f"{each.norm_2:.4g}", f"{each.effective_rank:.1f}", f"{each.slots}/{each.capacity}"]
            lines.append([*line, f"{each.lost:.2%}", str(each.scaled), largest])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line in lines:
            cells = zip(line[1:], widths[1:], strict=True)
            text.append("  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in cells)]).rstrip())
        return "\n".join([*text, self._verdict(ordered[0])])

    def _verdict(self, most: LinearDrift) -> str:
        mebibytes = sum(each.bytes for each in self.rows) / 2**20
        if not most.norm:
            return f"Nothing has changed. The logs take {mebibytes:.1f} MiB."
        where = f"{most.name} changed most, by {most.relative:.3%} of ‖W‖"
        worst = max(self.rows, key=lambda each: each.lost)
        lost = "the capacity has lost nothing"
        if worst.lost:
            lost = f"the capacity lost at most {worst.lost:.2%} of ‖ΔW‖ ({worst.name})"
        if forgotten := max(each.forgotten for each in self.rows):
            lost = f"up to {forgotten} of {max(each.events for each in self.rows)} events are forgotten"
        return f"{where};\n{lost}. The logs take {mebibytes:.1f} MiB."


def drift(logs: Mapping[tuple[int, str], EventLog], weight_norms: Mapping[tuple[int, str], float]) -> Drift:
    """The drift of every log and row; `weight_norms` has each linear's ‖W‖_F."""
    rows = []
    for (layer, linear), log in logs.items():
        for row, events in enumerate(log.event_counts):
            sigma_R = log.spectrum(row)
            norm, weight, (error_2, error_F) = float(sigma_R.norm()), weight_norms[layer, linear], log.certificate(row)
            rows.append(
                LinearDrift(
                    name=log.name,
                    layer=layer,
                    linear=linear,
                    row=row,
                    events=events,
                    forgotten=log.slots.oldest_event(events) if log.overflow == "evict" else 0,
                    norm=norm,
                    relative=norm / weight if weight else math.inf if norm else 0.0,
                    norm_2=float(sigma_R[:1].sum()),
                    effective_rank=effective_rank(sigma_R),
                    slots=log.slots.filled(events),
                    capacity=log.capacity,
                    error_2=error_2,
                    error_F=error_F,
                    lost=error_F / norm if norm else math.inf if error_F else 0.0,
                    scaled=log.scaled[row],
                    bytes=log.bytes // len(log.event_counts),
                    event_norms=log.event_norms(row).tolist(),
                )
            )
    return Drift(rows)
