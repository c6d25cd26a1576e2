"""Many versions of one question in one batch: moments of the fast weights, alternatives of a sweep.

A lane is the question (B rows) under one moment and one alternative. Lanes that are the same so far are one lane: the
moments part at the first plastic layer, and an alternative joins at the first layer that it edits. So a layer runs for
as many rows as there are different streams in it.

Shape suffixes: B rows of the question, T tokens, T′ kept tokens, C columns of an exam, R rows of the batch, lane-major,
E states (ΔW of one linear) of the episode, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Positions
from .episode_state import Address, EpisodeState
from .model import Llama
from .passes import Pass
from .probes.places import Reading
from .probes.sites import Site
from .probes.taps import Bound, Look, Rows, Tap, Taps
from .state.moments import Moment

BEFORE = -1  # before the embedding, as a layer
NEVER = 1 << 30
Point = tuple[Site, int | None]


@dataclass(frozen=True)
class Question:
    """What is asked.

    ids [B, T] and positions are on the model's device. kept_BT: the columns whose sites (and logits) are kept, [B, T′];
    None: all. logit_BT: the columns whose logits are computed, [B, T″]; None: all.
    """

    ids_BT: Tensor
    positions: Positions
    reading: Reading
    points: list[Point]
    kept_BT: Tensor | None
    logit_BT: Tensor | None

    @property
    def width(self) -> int:
        """How many tokens are kept."""
        return self.ids_BT.shape[1] if self.kept_BT is None else self.kept_BT.shape[1]


@dataclass(frozen=True)
class Lane:
    """The question under one moment and one alternative; None: under all of them alike."""

    moment: int | None
    alternative: int | None


class Alternative:
    """One alternative of a sweep: its edits, and the layer before which it joins the batch."""

    def __init__(self, number: int, bounds: Sequence[Bound], depth: int, plastic: Iterable[Address]):
        self.number, self.bounds = number, bounds
        firsts = []
        for bound in bounds:
            site, layers = bound.site, bound.edit.places.layers
            if site.side == "plastic" and layers is None:
                layers = tuple(layer for layer, linear in plastic if linear == bound.edit.places.linear)
            if site.layered:
                firsts.append(0 if layers is None else min(layers))
            else:
                firsts.append(BEFORE if site.name == "embedding" else depth)
        self.joins = min(firsts, default=NEVER)


class Kept(Look):
    """A look that puts what lanes hold where it belongs: [M, N, B, T′, …] of each site and layer."""

    def __init__(self, question: Question, moments: int, alternatives: Sequence[Alternative], gradient: bool):
        self.question, self.gradient = question, gradient
        self.moments, self.alternatives = moments, alternatives
        self.lanes = [Lane(None, None)]  # of the rows that run now
        self.found: dict[Point, Tensor] = {}
        self.graph: dict[Point, tuple[Tensor, bool]] = {}

    def points(self, model: Llama) -> Iterable[tuple[Site, int | None]]:
        """The sites that it looks at, and their layers."""
        return self.question.points

    def see(self, site: Site, layer: int | None, x: Tensor, rows: Rows, column_RT: Tensor | None) -> None:
        """Copies the kept columns of each lane to where they belong."""
        narrow = column_RT is not None
        if self.gradient:
            self.graph[site, layer] = x, narrow
        self.put(self.found, (site, layer), x.detach(), narrow)

    def put(self, into: dict[Point, Tensor], point: Point, x: Tensor, narrow: bool) -> None:
        """Copies [R, T or T″, …] of each lane; narrow: it begins with the kept columns, instead of having all."""
        (site, layer), question = point, self.question
        axis = 3 if site.square else 2
        x = x.unflatten(0, (-1, len(question.ids_BT)))  # [lanes, B, …]
        if narrow:
            x = x.narrow(axis, 0, question.width)
        elif question.kept_BT is not None:
            shape = [1] * x.dim()
            shape[1], shape[axis] = question.kept_BT.shape
            sizes = list(x.shape)
            sizes[axis] = question.width
            x = x.gather(axis, question.kept_BT.view(shape).expand(sizes))
        if point not in into:
            into[point] = x.new_zeros(self.moments, max(1, len(self.alternatives)), *x.shape[1:])
        outside = BEFORE if site.name == "embedding" else NEVER - 1
        self.spread(into[point], x, outside if layer is None else layer)

    def spread(self, into: Tensor, x: Tensor, layer: int = NEVER - 1) -> None:
        """Copies what each lane holds in a layer (or at the end) to the moments and alternatives it stands for."""
        own = []  # lanes that stand for one moment and one alternative
        for number, lane in enumerate(self.lanes):
            one = lane.moment is not None or self.moments == 1
            if one and (lane.alternative is not None or not self.alternatives):
                own.append((number, lane.moment or 0, lane.alternative or 0))
                continue
            moments = slice(None) if lane.moment is None else slice(lane.moment, lane.moment + 1)
            if lane.alternative is not None or not self.alternatives:
                into[moments, lane.alternative or 0] = x[number]
            elif others := [other.number for other in self.alternatives if other.joins > layer]:
                into[moments][:, others] = x[number]
        if len(own) == 1:
            into[own[0][1:]] = x[own[0][0]]
        elif own:
            numbers, moments_, alternatives = map(list, zip(*own, strict=True))
            into[moments_, alternatives] = x[numbers]


class Runner:
    """Runs a question in lanes, batch by batch.

    Args:
        moments: None: the weights as they are now.
        edits: of every lane.
        gradient, whole: every lane runs from the embedding on, for gradients or for a hook on the whole model.
    """

    def __init__(
        self,
        model: Llama,
        state: EpisodeState,
        question: Question,
        moments: Sequence[Moment] | None,
        alternatives: Sequence[Alternative],
        edits: Sequence[Bound],
        gradient: bool,
        whole: bool,
    ):
        self.model, self.state, self.question, self.whole = model, state, question, whole
        self.depth, early = len(model.model.layers), gradient or whole
        plastic = min((layer for layer, _ in state.logs), default=self.depth)
        # the layer before which the moments part
        self.parts = NEVER if moments is None or len(moments) == 1 else BEFORE if early else plastic
        for alternative in alternatives if early else ():
            alternative.joins = BEFORE
        self.kept = Kept(question, 1 if moments is None else len(moments), alternatives, gradient)
        bounds = [*edits, *(bound for each in alternatives for bound in each.bounds)]
        self.tap = Tap(model, Taps(bounds, [self.kept]), self._rows())
        self.now = Pass(state.logs, question.positions.position_BT)
        self.named = [Moment()] if moments is None and alternatives else moments
        self.weights: dict[int, dict[Address, Tensor]] = {}  # of the moments of one batch
        # what is the same in all lanes runs once
        first = min([self.parts, *(one.joins for one in alternatives)], default=self.depth)
        self.low = BEFORE if early else min(first, self.depth)
        self.x_low: Tensor | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Edits, and keeps what is named, while batches run."""
        with self.model.binding.bound(self.now, self.state), self.tap.hooked():
            yield

    def batch(self, moments: Sequence[int], chosen: Sequence[Alternative]) -> Tensor:
        """Logits [R, T″, V] of these moments under these alternatives, or under none; `kept.lanes` says whose."""
        self.weights.clear()
        base = not chosen or any(one.joins == NEVER for one in chosen)
        stages = {one.joins for one in chosen} | {self.parts, self.low}
        layer, x_BTD = self.low, self._begin()
        for stage in sorted(stage for stage in stages if stage <= self.depth):
            if stage > layer:
                x_BTD = self._embedded() if x_BTD is None else x_BTD
                x_BTD, layer = self.model.model.blocks(x_BTD, self.there, start=max(layer, 0), stop=stage), stage
            x_BTD = self._lanes(self._at(stage, moments, chosen, base), x_BTD)
        if self.whole:
            ids_RT = self.question.ids_BT.repeat(len(self.kept.lanes), 1)
            return self._narrow(self.model(ids_RT, positions=self.there))
        x_BTD = self._embedded() if x_BTD is None else x_BTD
        return self._unembed(self.model.model.blocks(x_BTD, self.there, start=max(layer, 0)))

    def _embedded(self) -> Tensor:
        ids_RT = self.question.ids_BT.repeat(len(self.kept.lanes), 1)
        return self.model.model.embed(ids_RT, self.there.position_BT)

    def _begin(self) -> Tensor | None:
        """The stream before layer `low`, of one lane; None before the embedding."""
        self._set([Lane(None, None)])
        if self.low == BEFORE:
            return None
        if self.x_low is None:
            x_BTD = self.model.model.embed(self.question.ids_BT, self.there.position_BT)
            self.x_low = self.model.model.blocks(x_BTD, self.there, stop=self.low)
        return self.x_low

    def _at(self, stage: int, moments: Sequence[int], chosen: Sequence[Alternative], base: bool) -> list[Lane]:
        """The lanes that run from a layer on."""
        parted: Sequence[int | None] = moments if stage >= self.parts else [None]
        alternatives: list[int | None] = [one.number for one in chosen if one.joins <= stage]
        if base or any(one.joins > stage for one in chosen):  # from which others go off
            alternatives = [None, *alternatives]
        return [Lane(moment, alternative) for alternative in alternatives for moment in parted]

    def _lanes(self, lanes: list[Lane], x_BTD: Tensor | None) -> Tensor | None:
        """Goes on with other lanes, each from the one that it was part of."""
        before = self.kept.lanes
        if lanes == before:
            return x_BTD
        self._set(lanes)
        if x_BTD is None:
            return None
        sources = []
        for m, n in ((lane.moment, lane.alternative) for lane in lanes):
            able = [Lane(m, n), Lane(m, None), Lane(None, n), Lane(None, None)]
            sources.append(next(before.index(lane) for lane in able if lane in before))
        index = torch.tensor(sources, device=x_BTD.device)
        return x_BTD.unflatten(0, (len(before), -1))[index].flatten(0, 1)

    def _set(self, lanes: list[Lane]) -> None:
        self.kept.lanes = lanes
        self.tap.rows = self._rows()
        self.there = self.question.positions.repeat(len(lanes))
        if self.named is not None and self.state.logs:
            for moment in {lane.moment or 0 for lane in lanes} - self.weights.keys():
                self.weights[moment] = self._weights(self.named[moment])
            whose = [self.weights[lane.moment or 0] for lane in lanes]
            self.now.slot_weights = {a: torch.cat([w[a] for w in whose], dim=1) for a in self.state.logs}

    def _rows(self) -> Rows:
        lanes, rows = self.kept.lanes, len(self.question.ids_BT)
        numbers = [-1 if lane.alternative is None else lane.alternative for lane in lanes]
        alternative = torch.tensor(numbers, device="cpu")
        row_R = torch.arange(rows, device="cpu").repeat(len(lanes))
        device = self.question.ids_BT.device
        return Rows(self.question.reading, row_R, device, alternative_R=alternative.repeat_interleave(rows))

    def _weights(self, moment: Moment) -> dict[Address, Tensor]:
        """w of every linear at one moment: [E, 1, slots], or [1, B, slots] where one ΔW answers every question."""
        weights = {}
        for address, log in self.state.logs.items():
            w_E1R = torch.stack([moment.slot_weights(log, address, row)[None] for row in range(self.state.states)])
            weights[address] = w_E1R.repeat(1, len(self.question.ids_BT), 1) if self.state.states == 1 else w_E1R
        return weights

    def _column_RT(self) -> Tensor | None:
        """Which columns the logits are computed of, in each row."""
        column_BT = self.question.logit_BT
        return None if column_BT is None else column_BT.repeat(len(self.kept.lanes), 1)

    def _unembed(self, x_BTD: Tensor) -> Tensor:
        column_RT = self._column_RT()
        if column_RT is not None:
            self.tap.columns = {"final_norm": column_RT, "logits": column_RT}
        return self.model.unembed(self._narrow(x_BTD))

    def _narrow(self, x: Tensor) -> Tensor:
        """The columns whose logits are wanted, of [R, T, …]."""
        column_RT = self._column_RT()
        return x if column_RT is None else x.gather(1, column_RT[..., None].expand(-1, -1, x.shape[2]))
