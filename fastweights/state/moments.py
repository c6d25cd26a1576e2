"""Which weights a probe sees: after some event, without some events, in some layers, or as a difference."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from .log import EventLog


@dataclass(frozen=True)
class Moment:
    """The fast weights as one probe is to see them: ΔW = Σ_j w_j u_j k_jᵀ with other w.

    Events are numbered from 1; moment n is the state after event n, moment 0 the untouched model.

    Args:
        events: the moment; None = now.
        without: events left out, as if never written (later decay still counts them).
        scale: event → factor on it.
        minus: another moment whose ΔW is subtracted: the model sees W + ΔW_events − ΔW_minus.
        layers, linears: only these are plastic; None = all.

    Example:
        episode.probe(ids, at=[fw.Moment(without=[n]) for n in range(1, episode.events + 1)])
    """

    events: int | None = None
    without: Sequence[int] = ()
    scale: Mapping[int, float] = field(default_factory=dict)
    minus: int | None = None
    layers: Sequence[int] | None = None
    linears: Sequence[str] | None = None

    def slot_weights(self, log: EventLog, address: tuple[int, str], row: int, where: str = "probe(at=...)") -> Tensor:
        """w of every slot of one linear and row, [slots]; `where` names the call in a refusal."""
        latest = log.event_counts[row]
        w_R = log.weights_at([latest if self.events is None else min(self.events, latest)], row)[0]
        if self.minus is not None:
            w_R = w_R - log.weights_at([min(self.minus, latest)], row)[0]
        here = (self.layers is None or address[0] in self.layers) and (
            self.linears is None or address[1] in self.linears
        )
        if not here:
            return torch.zeros_like(w_R)
        named = [*self.without, *self.scale]
        if named and min(named) <= log.oldest_event(row):
            raise ValueError(
                f"{where} names event {min(named)}, but the oldest that {log.name} keeps by itself in row {row} "
                f"is {log.oldest_event(row) + 1} (overflow={log.overflow!r}; attach with archive=True)"
            )
        number_R = log.moment_factors()[3][row] + 1
        for event, factor in [*((event, 0.0) for event in self.without), *self.scale.items()]:
            w_R = torch.where(number_R == event, w_R * factor, w_R)
        return w_R

    def check(self, latest: int, addresses: Collection[tuple[int, str]], where: str = "probe(at=...)") -> None:
        """Refuses events that have not happened (`latest` events have), and layers and linears that are not plastic."""
        for name, wanted, n in (("layer", self.layers, 0), ("linear", self.linears, 1)):
            plastic = sorted({address[n] for address in addresses}, key=str)
            for one in () if wanted is None else wanted:
                if one not in plastic:
                    raise ValueError(f"{where} names {name} {one!r}, but plastic are {plastic}")
        for event in (self.events, self.minus, *self.without, *self.scale):
            if event is not None and (isinstance(event, bool) or not isinstance(event, int)):
                raise ValueError(f"{where} names event {event!r}: expected a whole number")
            if event is not None and not 0 <= event <= latest:
                raise ValueError(f"{where} names event {event}, but this episode has events 0 to {latest}")
        if 0 in self.without or 0 in self.scale:
            raise ValueError(f"{where} leaves out or scales event 0: events are numbered from 1")


At = str | int | Moment | Sequence[int | Moment] | Tensor


def moments(at: At, latest: int, addresses: Collection[tuple[int, str]]) -> list[Moment]:
    """The moments that `at` names: "every", an event number or Moment, or a list of them."""
    if isinstance(at, str) and at == "every":
        return [Moment(events=n) for n in range(latest + 1)]
    if hasattr(at, "tolist"):  # a tensor, an array or a number of either
        at = at.tolist()
    if isinstance(at, (int, Moment)) and not isinstance(at, bool):
        at = [at]
    if isinstance(at, str) or not isinstance(at, Sequence) or not len(at):
        raise ValueError(f"probe(at={at!r}): expected 'now', 'every', or a list of event numbers and fw.Moment, or one")
    named = cast(Sequence[int | Moment], at)
    wanted = [moment if isinstance(moment, Moment) else Moment(events=moment) for moment in named]
    for moment in wanted:
        moment.check(latest, addresses)
    return wanted


def delta_norms(logs: Mapping[tuple[int, str], EventLog], events: Sequence[int], row: int) -> Tensor:
    """‖ΔW‖_F over all linears together after each of `events`, [M] float64, from the factors alone.

    ‖Σ_j w_j u_j k_jᵀ‖² = Σ_ij w_i w_j (u_i·u_j)(k_i·k_j).
    """
    square_M = torch.zeros(len(events), dtype=torch.float64, device="cpu")
    for address, log in logs.items():
        U_RO, K_RI = (factor[row].double() for factor in log.moment_factors()[:2])
        w_MR = torch.stack([Moment(n).slot_weights(log, address, row) for n in events]).double()
        square_M += (w_MR @ ((U_RO @ U_RO.T) * (K_RI @ K_RI.T)) * w_MR).sum(1).cpu()
    return square_M.clamp(min=0).sqrt()
