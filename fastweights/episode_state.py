"""Everything that moves in an episode, owned once: KV cache, event logs, waiting gradient events, tokens, logits.

A snapshot is a `clone`, a restore is `copy_from`, a fork takes `rows`, a file is `state_dict`, and a feed that fails
is undone by `attempt`. Each part has the same verbs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .binding import Calls
from .cache import KVCache
from .carried import Carried
from .sampling import RowGenerator
from .state import EventLog
from .state.events import Events
from .state.reads import Reads
from .state.unseen import Unseen
from .stream import Texts

Address = tuple[int, str]  # of a linear: (layer, name)


@dataclass(frozen=True)
class Graph:
    """How one token was read, as autograd knows it: where hooks, edits or modules of one's own had a part in it."""

    logprob_BV: Tensor  # log p(next token), with the graph
    taped: dict[Address, tuple[Tensor, Tensor]]  # (a, h) of each linear


@dataclass(frozen=True)
class Taped:
    """How one token was read, as `backward` takes it."""

    tape_BN: Tensor
    first: int  # the lowest layer on it
    addresses: tuple[Address, ...]  # of the linears whose events wait
    reads: dict[Address, Reads]  # copies of what the log of a linear may not hold until the next token

    def keeping(self, logs: Mapping[Address, EventLog]) -> Taped:
        """The same with a copy of everything that it reads of the logs."""
        reads = {a: Reads.of(log).copied() for a, log in logs.items() if a[0] >= self.first and a not in self.reads}
        return replace(self, reads=self.reads | reads)

    def to(self, device: torch.device) -> Taped:
        """The same on another device."""
        reads = {address: reads.to(device) for address, reads in self.reads.items()}
        return replace(self, tape_BN=self.tape_BN.to(device), reads=reads)


@dataclass(frozen=True)
class Waiting:
    """Gradient events of one token that wait for the next token of their rows."""

    how: Taped | Graph  # the token was read
    rows_B: Tensor  # bool, on the CPU: rows that still wait
    event_counts: dict[Address, list[int]]  # of each log when the token was read
    edited: bool = False  # the token was read under edits

    def to(self, device: torch.device) -> Waiting:
        """The same for a model on another device; a graph stays where its own model is."""
        return replace(self, how=self.how.to(device)) if isinstance(self.how, Taped) else self


@dataclass
class Before:
    """What `attempt` goes back to."""

    lengths: list[int]
    waiting: list[Waiting]
    tokens: list[int]  # read so far, per row
    logits_BV: Tensor | None
    generator: Tensor
    texts: Texts | None
    event_counts: dict[Address, list[int]]
    scaled: dict[Address, list[list[int]]]  # of each log with a budget, and of its archive
    carried: dict[Address, Carried] | None
    graphs: dict[tuple[str, int], Tensor] | None  # of the cache
    kept: dict[Address, EventLog] = field(default_factory=dict)  # copies of logs that could not be rolled back


