"""The path of one token on a GPU: the kernels of `fused`, recorded once as a CUDA graph and replayed.

Whatever changes from token to token (ids, positions, event numbers, the write mask, rates) lies in tensors that stay
where they are, and nothing looks at them from Python. What the recording relied on is looked at before every replay.
Once it has changed (the KV bucket, a buffer, a weight, a module, the form of a rule) the step runs once without
recording, and is then recorded again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..activations import PHI
from ..episode_state import Address, EpisodeState
from ..kernels.place import Turns, launch_place
from ..kernels.query import Where
from ..kernels.step import Factors, Plastic, StepInputs, StepRule
from ..model import Llama
from ..numbers import as_float, tensors_of
from ..passes import Tokens
from ..plastic import PlasticLinear
from ..rules import Rule, twin_event, twin_of
from ..state import EventLog
from ..watch import Watch
from .fused import arrivals, layers_of, rope_of, strange, token, unable

Run = Callable[[], Tensor]
IDS, POSITION, PLACE, WRITE, EVENT = range(5)  # rows of the inputs; from EVENT on, one for each group of logs
NEVER = 1 << 62


def graphed(run: Run) -> Run:
    """A CUDA graph of what `run` launches. Recording launches nothing. Every replay writes its result to one tensor."""
    graph = torch.cuda.CUDAGraph()
    # on a side stream, in memory of its own; other threads may use the device meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


class Cuda:
    """One token of each row as the same work at every token, for as long as the episode's buffers live.

    Args:
        record: makes a replay from the step; None: it always runs without recording.
        backend: what the step and the plastic linears must run on.

    `replayed` says whether the last token came from a replay, `recordings` how many were made.
    """

    name = "cuda"

    def __init__(
        self,
        model: Llama,
        linears: Mapping[Address, PlasticLinear],
        state: EpisodeState,
        record: Callable[[Run], Run] | None,
        backend: str = "triton",
    ):
        self.model, self.linears, self.state, self.record, self.backend = model, linears, state, record, backend
        self.cache, self.logs = state.cache, state.logs
        self.unable = self._unable()
        self.strange: tuple[Watch | None, str | None] = None, None  # a module that the step does not know
        self.rules: list[Rule] | None = None  # whose numbers lie in tensors
        self.kernels: list[tuple] = []  # what of them is no number, the target last
        self.form: tuple | None = None  # what the step relies on by value, and ...
        self.watch: Watch | None = None  # ... by identity: the model's parts, and
        self.buffers: list[Tensor] = []  # U of every log; its other buffers come and go with it
        self.alike: list[list[EventLog]] = []  # logs whose events fall together
        self.moved: list[Tensor] = []  # targets that were copied to the device
        dtype = next((log.dtype for log in self.logs.values()), model.dtype)
        # rate of each linear and row, then gamma
        self.rate_LB, self.gamma_LB = (
            _rows(len(self.logs), len(self.cache.lengths), dtype, model.device) for _ in range(2)
        )
        self.rope: tuple[Tensor, Tensor] | None = None  # of every place of the cache
        self.replay: Run | None = None
        self.replayed, self.recordings = False, 0

    def _unable(self) -> str | None:
        if self.record is None and (not self.linears or any(x.backend != self.backend for x in self.linears.values())):
            return "the model is not on a GPU"
        if (reason := unable(self.model, self.state.batch_size, self.backend)) is not None:
            return reason
        if any(linear.backend != self.backend for linear in self.linears.values()):
            return f"a linear does not run on backend {self.backend!r}"
        if any(linear.budget is not None for linear in self.linears.values()):
            return "a linear has a budget, which looks at every event before the next"
        if self.linears and self.state.states != self.state.batch_size:
            return "the rows share one ΔW"
        return None

    def refuses(self, tokens: Tokens, watch: Watch) -> str | None:
        if self.unable is not None:
            return self.unable
        if not tokens.single:
            return "the pass has more than one token of each row"
        if any(self.state.cache.first):
            return "a row begins at a later position, and the places before it are never seen"
        if self.model.binding.taps:
            return "edits or a capture run on the modules"
        rules = self._rules()
        if not _same(rules, self.rules):
            if any(map(tensors_of, rules)):
                return "a rule has numbers that are tensors, which may change in place"
            if not all(rule.neuron_local and twin_of(rule) for rule in rules):
                return "a rule is not neuron-local, or has no Triton kernel"
        if self.strange[0] is not watch:
            self.strange = watch, strange(self.model, watch)
        if self.strange[1] is not None:
            return self.strange[1]
        return "there are hooks on the model, or a forward of its user's" if watch.hooked() else None

    def _rules(self) -> list[Rule]:
        return [linear.rule for linear in self.linears.values()]

    def run(self, tokens: Tokens, watch: Watch) -> Tensor:
        """Reads one token of each row and writes its event where asked.

        Returns logits [B, 1, V]. Raises ValueError for an event that is not finite; nothing is counted then.
        """
        self.replayed = False
        if not _same(rules := self._rules(), self.rules):
            self._read_rules(rules)
        counts = tokens.counts
        real = tokens.positions.real_or_all_BT[:, 0].int().tolist()
        lengths = self.cache.lengths
        after = [n + r for n, r in zip(lengths, real, strict=True)]
        for log in self.logs.values():
            log.reserve(counts)
        # a model without events that writes none is the frozen one, to the bit
        writes = any(any(counts) or log.used for log in self.logs.values())
        changed = self.renew(watch, self.cache.bucket(max(after)), writes)
        if any(counts):
            self._keep(counts)
        position = [n * r for n, r in zip(lengths, real, strict=True)]
        place = [n if r else self.cache.capacity for n, r in zip(lengths, real, strict=True)]  # the last is scratch
        ids = tokens.ids_BT[:, 0].tolist()
        numbers = [ids, position, place, counts, *(logs[0].event_counts for logs in self.alike)]
        self.inputs.copy_(torch.tensor(numbers, device="cpu"))
        with self.model.binding.bound(None, self.state), torch.cuda.device_of(self.inputs):
            # after a change run once without recording, so that all kernels are compiled before the graph is captured
            if self.record is None or changed:
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
        self.cache.advance(tokens.positions)
        return logits_B1V.clone()  # the next replay writes over it

    def _run(self) -> Tensor:
        """The step itself: Python never waits for a number in it, so it can be recorded."""
        self._begin()
        assert self.rope is not None
        where = Where(self.inputs[POSITION], self.inputs[PLACE], *self.rope)
        rest = (self.cache, self.end, self.arrived_BK, self.backend)
        return token(self.model, self.layers, self.inputs[IDS], where, *rest)

    def _begin(self) -> None:
        """The mask, slots and weights of this token's events."""
        if not self.alike:
            return
        self.write_B.copy_(self.inputs[WRITE])
        self.bad_LB.zero_()
        for logs, event_B, slot_B, w_BR in zip(self.alike, self.inputs[EVENT:], self.slot_GB, self.w_GBR, strict=True):
            log = logs[0]
            if self.backend == "triton":
                launch_place(event_B, log.birth_BR, _turns(log), slot_B, w_BR)
            else:
                slot_B.copy_(log.slots.slot(event_B))
                w_BR.copy_(log.slot_weights(event_B[:, None], log.capacity)[:, 0])

    def _keep(self, counts: list[int]) -> None:
        """Has copies made of the logs that could not take these events back: those that fold after them."""
        for logs in self.alike:
            if not logs[0].slots.fits(logs[0].event_counts, counts):
                for address in [address for address, log in self.logs.items() if log in logs]:
                    self.state.keep(address, counts)

    # ---- what a recording relies on

    def renew(self, watch: Watch, end: int, writes: bool) -> bool:
        """Makes the step's buffers again if anything it relies on has changed; says whether. Runs at every token."""
        buffers = [log.U_BRO for log in self.logs.values()]
        changed = (
            watch is not self.watch
            or self._form(end, writes) != self.form
            or not all(map(operator.is_, buffers, self.buffers))
            or any(log.event_counts != logs[0].event_counts for logs in self.alike for log in logs)
        )
        if changed:
            self.replay = None
            self.end, self.watch, self.buffers = end, watch, buffers
            self._make_inputs(writes)
            self.form = self._form(end, writes)
        return changed

    def _form(self, end: int, writes: bool) -> tuple:
        versions = [target._version for target in self.moved]
        return end, writes, self.cache.capacity, self.kernels, versions

    def _read_rules(self, rules: list[Rule]) -> None:
        """What of the rules is a number goes into a tensor; the rest is part of the form."""
        self.rules = rules
        twins = [twin for rule in rules if (twin := twin_of(rule)) is not None]
        for numbers_LB, name in ((self.rate_LB, "rate"), (self.gamma_LB, "gamma")):
            for numbers_B, twin in zip(numbers_LB, twins, strict=True):
                numbers_B.copy_(torch.tensor(getattr(twin, name), dtype=torch.float64, device="cpu"))
        self.kernels = [
            (twin.name, rule.mu, rule.clip, rule.bias, id(getattr(rule, "target", None)))
            for twin, rule in zip(twins, rules, strict=True)
        ]

    def _make_inputs(self, writes: bool) -> None:
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
        self.arrived_BK = arrivals(self.model, rows)
        if self.rope is None or len(self.rope[0]) != self.cache.capacity + 1:
            self.rope = rope_of(self.model, self.cache.capacity + 1)
        self.moved = []
        plastic = {address: self._plastic(n, address) for n, address in enumerate(self.logs)} if writes else {}
        self.layers = layers_of(self.model, plastic)

    def _plastic(self, number: int, address: Address) -> Plastic:
        """What the kernels must know of the fast weights of one linear."""
        linear, log = self.linears[address], self.logs[address]
        rule, twin = linear.rule, twin_of(linear.rule)
        assert twin is not None
        group = next(n for n, logs in enumerate(self.alike) if log in logs)
        target = getattr(rule, "target", None)
        target = target if isinstance(target, Tensor) else None
        here = None if target is None else target.to(device=log.device, dtype=log.dtype)
        if here is not target and target is not None:
            self.moved.append(target)
        inputs = StepInputs(
            event_B=self.inputs[EVENT + group],
            slot_B=self.slot_GB[group],
            w_BR=self.w_GBR[group],
            write_B=self.write_B,
            rate=self.rate_LB[number],
            gamma=self.gamma_LB[number],
            target=here,
            bad_B=self.bad_LB[number],
        )
        factors = Factors(log.U_BRO, log.K_BRI, log.bias_BR if rule.bias else None, log.birth_BR)
        mu, clip = (None if number is None else as_float(number) for number in (rule.mu, rule.clip))
        return Plastic(factors, inputs, StepRule(twin.name, linear.activation.name, mu, clip, _event))


