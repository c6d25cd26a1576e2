"""The probe: one prompt under many moments of the fast weights, in batches that share W and the factors.

Shape suffixes: M moments, E states (ΔW of one linear) of the episode, B rows of the question, T tokens, T′ kept
columns.
Rows of a batch are moment-major: row m · B + b is question b at moment m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cache import Positions
from .episode_state import Address, EpisodeState
from .inputs import Ids, Mask, tokens
from .model import Llama
from .passes import Pass
from .probes.capture import capture, check_sites
from .state.moments import At, Moment, moments
from .watch import touched


@dataclass
class Trace:
    """What a probe saw. All tensors are copies. M is there when the probe named moments, not for "now".

    logits: [M, B, T′, V].
    sites: name → [M, L, B, T′, D], layer first: "resid_pre" before a block, "resid_mid" between attention
        and MLP, "resid_post" after the block.
    """

    logits: Tensor
    sites: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, site: str) -> Tensor:
        if site not in self.sites:
            raise KeyError(f"site {site!r} was not captured; captured are {sorted(self.sites)}")
        return self.sites[site]

    @property
    def hidden_states(self) -> Tensor:
        """Residual stream after ℓ layers, [M, L+1, B, T′, D]: 0 = embedding, L = before the final norm."""
        return torch.cat([self["embedding"], self["resid_post"]], dim=-4)


@dataclass(frozen=True)
class Question:
    """What is asked at every moment.

    ids [B, T] and positions are on the model's device. columns [T′]: which tokens are kept; None: all. last: of the
    logits, only those of each row's last real token.
    """

    ids_BT: Tensor
    positions: Positions
    sites: list[str]
    columns: Tensor | None
    last: bool

    def kept(self, x_BTD: Tensor) -> Tensor:
        """The tokens whose logits are wanted."""
        if self.last:
            return self.positions.repeat(len(x_BTD) // len(self.ids_BT)).last(x_BTD)
        return x_BTD if self.columns is None else x_BTD[:, self.columns]


def probe(
    model: Llama,
    state: EpisodeState,
    input_ids: Ids,
    sites: Sequence[str],
    at: At,
    attention_mask: Mask,
    logits: str,
    positions: Sequence[int] | None,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> Trace:
    """See `Episode.probe`."""
    if logits not in ("all", "last"):
        raise ValueError(f"logits={logits!r}: expected 'all' or 'last'")
    ids_BT, mask_BT = tokens(input_ids, attention_mask, None, model.config.vocab_size)
    width = ids_BT.shape[1]
    if width > model.config.max_position_embeddings:
        raise ValueError(
            f"a probe of {width} tokens does not fit: this model has positions up to "
            f"{model.config.max_position_embeddings}"
        )
    if len(ids_BT) == 1:
        ids_BT = ids_BT.expand(state.batch_size, -1)
        mask_BT = None if mask_BT is None else mask_BT.expand(state.batch_size, -1)
    elif len(ids_BT) != state.batch_size and state.states != 1:
        raise ValueError(f"probe() got batch {len(ids_BT)}, but this episode has batch {state.batch_size}")
    columns = None if positions is None else torch.as_tensor(positions, dtype=torch.int64).to(model.device)
    if columns is not None and (not len(columns) or int(columns.min()) < 0 or int(columns.max()) >= width):
        raise ValueError(f"probe(positions={columns.tolist()}): expected columns from 0 to {width - 1}")
    latest = max((max(log.event_counts) for log in state.logs.values()), default=0)
    wanted = None if isinstance(at, str) and at == "now" else moments(at, latest, state.logs)
    there = Positions.alone((len(ids_BT), width), mask_BT, model.device)
    question = Question(ids_BT.to(model.device), there, check_sites(sites), columns, logits == "last")
    if wanted is None:
        trace = _ask(model, state, question, [None], progress)
        return Trace(trace.logits[0], {site: x[0] for site, x in trace.sites.items()})
    return _ask(model, state, question, _batches(model, state, question, wanted, memory_bytes), progress)


def _ask(
    model: Llama,
    state: EpisodeState,
    question: Question,
    batches: Sequence[list[Moment] | None],
    progress: Callable[[int, int], None] | None,
) -> Trace:
    """Runs the question batch by batch (None: as it is now); layers below the first plastic one run once.

    Somebody's hook on the whole model is to see the whole model: then every batch runs all of it.
    """
    whole = touched(model) or touched(model.model)
    first = 0 if whole else min((layer for layer, _ in state.logs), default=0)
    now, positions = Pass(state.logs, question.positions.position_BT), question.positions
    parts = []
    with model.binding.bound(now, state):
        with capture(model, question.sites, question.columns) as low:
            x_BTD = None
            if not whole:
                x_BTD = model.model.blocks(model.model.embed_tokens(question.ids_BT), positions, stop=first)
        for batch in batches:
            times = 1 if batch is None else len(batch)
            if batch is not None:
                now.slot_weights = _weights(state, batch, len(question.ids_BT))
            with capture(model, question.sites, question.columns) as high:
                there = positions.repeat(times)
                if x_BTD is None:
                    out_BTV = model(question.ids_BT.repeat(times, 1), positions=there)
                    logits_BTV = question.kept(out_BTV)
                else:
                    y_BTD = model.model.blocks(x_BTD.repeat(times, 1, 1), there, start=first)
                    logits_BTV = model.unembed(question.kept(y_BTD))
            seen = {site: _stacked(low[site], high[site], times) for site in low}
            parts.append((logits_BTV.unflatten(0, (times, -1)), seen))
            if progress is not None:
                progress(sum(len(logits) for logits, _ in parts), sum(len(b or [None]) for b in batches))
    return Trace(
        torch.cat([logits for logits, _ in parts]),
        {site: torch.cat([seen[site] for _, seen in parts]) for site in parts[0][1]},
    )


def _stacked(low: list[Tensor], high: list[Tensor], times: int) -> Tensor:
    """[M, L, B, T′, D] of one site: what ran once is the same at every moment."""
    split = [x.unflatten(0, (times, -1)) for x in high]
    return torch.stack([*(x.expand(times, *x.shape) for x in low), *split], dim=1)


def _weights(state: EpisodeState, batch: list[Moment], rows: int) -> dict[Address, Tensor]:
    """w of every linear: [E, M, slots], or [1, M · B, slots] where one ΔW answers every question."""
    weights = {}
    for address, log in state.logs.items():
        w_EMR = torch.stack(
            [torch.stack([m.slot_weights(log, address, row) for m in batch]) for row in range(state.states)]
        )
        weights[address] = w_EMR.repeat_interleave(rows, dim=1) if state.states == 1 else w_EMR
    return weights


def _batches(
    model: Llama, state: EpisodeState, question: Question, moments: list[Moment], memory_bytes: int
) -> list[list[Moment]]:
    """As many moments at once as the memory holds: activations of one block, kept sites, logits."""
    config, (rows, tokens) = model.config, question.ids_BT.shape
    kept = tokens if question.columns is None else len(question.columns)
    slots = max((log.used for log in state.logs.values()), default=0)
    per_token = 8 * config.hidden_size + 6 * config.intermediate_size + 2 * slots
    numbers = tokens * per_token + (1 if question.last else kept) * 2 * config.vocab_size
    numbers += kept * 2 * len(question.sites) * config.num_hidden_layers * config.hidden_size
    size = max(1, memory_bytes // (rows * numbers * model.dtype.itemsize))
    return [moments[n : n + size] for n in range(0, len(moments), size)]
