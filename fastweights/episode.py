"""An episode: one life of the fast weights, and everything that moves in it.

KV cache, event logs, position, pending gradient events and the random generator live and are copied together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from . import fused
from .budget import OneByOne
from .captured import Captured, graphed
from .drift import Drift, drift
from .events import Events, side_by_side
from .generation import Step, Texts, generate, stops
from .inputs import Ids, Mask, Update, tokens, written
from .model import Llama, Span
from .moments import At, moments
from .options import check_rows, check_targets, weight_norm
from .passes import Pass, Site
from .plastic import bound, last_ran, plastic_linears
from .probes.capture import check_sites
from .probing import Trace, run
from .rules import event_value, key_scale
from .sampling import RowGenerator, Sampling
from .snapshot import Pending, Snapshot, load, save
from .stacks import Stacks
from .state import EventLog
from .tokenizer import Tokenizer


class Episode:
    """One life of the fast weights of `model`, for `batch_size` rows that never see each other, or share one ΔW.

    Args:
        model: a Llama, plastic (`attach`) or not; attach before making the episode.
        max_length: KV slots per row, allocated once; None grows up to `max_position_embeddings`.
        shared: all rows read and write one ΔW; KV cache and positions stay each row's own. Every row of a column of
            input_ids reads ΔW as it was before that column; then its written tokens make one event each, in the
            order of the rows. So a prompt may be split between columns and gives the same.

    Example:
        fw.attach(model, layers=[11, 12, 13], rule=fw.Hebbian(rate=0.01))
        episode = fw.Episode(model)
        logits_BTV = episode.feed(tokenizer.encode("As of August 24, 2025, the president is"))
    """

    def __init__(self, model: Llama, batch_size: int = 1, max_length: int | None = None, shared: bool = False):
        for name, number in (("batch_size", batch_size), ("max_length", 1 if max_length is None else max_length)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"Episode({name}={number!r}): expected a whole number, 1 or more")
        longest = model.config.max_position_embeddings
        if max_length is not None and max_length > longest:
            raise ValueError(f"Episode(max_length={max_length}): this model has positions up to {longest}")
        self.model, self.batch_size, self.max_length, self.shared = model, batch_size, max_length, bool(shared)
        self._linears = plastic_linears(model)
        check_rows(self._linears, batch_size, self.shared)
        self._stacks: Stacks | None = None
        self._table: fused.Table | None = None  # by which the plastic linears were last looked at
        self.generator = RowGenerator(batch_size)
        self.cache = model.new_cache(batch_size, max_length)
        self.logs = {site: linear.new_log(self.states) for site, linear in self._linears.items()}
        record = graphed if model.device.type == "cuda" else None
        self.captured = Captured(model, self._linears, self.cache, self.logs, record)
        self.reset()
        last_ran(model, self)

    def __repr__(self) -> str:
        shared = ", shared=True" if self.shared else ""
        return f"Episode(batch_size={self.batch_size}{shared}, length={self.length}, events={self.events})"

    def reset(self) -> None:
        """Begins a new life, in the same buffers: empty KV cache, no events, position 0. The generator runs on."""
        self.cache.rewind([0] * self.batch_size)
        for log in self.logs.values():
            log.clear()
        self.texts: Texts | None = None  # of the rows that `generate` wrote last
        self.pending: list[Pending] = []
        self.logits_BV: Tensor | None = None  # after the last token of each row
        self.seen: list[list[int]] = [[] for _ in range(self.batch_size)]  # each row's tokens
        self._before: dict[Site, list[int]] = {}  # events of each log when the feed that runs now began
        self._kept: dict[Site, EventLog] = {}  # logs as they were before this feed overwrote something

    @property
    def states(self) -> int:
        """How many ΔW a linear has: one per row, or one for all of them."""
        return 1 if self.shared else self.batch_size

    @property
    def length(self) -> int:
        """Tokens so far, of the longest row; `lengths` has each row's."""
        return max(self.cache.lengths)

    @property
    def lengths(self) -> list[int]:
        return list(self.cache.lengths)

    @property
    def events(self) -> int:
        """Events so far, of the row and linear with the most; `event_counts` has each."""
        return max((max(log.events) for log in self.logs.values()), default=0)

    @property
    def event_counts(self) -> dict[Site, list[int]]:
        """Events so far of each plastic linear, a number per row; one number where the rows share ΔW."""
        return {site: list(log.events) for site, log in self.logs.items()}

    # ---- reading and writing

    @torch.no_grad()
    def feed(
        self,
        input_ids: Ids,
        update: Update = "all",
        attention_mask: Mask = None,
        logits: str = "all",
    ) -> Tensor:
        """Reads tokens: one pass over the model when every rule is neuron-local, token by token otherwise.

        Args:
            input_ids: [B, T] or [T], a tensor or lists; lists of different lengths are padded on the right.
            update: which tokens are written, see `update.written`.
            attention_mask: [B, T], 0 = padding: not read, not written, takes no position, counts nowhere.
            logits: "all": [B, T, V]; "last": [B, 1, V], the last real token of each row.

        Raises:
            ValueError: for tokens, masks or updates that do not fit and for events with a non-finite factor;
                the episode is as it was before.
        """
        ids_BT, mask_BT = tokens(input_ids, attention_mask, self.batch_size, self.model.config.vocab_size)
        if logits not in ("all", "last"):
            raise ValueError(f"logits={logits!r}: expected 'all' or 'last'")
        return self._feed(ids_BT, mask_BT, update, generated=False, logits=logits)

    def _feed(self, ids_BT: Tensor, mask_BT: Tensor | None, update: Update, generated: bool, logits: str) -> Tensor:
        table = fused.usable(self.model, self.batch_size) if ids_BT.shape[1] == 1 else None
        if table is None or table is not self._table:  # as long as a table stands, every module is where it was
            if self._linears != plastic_linears(self.model):
                raise ValueError("attach() or detach() changed this model after the episode was made: make a new one")
            began, now = ((t.dtype, t.device) for t in (self.cache.keys[0], self.model.lm_head.weight))
            if began != now:
                raise ValueError(
                    f"this episode began with a model in {began[0]} on {began[1]}, which is in {now[0]} on {now[1]} "
                    "now: make a new one"
                )
            self._table = table
        span = self.cache.span((ids_BT.shape[0], ids_BT.shape[1]), mask_BT, torch.device("cpu"))
        write_BT = written(update, ids_BT, span.position_BT, generated)
        if span.real_BT is not None:
            write_BT = write_BT & span.real_BT
        check_targets(self._linears, self.batch_size, span.position_BT, write_BT)
        step = self._check_room(span, write_BT)
        self.cache.reserve(span.end)
        try:
            out_BTV, last_BV = self._read(ids_BT, write_BT, span, logits, step, table)
        except OneByOne:
            out_BTV, last_BV = self._read(ids_BT, write_BT, span, logits, True, None)
        if self.logits_BV is not None and span.real_BT is not None:
            last_BV = torch.where(span.real_BT.any(1, keepdim=True).to(last_BV.device), last_BV, self.logits_BV)
        # a caller may change, or drop, what `feed` returns; `generate` hands out nothing of its last pass
        self.logits_BV = last_BV if generated else last_BV.clone()
        for seen, ids, row in zip(self.seen, ids_BT, range(self.batch_size), strict=True):
            seen.extend((ids if span.real_BT is None else ids[span.real_BT[row]]).tolist())
        return out_BTV

    def _read(
        self, ids_BT: Tensor, write_BT: Tensor, span: Span, logits: str, step: bool, table: fused.Table | None
    ) -> tuple[Tensor, Tensor]:
        """Logits, and those of the last token [B, V], in one pass or (`step`) token by token; all of it or nothing."""
        with self._whole_or_not_at_all():
            if not step:
                if self.pending:
                    real_BT = _real(span, ids_BT)
                    first_B = real_BT.int().argmax(1, keepdim=True)
                    self._settle(ids_BT.gather(1, first_B)[:, 0], real_BT.any(1))
                out_BTV = self._pass(ids_BT, span, write_BT, logits, table)
                return out_BTV, span.last(out_BTV)[:, 0]
            columns, real_BT = [], _real(span, ids_BT)
            for t in range(ids_BT.shape[1]):
                self._settle(ids_BT[:, t], real_BT[:, t])
                column = slice(t, t + 1)
                here = self.cache.span((self.batch_size, 1), real_BT[:, column], torch.device("cpu"))
                table = fused.usable(self.model, self.batch_size)
                columns.append(self._pass(ids_BT[:, column], here, write_BT[:, column], "all", table))
            out_BTV = torch.cat(columns, dim=1)
            last_B1V = span.last(out_BTV)
            return out_BTV if logits == "all" else last_B1V, last_B1V[:, 0]

    @contextlib.contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Puts back everything that moves if what runs inside fails."""
        lengths, pending = self.lengths, list(self.pending)
        self._before, self._kept = self.event_counts, {}
        try:
            yield
        except BaseException:
            self.cache.rewind(lengths)
            self.pending = pending
            for site, log in self.logs.items():
                if site in self._kept:
                    log.become(self._kept[site])
                log.roll_back(self._before[site])
            raise
        finally:
            self._kept = {}

    def _keep(self, site: Site, counts: Sequence[int]) -> None:
        """Copies a log before a write after which the events written since `_before` could not be taken back."""
        log, before = self.logs[site], self._before[site]
        since = [now - then + c for now, then, c in zip(log.events, before, counts, strict=True)]
        if site not in self._kept and not log.slots.fits(before, since):
            self._kept[site] = log.clone()

    def _check_room(self, span: Span, write_BT: Tensor) -> bool:
        """Refuses what the logs could not take; says whether the tokens must go through one by one."""
        if not self._linears:
            return False
        counts = write_BT.sum(1).tolist()
        later, step = counts, False
        if not all(linear.rule.neuron_local for linear in self._linears.values()):
            real_BT = _real(span, write_BT)
            # a gradient event waits for the next token: the last token's is not written in this feed
            followed_BT = real_BT.flip(1).cumsum(1).flip(1) > 1
            known_B = real_BT.any(1)
            due = [sum(bool(p.rows_B[row] & known_B[row]) for p in self.pending) for row in range(len(counts))]
            later = [d + c for d, c in zip(due, (write_BT & followed_BT).sum(1).tolist(), strict=True)]
            # rows that share ΔW see each other's waiting events: none may come before its column
            late_B = known_B & ~real_BT[:, 0]
            step = any(counts) or (self.shared and any(bool((p.rows_B & late_B).any()) for p in self.pending))
        for site, log in self.logs.items():
            if log.overflow == "error":
                log.check_room(self._per_state(counts if self._linears[site].rule.neuron_local else later))
        return step

    def _per_state(self, counts: list[int]) -> list[int]:
        """Events to come of each row as events to come of each ΔW."""
        return [sum(counts)] if self.shared else counts

    def _pass(
        self, ids_BT: Tensor, span: Span, write_BT: Tensor, logits: str, table: fused.Table | None = None
    ) -> Tensor:
        """One forward pass over the model, and its events.

        A single token of each row takes the captured step where there is one, or the fused step where a `table` of the
        model stands, with the same effect.
        """
        real_BT, device, counts = span.real_BT, self.model.device, write_BT.sum(1).tolist()
        if self.captured.suits(ids_BT.shape[1]):
            return self.captured.step(self, ids_BT, real_BT, write_BT)
        if device.type != "cpu":
            span = self.cache.span((ids_BT.shape[0], ids_BT.shape[1]), real_BT, device)
        write = write_BT.to(device) if any(counts) else None
        whole = sum(counts) == write_BT.numel()
        now = Pass(self.logs, span.position_BT, write, self._per_state(counts), whole)
        if self.states < self.batch_size and write is not None:
            row_BT = torch.arange(self.batch_size, device=device)[:, None].expand(write.shape)
            now.width, now.row_BT = self.batch_size, side_by_side(row_BT)
            now.position_BT, now.write_BT = side_by_side(span.position_BT), side_by_side(write)
        for site, linear in self._linears.items():
            if write is not None and linear.rule.neuron_local:
                self._keep(site, now.counts)
        taping = write is not None and any(not linear.rule.neuron_local for linear in self._linears.values())
        if table is not None and not taping and (out_BTV := self._fused(table, ids_BT, span, now)) is not None:
            return out_BTV
        before = self.event_counts
        with bound(self.model, self, now), torch.set_grad_enabled(taping):
            out_BTV = self.model(ids_BT.to(device), real_BT, self.cache, logits)
            if now.taped:
                logprob_BV = out_BTV[:, -1].log_softmax(-1, dtype=torch.promote_types(out_BTV.dtype, torch.float32))
                self.pending.append(Pending(logprob_BV, now.taped, write_BT[:, 0], before))
        return out_BTV.detach()

    def _fused(self, table: fused.Table, ids_B1: Tensor, span: Span, now: Pass) -> Tensor | None:
        """`_pass` by the fused step; None where the modules must run."""
        if self._stacks is None or not self._stacks.stands():
            self._stacks = Stacks(self._linears, self.batch_size, len(self.model.model.layers))
        stacks = self._stacks
        if not stacks.take(now):
            return None
        records = stacks.read(now) if self._linears else table.frozen
        out_B1V = fused.run(self.model, table, ids_B1, span, self.cache, *records)
        if out_B1V is None:
            return None
        last_ran(self.model, self)
        self.cache.advance(span)
        if now.write_BT is not None:
            self._commit(stacks.write(now, span.position_BT))
        return out_B1V

    def _settle(self, next_B: Tensor, known_B: Tensor) -> None:
        """Writes the gradient events whose next token is known now; next [B] ids, known [B] bool, on the CPU."""
        still = []
        events: dict[Site, Events] = {}
        for pending in self.pending:
            rows_B = pending.rows_B & known_B
            if rows_B.any():
                row = rows_B.nonzero()[:, 0]
                with torch.enable_grad():
                    logprob = pending.logprob_BV[row.to(self.model.device), next_B[row].to(self.model.device)].sum()
                tapes = list(pending.taped.values())
                # kept, because a snapshot or fork may hold the same graph
                grads = torch.autograd.grad(logprob, [a for a, _ in tapes], retain_graph=True)
                write_B1 = rows_B[:, None].to(self.model.device)
                for site, (_, h_BTI), grad_BTO in zip(pending.taped, tapes, grads, strict=True):
                    rule = self._linears[site].rule
                    scale_BT = key_scale(rule, h_BTI.square().sum(-1))
                    k_BTI = h_BTI * scale_BT[..., None]
                    u_BTO = event_value(rule, grad_BTO, k_BTI.norm(dim=-1))
                    new = Events(u_BTO, k_BTI, scale_BT if rule.bias else None, write_B1)
                    events[site] = events[site].joined(new) if site in events else new
            if (pending.rows_B & ~known_B).any():
                still.append(replace(pending, rows_B=pending.rows_B & ~known_B))
        if self.shared:
            events = {site: new.side_by_side() for site, new in events.items()}
        for site, new in events.items():
            self._keep(site, new.counts)
        self._commit(events)
        self.pending = still

    def _commit(self, events: dict[Site, Events]) -> None:
        events = {site: self.logs[site].measured(new) for site, new in events.items()}
        for site, new in events.items():
            self.logs[site].check(new)
        for site, new in events.items():
            self.logs[site].write(new)

    def generate(
        self,
        input_ids: Ids | None = None,
        max_new_tokens: int | None = None,
        *,
        update: Update = "generated",
        attention_mask: Mask = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | Sequence[int] | None = None,
        stop_token_ids: int | Sequence[int] | None = None,
        stop_strings: str | Sequence[str] = (),
        include_stop_str_in_output: bool = True,
        tokenizer: Tokenizer | None = None,
    ) -> Iterator[Step]:
        """Reads a prompt, then chooses, reads and (as `update` says) writes one token after the other.

        When a step is yielded its tokens have been read, so a probe sees the weights after them; a caller
        may stop at any step, and go on from there with `generate()` without a prompt.

        Args:
            input_ids: the prompt, as in `feed`; None goes on from the tokens read so far.
            max_new_tokens: None = 64, or fewer where the KV cache is full before; a number must fit.
            update: "generated" (default), "prompt", "all", "none", or as in `feed`.
            temperature, top_k, top_p, min_p, repetition_penalty: see `fw.Sampling`; 0 = greedy.
            seed: starts the random numbers again; row b draws what a row alone draws with seed + b. A list has
                one seed per row. None goes on drawing (a new episode begins as with seed 0).
            stop_token_ids: tokens that end a row; None = the model's eos_token_ids, () = none.
            stop_strings: texts that end a row at the token that completes one; needs `tokenizer`.
            include_stop_str_in_output: False leaves the stop string, or the stop token, out of `Step.text`.
            tokenizer: fills `Step.text`.

        Raises:
            ValueError: what does not fit, before anything is read; logits that are not finite, before a choice.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        ids, vocabulary = None, self.model.config.vocab_size
        if input_ids is not None:
            ids = tokens(input_ids, attention_mask, self.batch_size, vocabulary)
        ends = self.model.config.eos_token_ids if stop_token_ids is None else stop_token_ids
        stop = stops(ends, stop_strings, include_stop_str_in_output, tokenizer)
        return generate(self, ids, max_new_tokens, update, sampling, seed, stop, tokenizer)

    # ---- looking

    @torch.no_grad()
    def probe(
        self,
        input_ids: Ids,
        sites: Sequence[str] = (),
        at: At = "now",
        attention_mask: Mask = None,
        logits: str = "all",
        positions: Sequence[int] | None = None,
        budget_bytes: int = 1 << 28,
        progress: Callable[[int, int], None] | None = None,
    ) -> Trace:
        """Reads a prompt by itself, from position 0, under one or many moments of the fast weights; writes nothing.

        Args:
            input_ids: [B, T]; one row is asked of every row of the episode, and any number of rows of an episode
                with one ΔW: of batch 1, or shared.
            sites: "resid_pre", "resid_mid", "resid_post".
            at: "now"; "every" (after 0, 1, … events); or a list of event numbers and `Moment`s.
            logits: "all", or "last": only the last real token of each row.
            positions: columns of the prompt to keep in logits and sites; None = all.
            budget_bytes: about how much memory one batch of moments may take; at least one runs at a time.
            progress: called as (moments done, moments) after every batch.

        Returns:
            A trace: `logits` [B, T, V], `trace[site]` [L, B, T, D], `hidden_states` [L+1, B, T, D]; each with
            the moments in front, [M, …], unless `at` is "now".

        Raises:
            ValueError: tokens, sites, columns or events that do not exist.
        """
        if self._linears != plastic_linears(self.model):
            raise ValueError("attach() or detach() changed this model after the episode was made: make a new one")
        if logits not in ("all", "last"):
            raise ValueError(f"logits={logits!r}: expected 'all' or 'last'")
        ids_BT, mask_BT = tokens(input_ids, attention_mask, None, self.model.config.vocab_size)
        width = ids_BT.shape[1]
        if width > self.model.config.max_position_embeddings:
            raise ValueError(
                f"a probe of {width} tokens does not fit: this model has positions up to "
                f"{self.model.config.max_position_embeddings}"
            )
        if len(ids_BT) == 1:
            ids_BT = ids_BT.expand(self.batch_size, -1)
            mask_BT = None if mask_BT is None else mask_BT.expand(self.batch_size, -1)
        elif len(ids_BT) != self.batch_size and self.states != 1:
            raise ValueError(f"probe() got batch {len(ids_BT)}, but this episode has batch {self.batch_size}")
        columns = None if positions is None else torch.tensor(list(positions), dtype=torch.int64)
        if columns is not None and (not len(columns) or int(columns.min()) < 0 or int(columns.max()) >= width):
            raise ValueError(f"probe(positions={list(positions or [])}): expected columns from 0 to {width - 1}")
        wanted = None if at == "now" else moments(at, self.events, self.logs)
        return run(self, ids_BT, mask_BT, check_sites(sites), wanted, columns, logits == "last", budget_bytes, progress)

    def drift(self) -> Drift:
        """What changed, where, and how much of it the capacity lost: per plastic linear and row, from the factors.

        Example:
            print(episode.drift())                     # a table, what moved most first
            episode.drift().rows[0].relative           # ‖ΔW‖_F / ‖W‖_F of the first plastic linear
        """
        return drift(self.logs, {site: weight_norm(linear) for site, linear in self._linears.items()})

    # ---- moving through time

    def snapshot(self) -> Snapshot:
        """A copy of everything that moves."""
        end = self.length
        return Snapshot(
            lengths=self.lengths,
            keys=[k[:, :, :end].clone() for k in self.cache.keys],
            values=[v[:, :, :end].clone() for v in self.cache.values],
            logs={site: log.clone() for site, log in self.logs.items()},
            pending=list(self.pending),
            logits_BV=None if self.logits_BV is None else self.logits_BV.clone(),
            seen=[list(ids) for ids in self.seen],
            generator=self.generator.get_state(),
            shared=self.shared,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot, bit for bit. The snapshot stays good for another restore.

        Raises:
            ValueError: it has another batch size, model shape or set of plastic linears; nothing changes then.
        """
        if not isinstance(snapshot, Snapshot):
            raise ValueError(f"restore() got a {type(snapshot).__name__}, expected what episode.snapshot() gave")
        if len(snapshot.lengths) != self.batch_size:
            raise ValueError(
                f"restore() got a snapshot of batch {len(snapshot.lengths)}, "
                f"but this episode has batch {self.batch_size}"
            )
        if snapshot.shared != self.shared:
            raise ValueError(
                f"restore() got a snapshot with shared={snapshot.shared}, but this episode has shared={self.shared}"
            )
        if snapshot.logs.keys() != self.logs.keys():
            raise ValueError(
                f"restore() got a snapshot with plastic linears {sorted(snapshot.logs)}, "
                f"but this episode has {sorted(self.logs)}"
            )
        for site, log in snapshot.logs.items():
            self.logs[site].check_form(log.form(), "snapshot's")
        end = max(snapshot.lengths)
        self.cache.reserve(end)
        self.cache.lengths = list(snapshot.lengths)
        for buffers, saved in ((self.cache.keys, snapshot.keys), (self.cache.values, snapshot.values)):
            for buffer, copy in zip(buffers, saved, strict=True):
                buffer[:, :, :end], buffer[:, :, end:] = copy, 0
        for site, log in snapshot.logs.items():
            self.logs[site].become(log)
        self.pending = list(snapshot.pending)
        self.logits_BV = None if snapshot.logits_BV is None else snapshot.logits_BV.clone()
        self.seen = [list(ids) for ids in snapshot.seen]
        self.generator.set_state(snapshot.generator)

    def fork(self, rows: Sequence[int] | None = None) -> Episode:
        """An episode of its own with the same past; neither ever changes the other.

        Args:
            rows: for each row of the fork, the row of this episode whose past it has: `fork(rows=[0] * 8)`
                makes eight continuations of row 0. None = the same rows. A rate per row belongs to the row of
                the fork, not to the past it goes on from. Rows that share one ΔW go on sharing it.

        Raises:
            ValueError: rows that do not exist, or not as many as a rule has rates.
        """
        if isinstance(rows, int):
            raise ValueError(f"fork(rows={rows}): expected a list of rows")
        chosen = list(range(self.batch_size)) if rows is None else list(rows)
        if not chosen or any(not isinstance(r, int) or not 0 <= r < self.batch_size for r in chosen):
            raise ValueError(f"fork(rows={chosen}): this episode has rows 0 to {self.batch_size - 1}")
        child = Episode(self.model, len(chosen), self.max_length, self.shared)
        if rows is not None:
            self._check_waiting()
        snapshot = self.snapshot()
        child.restore(snapshot if rows is None else snapshot.rows(chosen))
        waiting_B = torch.tensor([snapshot.waiting[row] for row in chosen])
        if rows is not None and waiting_B.any():
            written_B = torch.tensor(snapshot.waiting) if self.shared else waiting_B  # the one log has them all
            child._wait_again(waiting_B, self._per_state(written_B.long().tolist()))
        return child

    def __deepcopy__(self, memo: dict) -> Episode:
        """`fork()`, with the same model: the fast paths know buffers by their addresses, which must not be copied."""
        return self.fork()

    def __getstate__(self) -> NoReturn:
        raise TypeError("an episode is neither pickled nor copied shallowly: save() and load() it, or fork() it")

    def undo(self, events: int = 1) -> None:
        """ΔW as it was before the last `events` events of every row; the KV cache keeps what was read with them.

        Raises:
            ValueError: a row has fewer events, or an overflow without an archive has made one of them for ever
                part of a sum; nothing changes then.
        """
        if isinstance(events, bool) or not isinstance(events, int) or events < 0:
            raise ValueError(f"undo({events!r}): expected a whole number, 0 or more")
        for log in self.logs.values():
            for row, count in enumerate(log.events):
                if count < events:
                    raise ValueError(f"undo({events}): {log.name} has {count} events in row {row}")
                if count - events < log.oldest_exact_moment(row):
                    raise ValueError(
                        f"undo({events}): {log.name} cannot go back behind event {log.oldest_exact_moment(row)} of "
                        f"{count} (overflow={log.overflow!r}; attach with archive=True)"
                    )
        for log in self.logs.values():
            log.rewind([count - events for count in log.events])
        if events:  # what waits was read with weights that are no more
            self.pending = [replace(p, events=dict.fromkeys(p.events, [-1] * self.states)) for p in self.pending]

    def save(self, path: str | Path) -> None:
        """Writes everything that moves into one safetensors file, JSON in its header; whole or not at all.

        Raises:
            ValueError: a gradient event waits that could not be differentiated again after loading.
        """
        self._check_waiting()
        save(self.snapshot(), self.model, self._linears, Path(path))

    @classmethod
    def load(cls, model: Llama, path: str | Path, max_length: int | None = None) -> Episode:
        """An episode as `save` wrote it, bit for bit; gradient events that wait are differentiated again.

        Raises:
            ValueError: the file is broken, of another version, another model or other rules.
        """
        linears = plastic_linears(model)
        snapshot, waiting = load(Path(path), model, linears)
        episode = cls(model, len(snapshot.lengths), max_length, snapshot.shared)
        episode.restore(snapshot)
        if any(waiting):
            waiting_B = torch.tensor(waiting)
            episode._wait_again(waiting_B, episode._per_state(waiting_B.long().tolist()))
        return episode

    def _check_waiting(self) -> None:
        """Refuses where `_wait_again` would not see the weights that the waiting token was read with."""
        for pending in self.pending:
            for row, count in enumerate(self._per_state(pending.rows_B.long().tolist())):
                for site, log in self.logs.items():
                    then, own = pending.events[site][row], count if self._linears[site].rule.neuron_local else 0
                    if count and (log.events[row] != then + own or then < log.oldest_exact_moment(row)):
                        since = "an undo, an overflow" + (", another row's event" if self.shared else "")
                        raise ValueError(
                            f"a gradient event of row {row} waits for its next token, and {log.name} no longer holds "
                            f"the weights it was read with ({since} since): feed the next token first"
                        )

    @torch.no_grad()
    def _wait_again(self, waiting_B: Tensor, own: Sequence[int]) -> None:
        """Reads the last token of some rows once more, as it was read before its `own` events, for its graph."""
        before = self.snapshot()
        for site, log in self.logs.items():
            if self._linears[site].rule.neuron_local:
                log.rewind([n - c for n, c in zip(log.events, own, strict=True)])
        self.cache.lengths = [n - int(w) for n, w in zip(self.lengths, waiting_B.tolist(), strict=True)]
        last_B1 = torch.tensor([[ids[-1]] if ids else [0] for ids in self.seen])
        span = self.cache.span((self.batch_size, 1), waiting_B[:, None], torch.device("cpu"))
        with self._whole_or_not_at_all():
            self._pass(last_B1, span, waiting_B[:, None], "all")
        pending = self.pending
        self.restore(before)
        self.pending = pending

    def delta_weight(self, layer: int, linear: str, row: int = 0) -> Tensor:
        """ΔW of one linear in one row, dense [O, I]."""
        return self.logs[layer, linear].delta_weight(row)


def _real(span: Span, like_BT: Tensor) -> Tensor:
    """Which tokens are not padding, [B, T]."""
    return torch.ones_like(like_BT, dtype=torch.bool) if span.real_BT is None else span.real_BT
