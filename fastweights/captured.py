"""The captured step: one token of each row through the whole model, as the same work at every token.

It runs the model's own modules. Whatever changes from token to token (ids, positions, event numbers, the write mask,
rates) lies in tensors that stay where they are, and nothing looks at them from Python. So on CUDA the step is recorded
once, as a graph, and replayed. What the recording relied on is looked at before every replay; once it has changed
(the KV bucket, a buffer, a weight, a module, the form of a rule) the step runs as it stands and is then recorded
again. With hooks it runs as it stands, at every token, with the same numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .model import KVCache, Llama, Span
from .passes import Pass, Site, Turn
from .plastic import PlasticLinear, bound
from .rules import Rule, twin_of
from .state import EventLog
from .watch import Watch

if TYPE_CHECKING:
    from .episode import Episode

Run = Callable[[], Tensor]
IDS, POSITION, REAL, WRITE, EVENT = range(5)  # rows of the inputs; from EVENT on, one for each group of logs


def graphed(run: Run) -> Run:
    """A CUDA graph of what `run` launches; capturing runs nothing. The result lies where it lay at the last replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a side stream, in memory of its own
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class Captured:
    """The step of one episode, for as long as its KV cache and logs live.

    Args:
        record: makes a replay from the step; None: it always runs as it stands.
        backend: what the plastic linears must run on.

    `replayed` says whether the last token came from a replay, `recordings` how many were made.
    """

    def __init__(
        self,
        model: Llama,
        linears: Mapping[Site, PlasticLinear],
        cache: KVCache,
        logs: Mapping[Site, EventLog],
        record: Callable[[Run], Run] | None,
        backend: str = "triton",
    ):
        self.model, self.linears, self.cache, self.logs, self.record = model, linears, cache, logs, record
        # a budget looks at every event before the next; rows that share ΔW read and write it in columns
        plain = all(linear.backend == backend and linear.budget is None for linear in linears.values())
        own = all(len(log.event_counts) == len(cache.lengths) for log in logs.values())
        self.able = plain and own and bool(record or linears)
        self.rules: list[Rule] = []  # as last looked at
        self.local = True  # whether all of them are neuron-local and have a kernel
        self.kernels: list[tuple] = []  # what of them is no number, the target last
        self.form: tuple | None = None  # what the step relies on by value, and ...
        self.watch: Watch | None = None  # ... by identity: the model's parts, and the buffers of the logs
        self.alike: list[list[EventLog]] = []  # logs whose events fall together
        self.moved: list[Tensor] = []  # targets that were copied to the device
        dtype = next((log.dtype for log in logs.values()), model.dtype)
        # rate of each linear and row, then p0
        self.rate_LB, self.p0_LB = (_rows(len(logs), len(cache.lengths), dtype, model.device) for _ in range(2))
        self.replay: Run | None = None
        self.replayed, self.recordings = False, 0

    def suits(self, tokens: int) -> bool:
        """Whether a pass over so many tokens can be this step."""
        self.replayed = False
        if tokens != 1 or not self.able:
            return False
        rules = [linear.rule for linear in self.linears.values()]
        if len(rules) != len(self.rules) or not all(map(operator.is_, rules, self.rules)):
            self.rules, self.local = rules, all(rule.neuron_local and twin_of(rule) for rule in rules)
            if self.local:
                self._read_rules()
        return self.local

    def step(self, episode: Episode, ids_B1: Tensor, real_B1: Tensor | None, write_B1: Tensor) -> Tensor:
        """Reads one token of each row and writes its event where asked; ids, real and write are on the CPU.

        Returns logits [B, 1, V]. Raises ValueError for an event that is not finite; nothing is counted then.
        """
        counts = write_B1[:, 0].int().tolist()
        real = [1] * len(counts) if real_B1 is None else real_B1[:, 0].int().tolist()
        lengths = self.cache.lengths
        after = [n + r for n, r in zip(lengths, real, strict=True)]
        for log in self.logs.values():
            log.reserve(counts)
        # a model without events that writes none is the frozen one, to the bit
        writes = any(any(counts) or log.used for log in self.logs.values())
        changed = self._look(self.cache.bucket(max(after)), writes)
        if any(counts):
            self._keep(episode, counts)
        position = [n * r for n, r in zip(lengths, real, strict=True)]
        self.inputs.copy_(
            torch.tensor(
                [ids_B1[:, 0].tolist(), position, real, counts, *(logs[0].event_counts for logs in self.alike)]
            )
        )
        with bound(self.model, episode, self.now), torch.cuda.device_of(self.inputs):
            # after a change as it stands, too: a recording must find every kernel compiled and loaded
            if self.record is None or changed or self.watch is None or self.watch.hooked():
                logits_B1V = self._run()
            else:
                if self.replay is None:
                    self.replay = self.record(self._run)
                    self.recordings += 1
                logits_B1V = self.replay()
                self.replayed = True
        if any(counts):
            if bool(self.bad_LB.any()):  # the one look, and the one wait for the device
                linear, row = self.bad_LB.nonzero()[0].tolist()
                log = list(self.logs.values())[linear]
                log.refuse(row, log.event_counts[row] + 1)
            for log in self.logs.values():
                log.count_written(counts)
        self.cache.lengths = after
        return logits_B1V.clone()  # the next replay writes over it

    def _run(self) -> Tensor:
        """The step itself: Python never waits for a number in it, so it can be recorded."""
        self.write_B.copy_(self.inputs[WRITE])
        self.bad_LB.zero_()
        for logs, event_B, slot_B, w_BR in zip(self.alike, self.inputs[EVENT:], self.slot_GB, self.w_GBR, strict=True):
            slot_B.copy_(logs[0].slots.slot(event_B))
            w_BR.copy_(logs[0].slot_weights(event_B[:, None], logs[0].capacity)[:, 0])
        position_B1 = self.inputs[POSITION][:, None]
        visible = torch.arange(self.end, device=self.inputs.device) <= position_B1[:, None, :, None]
        span = Span(position_B1, self.inputs[REAL][:, None] != 0, None, self.end, visible)
        x_B1D = self.model.model.embed_tokens(self.inputs[IDS][:, None])
        return self.model.unembed(self.model.blocks(x_B1D, span, self.cache))

    def _keep(self, episode: Episode, counts: list[int]) -> None:
        """Has copies made of the logs that could not take these events back: those that fold after them."""
        for logs in self.alike:
            if not logs[0].fits(counts):
                for site in [site for site, log in self.logs.items() if log in logs]:
                    episode._keep(site, counts)

    # ---- what a recording relies on

    def _look(self, end: int, writes: bool) -> bool:
        """Makes the step anew if anything it relies on has changed; says whether. This runs at every token."""
        form = self._form(end, writes)
        changed = (
            form != self.form
            or self.watch is None
            or not self.watch.stands()
            or any(log.event_counts != logs[0].event_counts for logs in self.alike for log in logs)
        )
        if changed:
            self.replay = None
            self.end = end
            self.watch = Watch(self.model, *((vars(log), "U_BRO", log.U_BRO) for log in self.logs.values()))
            self._make_turns(writes)
            self.form = self._form(end, writes)
        return changed

    def _form(self, end: int, writes: bool) -> tuple:
        versions = [target._version for target in self.moved]
        return end, writes, self.cache.capacity, self.kernels, versions

    def _read_rules(self) -> None:
        """What of the rules is a number goes into a tensor; the rest is part of the form."""
        twins = [twin for rule in self.rules if (twin := twin_of(rule)) is not None]
        for numbers_LB, name in ((self.rate_LB, "rate"), (self.p0_LB, "gamma")):
            for numbers_B, twin in zip(numbers_LB, twins, strict=True):
                numbers_B.copy_(torch.tensor(getattr(twin, name), dtype=torch.float64))
        self.kernels = [
            (twin.name, rule.mu, rule.clip, rule.bias, id(getattr(rule, "target", None)))
            for twin, rule in zip(twins, self.rules, strict=True)
        ]

    def _make_turns(self, writes: bool) -> None:
        """The buffers of every linear; logs that are alike share theirs."""
        rows, device = len(self.cache.lengths), self.model.device
        self.alike = []
        for log in self.logs.values() if writes else ():
            like = next((logs for logs in self.alike if _alike(log, logs[0])), None)
            if like is None:
                self.alike.append(like := [])
            like.append(log)
        self.inputs = _rows(EVENT + len(self.alike), rows, torch.int64, device)
        self.write_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.bad_LB = _rows(len(self.logs), rows, torch.int32, device)
        self.slot_GB = _rows(len(self.alike), rows, torch.int64, device)
        self.w_GBR = [logs[0].U_BRO.new_zeros(rows, logs[0].capacity) for logs in self.alike]
        self.moved = []
        turns = {}
        for number, (site, log) in enumerate(self.logs.items() if writes else ()):
            group = next(n for n, logs in enumerate(self.alike) if log in logs)
            target = getattr(self.linears[site].rule, "target", None)
            target = target if isinstance(target, Tensor) else None
            here = None if target is None else target.to(device=device, dtype=log.dtype)
            if here is not target and target is not None:
                self.moved.append(target)
            turns[site] = Turn(
                event_B=self.inputs[EVENT + group],
                slot_B=self.slot_GB[group],
                w_BR=self.w_GBR[group],
                write_B=self.write_B,
                rate=self.rate_LB[number],
                gamma=self.p0_LB[number],
                target=here,
                bad_B=self.bad_LB[number],
            )
        # gate and up whose rules have one kernel (their numbers may differ) and whose events fall together
        kernel = {site: form[:-1] for site, form in zip(self.logs, self.kernels, strict=True)}
        pairs = frozenset(
            layer
            for layer, name in turns
            if name == "gate_proj"
            and (up := (layer, "up_proj")) in turns
            and kernel[up] == kernel[layer, name]
            and turns[up].slot_B.data_ptr() == turns[layer, name].slot_B.data_ptr()
        )
        self.now = Pass(self.logs, self.inputs[POSITION][:, None], turns=turns, pairs=pairs)


def _rows(count: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [count, rows], rows at multiples of 16 bytes: Triton compiles a kernel for every alignment it meets."""
    return torch.zeros(count, -(-rows // 4) * 4, dtype=dtype, device=device)[:, :rows]


def _alike(log: EventLog, other: EventLog) -> bool:
    """Whether the next event of both has the same number, slot and weights before it, now and for ever after."""
    forms = [(one.slots, one.rank, one.decay, one.capacity, one.event_counts) for one in (log, other)]
    return forms[0] == forms[1] and torch.equal(log.birth_BR, other.birth_BR)