class EpisodeState:
    """What an episode holds between two calls. A copy of it is a snapshot.

    Attributes:
        cache: keys and values, and each row's length.
        logs: the event log of every plastic linear.
        shared: all rows read and write one ΔW.
        waiting: gradient events whose next token is not known yet.
        token_ids: the tokens that each row has read.
        logits_BV: [B, V] after the last token of each row; None before the first.
        generator: draws the sampled tokens, for each row by itself.
        texts: how far the text of each row was given out by `generate`; not in files.
        carried: the events whose graph is kept, of each plastic linear; None: no graph is. In no copy and no file.
    """

    def __init__(self, cache: KVCache, logs: dict[Address, EventLog], generator: RowGenerator, shared: bool):
        self.cache, self.logs, self.generator, self.shared = cache, logs, generator, shared
        self.waiting: list[Waiting] = []
        self.token_ids: list[list[int]] = [[] for _ in cache.lengths]
        self.logits_BV: Tensor | None = None
        self.texts: Texts | None = None
        self.carried: dict[Address, Carried] | None = None
        # what puts a change that was cut short right: set before the change begins, None once it is whole
        self.journal: Callable[[], None] | None = None
        self.before: Before | None = None  # what the attempt that runs now goes back to
        self.calls = Calls()  # of this life's verbs

    @property
    def lengths(self) -> list[int]:
        """Tokens so far, per row."""
        return list(self.cache.lengths)

    @property
    def batch_size(self) -> int:
        return len(self.cache.lengths)

    @property
    def states(self) -> int:
        """How many ΔW a linear has: one per row, or one for all of them."""
        return 1 if self.shared else self.batch_size

    @property
    def event_counts(self) -> dict[Address, list[int]]:
        """Events so far of each plastic linear, a number per ΔW."""
        return {address: list(log.event_counts) for address, log in self.logs.items()}

    @property
    def waits(self) -> list[bool]:
        """Whether each row's last token has a gradient event that waits."""
        return [any(bool(one.rows_B[row]) for one in self.waiting) for row in range(self.batch_size)]

    def per_delta(self, counts: list[int]) -> list[int]:
        """Events to come of each row as events to come of each ΔW."""
        return [sum(counts)] if self.shared else counts

    # ---- one thread at a time, and all of a change or nothing

    def alone(self, changes: bool = True) -> AbstractContextManager:
        """Runs a verb of this life, once whatever was cut short before is put right.

        Raises:
            ValueError: another thread runs one, or this thread does and the new one changes something.
        """
        return self.calls.enter(self._alone(changes))

    @contextlib.contextmanager
    def _alone(self, changes: bool) -> Iterator[None]:
        if self.calls.elsewhere():
            raise ValueError(
                "this episode is running in another thread: expected one thread at a time (make an episode per "
                "thread, or fork() it)"
            )
        if self.calls.here() == 1:
            self.recover()
        elif changes:
            raise ValueError(
                "this episode is in the middle of a call: a hook or callback may look at it, not change it"
            )
        yield

    def recover(self) -> None:
        """Puts right what an interrupt cut short: goes back to before an attempt, or finishes a change."""
        if self.journal is not None:
            self.journal()
        self.journal = self.before = None

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Undoes what runs inside unless all of it succeeds; an attempt inside an attempt is part of it."""
        if self.before is not None:
            yield
            return
        self.before = Before(
            lengths=self.lengths,
            waiting=list(self.waiting),
            tokens=[len(ids) for ids in self.token_ids],
            logits_BV=self.logits_BV,
            generator=self.generator.get_state(),
            texts=self.texts,
            event_counts=self.event_counts,
            carried=None if self.carried is None else dict(self.carried),
            graphs=None if self.cache.graphs is None else dict(self.cache.graphs),
            scaled={a: [list(part.scaled) for part in log.parts] for a, log in self.logs.items() if log.budget},
        )
        self.journal = self._go_back
        try:
            yield
            self.journal = None
        except BaseException:
            self.recover()
            raise
        finally:
            if self.journal is None:
                self.before = None

    def _go_back(self) -> None:
        before = self.before
        assert before is not None
        self.cache.rewind(before.lengths)
        for address, log in self.logs.items():
            if address in before.kept:
                log.copy_from(before.kept[address])
            log.roll_back(before.event_counts[address])
            for part, scaled in zip(log.parts, before.scaled.get(address, ()), strict=False):
                part.scaled = list(scaled)  # a roll-back that was cut short may have counted them twice
        self.waiting, self.logits_BV = list(before.waiting), before.logits_BV
        for ids, tokens in zip(self.token_ids, before.tokens, strict=True):
            del ids[tokens:]
        self.generator.set_state(before.generator)
        self.texts = before.texts
        self.carried = None if before.carried is None else dict(before.carried)
        self.cache.graphs = None if before.graphs is None else dict(before.graphs)

    def carry(self) -> None:
        """From now on events, keys and values are kept with their graph, until `cut`."""
        if self.carried is None:
            self.carried = {address: Carried.begin(log) for address, log in self.logs.items()}
            self.cache.graphs = {}

    def cut(self) -> None:
        """Lets go of every graph: what was read and written until now is a constant for what comes."""
        self.carried = self.cache.graphs = None

    def keep(self, address: Address, counts: Sequence[int]) -> None:
        """Copies a log before a write that cannot be rolled back: a fold, or a ring that wraps. Inside an attempt."""
        before, log = self.before, self.logs[address]
        assert before is not None, "events are written inside an attempt"
        began = before.event_counts[address]
        since = [now - then + c for now, then, c in zip(log.event_counts, began, counts, strict=True)]
        if address not in before.kept and not log.slots.fits(began, since):
            before.kept[address] = log.clone()

    def write(self, address: Address, events: Events, unseen: Unseen | None = None) -> None:
        """The one door for events from Python: writes them into the log of one linear, in token order.

        unseen: see `EventLog.write`.

        Raises:
            ValueError: they do not fit, are not finite, or go over a budget that stops; the attempt is undone then.
        """
        self.keep(address, events.counts)
        self.logs[address].write(events, unseen)

    def _finish(self, change: Callable[[], None]) -> None:
        """Makes a change that may be made again from any point of itself: what cuts it short does not stop it."""
        try:
            self.journal = change
            change()
        except BaseException:
            change()
            raise
        finally:
            self.journal = None

    # ---- the verbs

    def reset(self) -> None:
        """Empties everything, in the same buffers. The generator runs on."""

        def change() -> None:
            self.cache.rewind([0] * self.batch_size)
            for log in self.logs.values():
                log.clear()
            self.waiting, self.logits_BV, self.texts = [], None, None
            self.cut()
            self.token_ids = [[] for _ in self.cache.lengths]

        self._finish(change)

    def undo(self, events: int) -> None:
        """Takes back each ΔW's last events; the cache keeps what was read with them."""
        with self.attempt():
            assert self.before is not None
            if events:  # waiting events refer to weights that will be gone: marked, so that `save` refuses them
                gone = dict.fromkeys(self.logs, [-1] * self.states)
                self.waiting = [
                    replace(one, event_counts=dict(gone), how=how.keeping(self.logs) if isinstance(how, Taped) else how)
                    for one in self.waiting
                    for how in [one.how]
                ]
            for address, log in self.logs.items():
                self.before.kept[address] = log.clone()
            for log in self.logs.values():
                log.rewind([count - events for count in log.event_counts])
            self.cut()

    def clone(self) -> EpisodeState:
        """A copy of all of it."""
        other = self.rows(range(self.batch_size))
        other.waiting = list(self.waiting)
        return other

    def rows(self, chosen: Sequence[int]) -> EpisodeState:
        """A copy whose row n has the past of row `chosen[n]`, without waiting events: those belong to their rows."""
        every = list(chosen) == list(range(self.batch_size))
        logs = {a: log.clone() if self.shared or every else log.rows(chosen) for a, log in self.logs.items()}
        other = EpisodeState(self.cache.rows(chosen), logs, self.generator.rows(chosen), self.shared)
        other.texts = None if self.texts is None else self.texts.rows(chosen)
        other.token_ids = [list(self.token_ids[row]) for row in chosen]
        if self.logits_BV is not None:
            other.logits_BV = self.logits_BV[torch.tensor(list(chosen), device=self.logits_BV.device)]
        return other

    def copy_from(self, other: EpisodeState) -> None:
        """Takes over all that another state of the same form holds; buffers keep their addresses if they can.

        Raises:
            ValueError: it has another form; nothing changes then.
        """
        self._check_form(other)

        def change() -> None:
            self.cut()
            self.cache.copy_from(other.cache)
            for address, log in other.logs.items():
                self.logs[address].copy_from(log)
            self.waiting = [one.to(self.cache.keys[0].device) for one in other.waiting]
            self.logits_BV = (
                None if other.logits_BV is None else other.logits_BV.to(self.cache.keys[0].device, copy=True)
            )
            self.token_ids = [list(ids) for ids in other.token_ids]
            self.generator.set_state(other.generator.get_state())
            self.texts = None if other.texts is None else other.texts.rows(range(self.batch_size))

        self._finish(change)

    def _check_form(self, other: EpisodeState) -> None:
        if other.batch_size != self.batch_size:
            raise ValueError(
                f"restore() got a snapshot of batch {other.batch_size}, but this episode has batch {self.batch_size}"
            )
        if other.shared != self.shared:
            raise ValueError(
                f"restore() got a snapshot with shared={other.shared}, but this episode has shared={self.shared}"
            )
        if other.logs.keys() != self.logs.keys():
            raise ValueError(
                f"restore() got a snapshot with plastic linears {sorted(other.logs)}, "
                f"but this episode has {sorted(self.logs)}"
            )
        for address, log in other.logs.items():
            self.logs[address].check_form(log.form(), "snapshot's")
        mine, theirs = ((len(c.keys), *c.keys[0].shape[1::2], c.keys[0].dtype) for c in (self.cache, other.cache))
        if mine != theirs:
            raise ValueError(f"restore() got a snapshot of a model with KV cache {theirs}, this model's is {mine}")
        if other.cache.length > self.cache.limit:
            self.cache.reserve(other.cache.length)  # says what does not fit

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that moves but how waiting tokens were read: tensors, and values that JSON holds exactly."""
        tensors, meta = self.cache.state_dict()
        tensors["generator"] = self.generator.get_state()
        if self.logits_BV is not None:
            tensors["logits"] = self.logits_BV
        logs = {}
        for address, log in self.logs.items():
            saved, logs[key_of(address)] = log.state_dict()
            tensors |= {f"log.{key_of(address)}.{name}": t for name, t in saved.items()}
        meta |= {"shared": self.shared, "seen": self.token_ids, "waiting": self.waits, "logs": logs}
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over, bit for bit, what `state_dict` gave; of a state of the same form that nobody has used yet.

        The tensors may be on any device.

        Raises:
            ValueError: a log of another linear, shape, policy or dtype, or incomplete.
        """
        self.cache.load_state_dict(tensors, meta)
        for address, log in self.logs.items():
            prefix = f"log.{key_of(address)}."
            own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            log.load_state_dict(own, meta["logs"][key_of(address)])
        self.logits_BV = tensors["logits"].to(self.cache.keys[0].device) if "logits" in tensors else None
        self.token_ids = [list(ids) for ids in meta["seen"]]
        if "generator" in tensors:
            self.generator.set_state(tensors["generator"].cpu())


def key_of(address: Address) -> str:
    """A linear's address as files name it."""
    return f"{address[0]}.{address[1]}"
