"""Learning a rule: AdamW over lives on texts, the gradient through every read and write of a life.

    loss of a life = mean over its tokens of −log p(x_t | x_<t, ΔW),    ΔW of the events on x_s, s < t

The model's own weights stay as they are. Shape suffixes: B lives at a time, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attach import attach, detach
from .episode import Episode
from .files import write_tensors
from .inputs import Ids, tokens
from .learned import Learned
from .model import Llama
from .plastic import plastic_linears
from .progress import bar
from .rules import Rule
from .snapshot import fingerprint

FORMAT = "fastweights learning 1"
STATE = "state.safetensors"


@dataclass(frozen=True)
class Learning:
    """What `learn` returns.

    rule: with the parameters that were best on held-out text; without such text the last.
    losses: of the lives of every step, before it is made, nats per token.
    held_out: {step: loss}, from step 0, the rule as it was set by hand.
    frozen: the loss of the frozen model on the same held-out lives; None without such text.
    step: the step of `rule`.
    stopped: whether it ended early, because `patience` evaluations brought nothing better.
    """

    rule: Learned
    losses: list[float]
    held_out: dict[int, float] = field(default_factory=dict)
    frozen: float | None = None
    step: int = 0
    stopped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        names = ("losses", "held_out", "frozen", "step", "stopped")
        return {name: getattr(self, name) for name in names} | {"rule": repr(self.rule)}


def learn(
    model: Llama,
    texts: Sequence[Ids],
    rule: Rule | Learned,
    layers: int | Sequence[int] | str | None = None,
    linears: str | Sequence[str] | None = None,
    *,
    per: str = "neuron",
    modulated: bool = True,
    held_out: Sequence[Ids] = (),
    length: int = 256,
    feed: int | None = None,
    carry: int | None = None,
    lives: int = 1,
    steps: int = 200,
    lr: float = 0.02,
    weight_decay: float = 0.0,
    seed: int = 0,
    every: int = 20,
    patience: int = 5,
    samples: int = 8,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Learning:
    """Learns the numbers of a rule on texts, the model's own weights as they are.

    A step reads `lives` spans of the texts, each with empty fast weights, and moves the parameters by AdamW.

    Args:
        texts: ids of each text, as tokenizer.encode gives them; of length + 1 or more.
        rule: what it begins as: a rule set by hand, see `Learned`, or a learned one, of which a copy goes on.
        layers, linears: as in `attach`; of a learned rule they are its own.
        per, modulated: as in `Learned`.
        held_out: texts that are not learned from: `samples` lives at even distances in all of them are measured every
            `every` steps, from step 0. They choose the parameters, and end it after `patience` of them without a gain.
        length: tokens of a life.
        feed: tokens of one feed; None: length.
        carry: feeds whose events a gradient goes through, together; None: all of a life.
        lives: spans in one batch.
        lr, weight_decay: AdamW's; all parameters are of the order of 1.
        seed: of the spans that are drawn, step by step.
        out: a folder for the rule, as `Learned.save` writes it, and for the state, every `every` steps and at the end.
            A folder with a state goes on from there, bit for bit as without the interruption.
        progress: called as (steps done, steps). None: a bar on stderr if that is a terminal.

    Raises:
        ValueError: before the model is touched, for what does not fit, and for a folder of another run; while it
            learns, for an event or a gradient that is not finite. The model is as it was afterwards, whatever happens.

    Example:
        found = fw.learn(model, train_ids, fw.Hebbian(1e-4), [11, 12, 13], held_out=held_out_ids, out="learned")
        fw.attach(model, found.rule.layers, found.rule, found.rule.linears)
    """
    if plastic_linears(model):
        raise ValueError("learn() got a model that is already plastic: fw.detach(model) first")
    for name, number, most in (
        ("length", length, model.config.max_position_embeddings),
        ("feed", length if feed is None else feed, length),
        ("carry", 1 if carry is None else carry, None),
        ("lives", lives, None),
        ("steps", steps, None),
        ("every", every, None),
        ("patience", patience, None),
        ("samples", samples, None),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1 or (most and number > most):
            raise ValueError(
                f"learn({name}={number!r}): expected a whole number from 1" + (f" to {most}" if most else "")
            )
    for name, rate in (("lr", lr), ("weight_decay", weight_decay)):
        if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
            raise ValueError(f"learn({name}={rate!r}): expected a number from 0")
    if held_out and steps % every:
        raise ValueError(
            f"learn(steps={steps}, every={every}): expected a multiple, so that it ends with a measurement"
        )
    spans, kept = (_texts(model, given, length, name) for given, name in ((texts, "texts"), (held_out, "held_out")))
    if not spans:
        raise ValueError("learn() got no texts")
    if isinstance(rule, Learned):
        if layers is not None or linears is not None:
            raise ValueError("learn() got layers or linears with a learned rule, which has its own")
        learned = copy.deepcopy(rule)
    elif layers is None:
        raise ValueError("learn() got no layers")
    else:
        learned = Learned.of(model, rule, layers, linears, per=per, modulated=modulated)
    settings: dict[str, Any] = {"length": length, "feed": feed, "carry": carry, "lives": lives, "lr": lr}
    settings |= {"weight_decay": weight_decay, "seed": seed, "every": every, "patience": patience, "samples": samples}
    settings |= {"model": fingerprint(model), "texts": _digest(spans), "held_out": _digest(kept)}
    settings |= {"start": learned.digest}
    run = _Run(learned, settings, None if out is None else Path(out))
    run.resume(steps)
    drawn = nullcontext(progress) if progress is not None else bar("learning")
    with _frozen(model), drawn as show:
        attach(model, learned.layers, learned, learned.linears, rank=length, overflow="grow")
        try:
            one = _Life(model, lives, length, feed or length, carry)
            run.go(one, spans, kept, steps, show)
        finally:
            detach(model)
    return run.result()


class _Life:
    """Reads lives with one episode, that begins anew each time."""

    def __init__(self, model: Llama, rows: int, length: int, feed: int, carry: int | None):
        self.rows, self.length, self.feed, self.carry = rows, length, feed, carry
        self.episode = Episode(model, rows)

    def learn(self, ids_BT: Tensor) -> float:
        """The loss of some lives; its gradient is added to that of the parameters."""
        starts = range(0, self.length, self.feed)
        graph: bool | str = True if len(starts) == 1 else "carry"
        total, carried = 0.0, []
        self.episode.reset()
        for n, start in enumerate(starts):
            carried.append(self._loss(ids_BT, start, graph=graph) / (self.rows * self.length))
            if n + 1 == len(starts) or (self.carry is not None and (n + 1) % self.carry == 0):
                whole = torch.stack(carried).sum()
                if whole.requires_grad:  # the first feed alone, of one token, depends on no event
                    whole.backward()
                total, carried = total + float(whole.detach()), []
                self.episode.cut()
        return total

    @torch.no_grad()
    def measure(self, ids_NT: Tensor, update: str = "all") -> float:
        """The mean loss of N lives, `rows` at a time."""
        total = 0.0
        for ids_BT in ids_NT.split(self.rows):
            some = len(ids_BT)
            self.episode.reset()
            ids_BT = torch.cat([ids_BT, ids_BT[-1:].expand(self.rows - some, -1)])
            for start in range(0, self.length, self.feed):
                total += float(self._loss(ids_BT, start, some, update=update))
        return total / (len(ids_NT) * self.length)

    def _loss(self, ids_BT: Tensor, start: int, rows: int | None = None, **how: Any) -> Tensor:
        """The sum of −log p of the tokens behind each of one feed, of the first rows."""
        end = min(start + self.feed, self.length)
        logits_BTV = self.episode.feed(ids_BT[:, start:end], **how)[:rows]
        next_BT = ids_BT[:rows, start + 1 : end + 1].to(logits_BTV.device)
        wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        return F.cross_entropy(wide_BTV.flatten(0, 1), next_BT.flatten(), reduction="sum")


class _Run:
    """The parameters, AdamW's moments and what has been measured: all that an interruption must not lose."""

    def __init__(self, learned: Learned, settings: dict[str, Any], out: Path | None):
        self.learned, self.settings, self.out = learned, settings, out
        self.named = dict(learned.named_parameters())
        rates = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
        self.adam = torch.optim.AdamW(self.named.values(), **rates)
        self.best = self._copy()
        self.losses: list[float] = []
        self.held_out: dict[int, float] = {}
        self.frozen: float | None = None

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def best_step(self) -> int:
        return min(self.held_out, key=lambda step: (self.held_out[step], step)) if self.held_out else self.step

    @property
    def stopped(self) -> bool:
        later = [step for step in self.held_out if step > self.best_step]
        return len(later) >= self.settings["patience"]

    def go(self, life: _Life, spans: list[Tensor], kept: list[Tensor], steps: int, show: Callable[[int, int], None]):
        held_NT = even(kept, self.settings["samples"], life.length) if kept else None
        if held_NT is not None and self.frozen is None:
            self.frozen = life.measure(held_NT, "none")
            self._measure(life, held_NT)
        while self.step < steps and not self.stopped:
            drawn = _drawn(spans, life.rows, life.length, f"{self.settings['seed']} {self.step}")
            self._descend(life, drawn)
            show(self.step, steps)
            if self.step % self.settings["every"] == 0 or self.step == steps:
                if held_NT is not None:
                    self._measure(life, held_NT)
                self.save()
        self.learned.requires_grad_(False)
        self.save()

    def _descend(self, life: _Life, ids_BT: Tensor) -> None:
        self.adam.zero_grad()
        try:
            loss = life.learn(ids_BT)
        except ValueError as error:
            raise ValueError(f"step {self.step + 1} of learning: {error}; a smaller lr or rate may help") from error
        for name, parameter in self.named.items():
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
                raise ValueError(
                    f"step {self.step + 1} of learning: the gradient of {name} is not finite; a smaller lr may help"
                )
        self.adam.step()
        self.losses.append(loss)

    def _measure(self, life: _Life, held_NT: Tensor) -> None:
        self.held_out[self.step] = life.measure(held_NT)
        if self.best_step == self.step:
            self.best = self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.named.items()}

    def result(self) -> Learning:
        return Learning(self._chosen(), self.losses, self.held_out, self.frozen, self.best_step, self.stopped)

    def _chosen(self) -> Learned:
        rule = copy.deepcopy(self.learned).requires_grad_(False)
        if self.held_out:
            rule.load_state_dict(self.best)
        rule.seen = {"step": self.best_step, "held_out": self.held_out.get(self.best_step), "frozen": self.frozen}
        rule.seen |= {"settings": self.settings}
        return rule

    # ---- on disk

    def save(self) -> None:
        if self.out is None:
            return
        tensors = {f"now.{name}": parameter.detach() for name, parameter in self.named.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.named.items():
            tensors |= {f"adam.{name}.{key}": moment for key, moment in self.adam.state[parameter].items()}
        facts = {"losses": self.losses, "held_out": list(self.held_out.items()), "frozen": self.frozen}
        whole = {"format": FORMAT, **facts, "settings": self.settings}
        write_tensors(self.out / STATE, tensors, {"learning": json.dumps(whole)})
        self._chosen().save(self.out)

    def resume(self, steps: int) -> None:
        """Goes on from the state in the folder, if there is one."""
        from safetensors import SafetensorError, safe_open

        if self.out is None or not (path := self.out / STATE).is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get("learning", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
        if facts.get("format") != FORMAT:
            raise ValueError(f"{path} has format {facts.get('format')!r}, expected {FORMAT!r}")
        for name, ours in self.settings.items():
            if (theirs := facts["settings"].get(name)) != ours:
                raise ValueError(
                    f"{path} is of a run with {name} {theirs!r}, this one has {ours!r}: another folder, or the same"
                )
        if len(facts["losses"]) > steps:
            raise ValueError(f"{path} is at step {len(facts['losses'])}, and steps={steps} were asked for")
        self.losses, self.frozen = facts["losses"], facts["frozen"]
        self.held_out = {int(step): loss for step, loss in facts["held_out"]}
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(parameter.device)
                start = f"adam.{name}."
                moments = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
                if moments:
                    self.adam.state[parameter] = moments


@contextmanager
def _frozen(model: Llama) -> Iterator[None]:
    """No parameter of the model asks for a gradient inside."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _texts(model: Llama, given: Sequence[Ids], length: int, name: str) -> list[Tensor]:
    ids = [tokens(text, None, 1, model.config.vocab_size)[0][0] for text in given]
    for n, text in enumerate(ids):
        if len(text) <= length:
            raise ValueError(f"learn() got {len(text)} tokens in {name}[{n}], expected {length + 1} or more, a life")
    return ids


def _drawn(texts: Sequence[Tensor], rows: int, length: int, seed: str) -> Tensor:
    """`rows` spans of length + 1 tokens, every place of every text as likely, [B, length + 1]."""
    dice = random.Random(seed)
    places = [len(text) - length for text in texts]
    rows_BT = []
    for _ in range(rows):
        place = dice.randrange(sum(places))
        n = 0
        while place >= places[n]:
            place, n = place - places[n], n + 1
        rows_BT.append(texts[n][place : place + length + 1])
    return torch.stack(rows_BT)


def even(texts: Sequence[Tensor], samples: int, length: int) -> Tensor:
    """Lives at even distances, the texts in turn, [N, length + 1]."""
    chosen = []
    for n, text in enumerate(texts):
        own = len(range(n, samples, len(texts)))
        last = len(text) - length - 1
        chosen += [text[last * i // max(1, own) :][: length + 1] for i in range(own)]
    return torch.stack(chosen)


def _digest(texts: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text.tolist()).encode())
    return digest.hexdigest()[:16]
