"""The path of a gradient rule's token on a GPU: its forward and its backward, each recorded once and replayed.

The forward leaves a tape, and the backward goes from it to the slope of every linear as soon as the next token is
known (`backward`). Both are plain operations of torch on tensors that stay where they are: token ids, positions and
event numbers are copied into one of them, and every slot of a log is read, those without an event with weight 0. What a
recording relies on is looked at before every replay. Once it has changed (the KV bucket, a buffer, a weight, a module),
each of the two runs once without recording, and is then recorded again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..backward import Slope, Tape, backward, forward, length, unable
from ..cache import Positions
from ..episode_state import Address, EpisodeState, Taped, Waiting
from ..model import Llama
from ..passes import Pass, Tokens
from ..plastic import PlasticLinear
from ..state.reads import Reads
from ..watch import Watch
from .table import table_of

Record = Callable[[Callable[[], Any]], Callable[[], Any]]
TOKEN, POSITION, REAL, EVENT = range(4)  # rows of the inputs; from EVENT on, one for each log


class Recorded:
    """A piece of work that runs once as it is, and from then on as its recording.

    It does not hold the work itself, which would hold it: an episode must be gone as soon as nobody holds it.
    """

    def __init__(self, record: Record):
        self.record, self.recordings = record, 0
        self.forget()

    def forget(self) -> None:
        """Begins again: what the recording relied on has changed."""
        self.replay: Callable[[], Any] | None = None
        self.warm = self.replayed = False

    def __call__(self, run: Callable[[], Any]) -> Any:
        self.replayed = self.warm
        if not self.warm:  # once without recording, so that whatever is made on first use is there
            out = run()
            self.warm = True
            return out
        if self.replay is None:
            self.replay = self.record(run)
            self.recordings += 1
        return self.replay()


class Gradient:
    """One token of each row, and the slopes of its events, of a model whose rules are all gradient rules.

    Args:
        record: makes a replay of a piece of work; None: there is no GPU.
    """

    name = "cuda"

    def __init__(
        self,
        model: Llama,
        linears: Mapping[Address, PlasticLinear],
        state: EpisodeState,
        record: Record | None,
    ):
        self.model, self.linears, self.state = model, linears, state
        self.unable = self._unable(record)
        self.watch: Watch | None = None
        self.form: tuple | None = None
        self.buffers: list[Tensor] = []  # U of every log; its other buffers come and go with it
        self.taped: Tensor | None = None  # whose numbers are on the tape now
        if record is not None:
            self.forward, self.backward = Recorded(record), Recorded(record)

    def _unable(self, record: Record | None) -> str | None:
        if record is None:
            return "the model is not on a GPU"
        if any(linear.budget is not None for linear in self.linears.values()):
            return "a linear has a budget, which looks at every event before the next"
        return "the rows share one ΔW" if self.state.states < self.state.batch_size else None

    def refuses(self, tokens: Tokens, watch: Watch) -> str | None:
        if self.unable is not None:
            return self.unable
        if not tokens.single:
            return "the pass has more than one token of each row"
        if any(linear.rule.neuron_local for linear in self.linears.values()):
            return "some rules are neuron-local, and some are not"
        if self.model.binding.taps:
            return "edits or a capture run on the modules"
        if watch.hooked():
            return "there are hooks on the model, or a forward of its user's"
        if (reason := unable(self.model)) is not None:
            return reason
        if (stranger := table_of(self.model, watch).stranger) is not None:
            return f"the model holds a module that the backward does not know: {stranger}"
        return None

    def run(self, tokens: Tokens, watch: Watch) -> Tensor:
        """Reads one token of each row, and leaves its events waiting where asked; logits [B, 1, V]."""
        model, state = self.model, self.state
        real = tokens.positions.real_or_all_BT[:, 0].tolist()
        positions = [n * r for n, r in zip(state.lengths, real, strict=True)]
        self._renew(watch, max(n + r for n, r in zip(state.lengths, real, strict=True)))
        self._fill(tokens.ids_BT[:, 0].tolist(), positions, real)
        self.taped = None
        with model.binding.bound(self.now, state), torch.cuda.device_of(self.tape_BN):
            self.forward(self._forward)
        self.taped = self.tape_BN.clone()  # the next replay writes over it
        if any(tokens.counts):
            how = Taped(self.taped, self.first, tuple(self.linears), {})
            state.waiting.append(Waiting(how, tokens.write_BT[:, 0], state.event_counts))
        state.cache.advance(tokens.positions)
        return Tape.of(model, self.taped, self.first).logits_BV[:, None]

    def slopes(self, how: Taped, rows_B: Tensor, next_B: Tensor, watch: Watch) -> dict[Address, Slope] | None:
        """What `backward` gives, good until the next call; None where this path does not do it."""
        if self.unable is not None or how.reads or how.addresses != tuple(self.linears):
            return None
        lengths = self.state.lengths
        self._renew(watch, max(lengths))
        self._fill(next_B.tolist(), [max(n, 1) - 1 for n in lengths], rows_B.tolist())
        with torch.cuda.device_of(self.tape_BN):
            if how.tape_BN is not self.taped:
                self.taped = None  # an interrupt must not leave the tape and its name apart
                self.tape_BN.copy_(how.tape_BN)
                self.taped = how.tape_BN
            return self.backward(self._backward)

    def _fill(self, ids: list[int], positions: list[int], real: list[bool]) -> None:
        rows = [ids, positions, list(map(int, real)), *(log.event_counts for log in self.state.logs.values())]
        self.inputs.copy_(torch.tensor(rows, device="cpu"))

    # ---- what is recorded: Python never waits for a number in it

    def _forward(self) -> None:
        self._weigh()
        position_B1 = self.inputs[POSITION][:, None]
        visible = torch.arange(self.end, device=self.inputs.device) <= position_B1[:, None, :, None]
        positions = Positions(position_B1, self.inputs[REAL][:, None] != 0, None, self.end, visible)
        ids_B1 = self.inputs[TOKEN][:, None]
        self.tape_BN.copy_(forward(self.model, ids_B1, positions, self.state.cache, self.first))

    def _backward(self) -> dict[Address, Slope]:
        self._weigh()
        next_B, position_B, real_B = self.inputs[TOKEN], self.inputs[POSITION], self.inputs[REAL] != 0
        token = (self.tape_BN, self.first, self.linears, next_B, real_B, position_B)
        return backward(self.model, *token, self.state.cache, self.end, self.now.reads)

    def _weigh(self) -> None:
        for event_B, (address, reads) in zip(self.inputs[EVENT:], self.now.reads.items(), strict=False):
            assert reads.w_BTR is not None
            log = self.state.logs[address]
            reads.w_BTR.copy_(log.slot_weights(event_B[:, None], log.capacity))

    # ---- what it relies on

    def _renew(self, watch: Watch, places: int) -> None:
        """Makes the buffers again, and forgets the recordings, if anything they rely on has changed."""
        logs, cache = self.state.logs, self.state.cache
        # a model without events is the frozen one, to the bit
        biased = [linear.rule.bias for linear in self.linears.values()]
        form = (cache.bucket(places), any(log.used for log in logs.values()), cache.capacity, biased)
        buffers = [log.U_BRO for log in logs.values()]
        if watch is self.watch and form == self.form and all(map(operator.is_, buffers, self.buffers)):
            return
        self.form = self.taped = None
        self.forward.forget()
        self.backward.forget()
        self.end, reading, _, _ = form
        self.first = min(self.linears)[0]
        rows, device = len(cache.lengths), self.model.device
        self.inputs = torch.zeros(EVENT + len(logs), rows, dtype=torch.int64, device=device)
        self.tape_BN = torch.zeros(rows, length(self.model, self.first), dtype=self.model.dtype, device=device)
        reads = {}
        for address, log in logs.items() if reading else ():
            w_B1R = log.U_BRO.new_zeros(rows, 1, log.capacity)
            reads[address] = Reads(
                log.U_BRO, log.K_BRI, log.bias_BR if self.linears[address].rule.bias else None, w_B1R
            )
        self.now = Pass(logs, self.inputs[POSITION][:, None], reads=reads)
        self.watch, self.buffers, self.form = watch, buffers, form
