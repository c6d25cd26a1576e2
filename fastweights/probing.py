"""The probe: one prompt under many moments of the fast weights, in batches that share W and the factors.

Shape suffixes: M moments, E states (ΔW of one linear) of the episode, B rows of the question, T tokens, T′ kept
columns.
Rows of a batch are moment-major: row m · B + b is question b at moment m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .model import Span
from .passes import Pass
from .plastic import bound
from .probes.capture import capture
from .state.moments import Moment

if TYPE_CHECKING:
    from .episode import Episode


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


def run(
    episode: Episode,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    sites: Sequence[str],
    moments: list[Moment] | None,
    columns: Tensor | None,
    last: bool,
    budget_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> Trace:
    """Runs the question at every moment (None: now); the layers below the first plastic one run once."""
    model, device = episode.model, episode.model.device
    span = Span.fresh((ids_BT.shape[0], ids_BT.shape[1]), mask_BT, device)
    columns = None if columns is None else columns.to(device)
    first = min((layer for layer, _ in episode.logs), default=0)
    now = Pass(episode.logs, span.position_BT)
    with bound(model, episode, now):
        with capture(model, sites, columns) as low:
            x_BTD = model.blocks(model.model.embed_tokens(ids_BT.to(device)), span, stop=first)
        # the last block's MLP runs for the columns alone that are kept, unless somebody's hook is to see them all
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.model.layers[-1].modules())
        narrow = None if last or hooked else columns
        parts = []
        batches = (
            [None]
            if moments is None
            else _batches(episode, moments, len(ids_BT), span, sites, columns, last, budget_bytes)
        )
        for batch in batches:
            times = 1 if batch is None else len(batch)
            if batch is not None:
                now.weights = _weights(episode, batch, len(ids_BT))
            with capture(model, sites, columns, narrowed=narrow is not None) as high:
                there = span.repeat(times)
                y_BTD = model.blocks(x_BTD.repeat(times, 1, 1), there, start=first, columns=narrow)
            if columns is not None and narrow is None and not last:
                y_BTD = y_BTD[:, columns]
            y_BTD = there.last(y_BTD) if last else y_BTD
            logits = model.unembed(y_BTD).unflatten(0, (times, -1))
            parts.append((logits, {site: _stacked(low[site], high[site], times) for site in low}))
            if progress is not None:
                progress(sum(len(logits) for logits, _ in parts), len(moments or [None]))
    trace = Trace(
        torch.cat([logits for logits, _ in parts]),
        {site: torch.cat([seen[site] for _, seen in parts]) for site in parts[0][1]},
    )
    if moments is None:
        trace = Trace(trace.logits[0], {site: x[0] for site, x in trace.sites.items()})
    return trace


def _stacked(low: list[Tensor], high: list[Tensor], times: int) -> Tensor:
    """[M, L, B, T′, D] of one site: what ran once is the same at every moment."""
    split = [x.unflatten(0, (times, -1)) for x in high]
    return torch.stack([*(x.expand(times, *x.shape) for x in low), *split], dim=1)


def _weights(episode: Episode, batch: list[Moment], rows: int) -> dict[tuple[int, str], Tensor]:
    """w of every linear: [E, M, slots], or [1, M · B, slots] where one ΔW answers every question."""
    weights = {}
    for site, log in episode.logs.items():
        w_EMR = torch.stack(
            [torch.stack([m.slot_weights(log, site, row) for m in batch]) for row in range(episode.states)]
        )
        weights[site] = w_EMR.repeat_interleave(rows, dim=1) if episode.states == 1 else w_EMR
    return weights


def _batches(
    episode: Episode,
    moments: list[Moment],
    rows: int,
    span: Span,
    sites: Sequence[str],
    columns: Tensor | None,
    last: bool,
    budget_bytes: int,
) -> list[list[Moment]]:
    """As many moments at once as the budget holds: activations of one block, kept sites, logits."""
    config, tokens = episode.model.config, span.position_BT.shape[1]
    kept = tokens if columns is None else len(columns)
    slots = max((log.used for log in episode.logs.values()), default=0)
    per_token = 8 * config.hidden_size + 6 * config.intermediate_size + 2 * slots
    numbers = tokens * per_token + (1 if last else kept) * 2 * config.vocab_size
    numbers += kept * 2 * len(sites) * config.num_hidden_layers * config.hidden_size
    size = max(1, budget_bytes // (rows * numbers * episode.model.dtype.itemsize))
    return [moments[n : n + size] for n in range(0, len(moments), size)]
