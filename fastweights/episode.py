"""An episode: one life of the fast weights, and its verbs. What moves lies in `EpisodeState`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import snapshot as files
from .cache import KVCache
from .episode_state import Address, EpisodeState
from .feed import Reader
from .generation import Step, generate, stops
from .inputs import Ids, Mask, Update, tokens
from .model import Llama
from .plastic import new_logs, plastic_linears, weight_norm
from .probe import probe
from .probes.capture import bind
from .probes.edits import Edit
from .probes.exam import Exam
from .probes.trace import Trace
from .sampling import RowGenerator, Sampling
from .state import EventLog
from .state.drift import Drift, drift
from .state.moments import At
from .tokenizer import Tokenizer
from .waiting import check_waiting, read_again


class Episode:
    """One life of the fast weights of `model`, for `batch_size` rows that never see each other, or share one ΔW.

    An episode belongs to one thread at a time; a model may have an episode in each of several threads.

    Args:
        model: a Llama, plastic (`attach`) or not; attach before making the episode.
        max_length: KV places per row, allocated once; None grows up to `max_position_embeddings`.
        shared: all rows read and write one ΔW; KV cache and positions stay each row's own. Every row of a column of
            input_ids reads ΔW as it was before that column; then its written tokens make one event each, in the
            order of the rows. So a prompt may be split between columns and gives the same.

    Example:
        fw.attach(model, layers=[11, 12, 13], rule=fw.Hebbian(rate=0.01))
        episode = fw.Episode(model)
        logits_BTV = episode.feed(tokenizer.encode("As of August 24, 2025, the president is"))
    """

    def __init__(self, model: Llama, batch_size: int = 1, max_length: int | None = None, shared: bool = False):
        if not isinstance(model, Llama):
            raise ValueError(f"Episode() got a {type(model).__name__}, expected the model that fw.load returns")
        for name, number in (("batch_size", batch_size), ("max_length", 1 if max_length is None else max_length)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"Episode({name}={number!r}): expected a whole number, 1 or more")
        longest = model.config.max_position_embeddings
        if max_length is not None and max_length > longest:
            raise ValueError(f"Episode(max_length={max_length}): this model has positions up to {longest}")
        linears = plastic_linears(model)
        for plastic in linears.values():
            plastic.check_rows(batch_size, bool(shared))
        self.model, self.max_length = model, max_length
        logs = new_logs(linears, 1 if shared else batch_size)
        cache = model.new_cache(batch_size, max_length)
        self.state = EpisodeState(cache, logs, RowGenerator(batch_size), bool(shared))
        self.reader = Reader(model, self.state)
        self.engine = self.reader.engine
        model.binding.made = weakref.ref(self.state)

    def __repr__(self) -> str:
        shared = ", shared=True" if self.shared else ""
        path = "" if self.path is None else f", path={self.path!r}"
        return f"Episode(batch_size={self.batch_size}{shared}, length={self.length}, events={self.events}{path})"

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.state.batch_size

    @property
    def shared(self) -> bool:
        """Whether the rows read and write one ΔW."""
        return self.state.shared

    @property
    def cache(self) -> KVCache:
        """Keys and values of every layer."""
        return self.state.cache

    @property
    def logs(self) -> dict[Address, EventLog]:
        """The event log of every plastic linear, by (layer, name)."""
        return self.state.logs

    @property
    def generator(self) -> RowGenerator:
        """The random numbers of each row."""
        return self.state.generator

    @property
    def logits(self) -> Tensor | None:
        """[B, V] after the last token of each row, a copy; None before the first token."""
        logits_BV = self.state.logits_BV
        return None if logits_BV is None else logits_BV.clone()

    @property
    def token_ids(self) -> list[list[int]]:
        """The tokens that each row has read, a copy."""
        return [list(ids) for ids in self.state.token_ids]

    @property
    def length(self) -> int:
        """Tokens so far, of the longest row."""
        return self.cache.length

    @property
    def lengths(self) -> list[int]:
        """Tokens so far, of each row."""
        return self.state.lengths

    @property
    def events(self) -> int:
        """Events so far, of the row and linear with the most."""
        return max((max(log.event_counts) for log in self.logs.values()), default=0)

    @property
    def event_counts(self) -> dict[Address, list[int]]:
        """Events so far of each plastic linear, a number per row; one number where the rows share ΔW."""
        return self.state.event_counts

    @property
    def path(self) -> str | None:
        """What the last pass ran on: "modules", "cpu" or "cuda"; None before the first."""
        return self.engine.path

    @property
    def why(self) -> dict[str, str]:
        """Why the last pass did not run on the paths before it: {path: reason}."""
        return dict(self.engine.why)

    # ---- reading and writing

    def feed(
        self,
        input_ids: Ids,
        update: Update = "all",
        attention_mask: Mask = None,
        logits: str = "all",
        edits: Edit | Sequence[Edit] = (),
        graph: bool | str = False,
    ) -> Tensor:
        """Reads tokens: one pass over the model when every rule is neuron-local, token by token otherwise.

        Args:
            input_ids: [B, T] or [T], a tensor or lists; lists of different lengths are padded on the right.
            update: which tokens are written, see `inputs.written`.
            attention_mask: [B, T], 0 = padding: not read, not written, takes no position, counts nowhere.
            logits: "all": [B, T, V]; "last": [B, 1, V], the last real token of each row.
            edits: made in this feed, see `fw.Edit`; what they change is cached and written as it was changed. Feeds
                whose edits name what a plastic linear reads or writes go token by token.
            graph: True: the logits have a graph of autograd through every read and write of this feed; gradients reach
                numbers of rules that are tensors, parameters of rules that are modules, targets, and parameters of
                the model that ask for them. What was before the feed is a constant. "carry": the graph goes on into
                the next feed with "carry", until `cut`. The log gets the events as always, without a graph.

        Raises:
            ValueError: for tokens, masks, updates or edits that do not fit and for events with a non-finite factor;
                the episode is as it was before. With a graph also for gradient rules, budgets and events that overflow
                a log. Without "carry" while a graph is carried.
        """
        ids_BT, mask_BT = tokens(input_ids, attention_mask, self.batch_size, self.model.config.vocab_size)
        if logits not in ("all", "last"):
            raise ValueError(f"logits={logits!r}: expected 'all' or 'last'")
        if graph is not True and graph is not False and graph != "carry":
            raise ValueError(f"graph={graph!r}: expected True, False or 'carry'")
        bounds = bind(edits, self.model, self.engine.linears)
        with self.state.alone():
            return self.reader.read(ids_BT, mask_BT, update, False, logits, bounds, graph)

    def cut(self) -> None:
        """Ends the graph that `feed(graph="carry")` carries: what was read and written until now is a constant then.

        Logits that were given out keep their graph. Without a carried graph nothing happens. `reset`, `restore` and
        `undo` cut as well; snapshots, forks and files hold no graph and leave it alone.
        """
        with self.state.alone():
            self.state.cut()

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
        edits: Edit | Sequence[Edit] = (),
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
            edits: made in the prompt and in every generated token, as `feed` makes them; the first token that is chosen
                comes from the edited prompt.

        Raises:
            ValueError: what does not fit, before anything is read; logits that are not finite, before a choice.
        """
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        ids, vocabulary = None, self.model.config.vocab_size
        if input_ids is not None:
            ids = tokens(input_ids, attention_mask, self.batch_size, vocabulary)
        ends = self.model.config.eos_token_ids if stop_token_ids is None else stop_token_ids
        stop = stops(ends, stop_strings, include_stop_str_in_output, tokenizer)
        bounds = bind(edits, self.model, self.engine.linears)
        return generate(self.reader, ids, max_new_tokens, update, sampling, seed, stop, tokenizer, bounds)

    # ---- looking

    @torch.no_grad()
    def probe(
        self,
        input_ids: Ids | Exam,
        sites: str | Sequence[str] = (),
        layers: int | Sequence[int] | None = None,
        at: At = "now",
        edits: Edit | Sequence[Edit] = (),
        sweep: Sequence[Edit | Sequence[Edit]] | None = None,
        metric: Callable[[Tensor], Any] | None = None,
        gradient: bool = False,
        attention_mask: Mask = None,
        logits: str | None = None,
        positions: Sequence[int] | str | None = None,
        max_bytes: int = 4 << 30,
        progress: Callable[[int, int], None] | None = None,
    ) -> Trace:
        """Reads a prompt by itself, from position 0, under moments of the weights and alternatives; writes nothing.

        What is alike runs once: the layers below the first plastic one for all moments, and the layers below the first
        that an alternative edits for that alternative.

        Args:
            input_ids: [B, T], or an `fw.Exam`. One row is asked of every row of the episode, and any number of rows of
                an episode with one ΔW: of batch 1, or shared.
            sites: what to keep, one name or several of `fw.SITES`; with "resid_post" the embedding is kept as well.
            layers: of the sites inside blocks; None = all.
            at: "now"; "every" (after 0, 1, … events); an event number or `Moment`, or a list of them.
            edits: made in all of it, see `fw.Edit`.
            sweep: alternatives, each an edit or a list of them ([] = none), all in one batch with the moments.
            metric: (logits [B, T′, V]) → a number or tensor, called for each moment and alternative.
            gradient: also the gradient of the metric's sum (of an exam: of its differences) at every kept site.
            logits: "all": of the kept columns; "last": of the last real token of each row alone, whatever `positions`
                says. None: all, but none with a metric or an exam.
            positions: columns of the prompt to keep in logits and sites; "last": the last real token of each row;
                None = all.
            max_bytes: for what is kept and computed; a batch takes about a sixteenth of it.
            progress: called as (done, of) moments × alternatives after every batch. None: a bar on stderr if that is a
                terminal and there is more than one batch.

        Returns:
            A trace. Axes [M, N, L, B, T′, …]: M unless `at` is "now", N with `sweep`, L inside blocks.

        Raises:
            ValueError: tokens, sites, columns, events or places that do not exist; an edit that selects nothing; more
                than `max_bytes`.

        Example:
            trace = episode.probe(exam, sweep=[fw.ablate("z", layers=5, heads=h) for h in range(9)])
            trace.scores.difference  # [N, P]
        """
        with self.state.alone(changes=False):
            self.engine.check()
            return probe(
                self.model,
                self.state,
                self.engine.linears,
                input_ids,
                sites,
                layers,
                at,
                edits,
                sweep,
                metric,
                gradient,
                attention_mask,
                logits,
                positions,
                max_bytes,
                progress,
            )

    def drift(self) -> Drift:
        """What changed, where, and how much of it the capacity lost: per plastic linear and row, from the factors.

        Example:
            print(episode.drift())                     # a table, what moved most first
            episode.drift().rows[0].relative           # ‖ΔW‖_F / ‖W‖_F of the first plastic linear
        """
        with self.state.alone(changes=False):
            return drift(self.logs, {address: weight_norm(linear) for address, linear in self.engine.linears.items()})

    def delta_weight(self, layer: int, linear: str, row: int = 0) -> Tensor:
        """ΔW of one linear in one row, dense [O, I]."""
        with self.state.alone(changes=False):
            return self.logs[layer, linear].delta_weight(row)

    # ---- moving through time

    def reset(self) -> None:
        """Begins a new life, in the same buffers: empty KV cache, no events, position 0. The generator runs on."""
        with self.state.alone():
            self.state.reset()

    def snapshot(self) -> EpisodeState:
        """A copy of everything that moves."""
        with self.state.alone(changes=False):
            return self.state.clone()

    def restore(self, snapshot: EpisodeState) -> None:
        """Goes back to a snapshot, bit for bit. The snapshot stays good for another restore.

        Raises:
            ValueError: it has another batch size, model shape or set of plastic linears; nothing changes then.
        """
        if not isinstance(snapshot, EpisodeState):
            raise ValueError(f"restore() got a {type(snapshot).__name__}, expected what episode.snapshot() gave")
        with self.state.alone():
            self.state.copy_from(snapshot)

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
        with self.state.alone(changes=False):
            child = Episode(self.model, len(chosen), self.max_length, self.shared)
            if rows is None:
                child.state.copy_from(self.state)
                return child
            check_waiting(self.state, self.engine.linears)
            child.state.copy_from(self.state.rows(chosen))
            waits = [self.state.waits[row] for row in chosen]
            if any(waits):
                written = self.state.waits if self.shared else waits  # the one log has the events of all rows
                read_again(child.engine, waits, self.state.per_delta([int(w) for w in written]))
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
        with self.state.alone():
            for log in self.logs.values():
                for row, count in enumerate(log.event_counts):
                    if count < events:
                        raise ValueError(f"undo({events}): {log.name} has {count} events in row {row}")
                    if count - events < log.began:
                        raise ValueError(
                            f"undo({events}): {log.name} has {count} events in row {row}, of which it began with "
                            f"{log.began} (import_peft)"
                        )
                    if count - events < log.oldest_exact_moment(row):
                        raise ValueError(
                            f"undo({events}): {log.name} cannot go back behind event {log.oldest_exact_moment(row)} of "
                            f"{count} (overflow={log.overflow!r}; attach with archive=True)"
                        )
            self.state.undo(events)

    def save(self, path: str | Path) -> None:
        """Writes everything that moves into one safetensors file, JSON in its header; whole or not at all.

        Raises:
            ValueError: a gradient event waits that could not be differentiated again after loading.
        """
        with self.state.alone(changes=False):
            check_waiting(self.state, self.engine.linears)
            files.save(self.state, self.model, self.engine.linears, Path(path))

    @classmethod
    def load(cls, model: Llama, path: str | Path, max_length: int | None = None) -> Episode:
        """An episode as `save` wrote it, bit for bit; gradient events that wait are differentiated again.

        Raises:
            ValueError: the file is broken, of another version, another model or other rules.
        """
        tensors, meta = files.read(Path(path), model, plastic_linears(model))
        episode = cls(model, len(meta["lengths"]), max_length, meta.get("shared", False))
        episode.state.load_state_dict(tensors, meta)
        if any(meta["waiting"]):
            own = episode.state.per_delta([int(w) for w in meta["waiting"]])
            read_again(episode.engine, meta["waiting"], own)
        return episode