def _event(rule: StepRule, a_BO: Tensor, frozen_BO: Tensor, norm_B: Tensor, inputs: StepInputs) -> Tensor:
    """u of one token by its rule in torch."""
    numbers = (inputs.rate, inputs.gamma, inputs.target)
    return twin_event(rule.name, PHI[rule.activation], rule.clip, a_BO, frozen_BO, norm_B, *numbers)


def _turns(log: EventLog) -> Turns:
    slots = log.slots
    window = log.rank if log.overflow == "evict" else NEVER
    if log.overflow in ("grow", "error"):
        return Turns(NEVER, 1, 0, window, log.decay)
    return Turns(slots.capacity, slots.capacity - slots.kept, slots.kept, window, log.decay)


def _rows(count: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [count, rows], rows at multiples of 16 bytes: Triton compiles a kernel for every alignment it meets."""
    return torch.zeros(count, -(-rows // 4) * 4, dtype=dtype, device=device)[:, :rows]


def _same(rules: list[Rule], others: list[Rule] | None) -> bool:
    return others is not None and len(rules) == len(others) and all(map(operator.is_, rules, others))


def _alike(log: EventLog, other: EventLog) -> bool:
    """Whether the next event of both has the same number, slot and weights before it, now and for ever after."""
    forms = [(one.slots, one.rank, one.decay, one.capacity, one.event_counts) for one in (log, other)]
    return forms[0] == forms[1] and torch.equal(log.birth_BR, other.birth_BR)
