"""One patch for many query tokens, by ridge regression: an experiment, not a theorem.

    ΔW = ΔA (HᵀH + μ I)⁻¹ Hᵀ      u_j = Σ_i ΔA_i [(G + μ I)⁻¹]_ij,  k_j = h_j,  G = HᵀH

Column i of H is what a linear reads at query token i without the context, on the stream that is patched already; column
i of ΔA is what its output lacks there: W ΔH for gate and up, and for down also the share of attention. It is the ΔW of
least ‖ΔA − ΔW H‖² + μ ‖ΔW‖², and has as many events as there are query tokens. `context_patch` is its case of one token
and μ = 0.

Shape suffixes: Q queries, T tokens of the longest, N query tokens, L layers, I in, O out, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .attach import FastWeights
from .comparison import Comparison
from .context import Run, event_of, kept, one_row, patched_linears
from .episode import Episode
from .episode_state import Address
from .inputs import Ids, tokens
from .kernels.linear import linear
from .model import Llama
from .plastic import PlasticLinear
from .reach import Reach


@dataclass(frozen=True, eq=False)
class RidgePatch:
    """A context as one change of the weights, made for some queries and read by whatever comes: an experiment.

    Attributes:
        episode: an empty life of one row whose ΔW is the patch; it reads it from its first token on, and nothing
            writes.
        tokens: the queries that the patch was made from, with the context, without it, and without it but patched.
        informed: a life that has read the context, from which `compare` goes on.
    """

    episode: Episode
    tokens: Comparison
    informed: Episode = field(repr=False)
    fast: FastWeights = field(repr=False)

    def compare(self, query_ids: Ids) -> Comparison:
        """The same of other queries [Q, T], or lists of different lengths: how far the patch carries.

        Rows of the comparison are the real tokens, query after query.
        """
        ids_QT, mask_QT = tokens(query_ids, None, None, self.episode.model.config.vocab_size)
        with self.episode.model.binding.untapped(), torch.no_grad():
            return _compare(self.informed, self.episode, ids_QT, mask_QT)


def ridge_patch(
    model: Llama,
    context_ids: Ids,
    query_ids: Ids,
    mu: float,
    layers: int | Sequence[int] | str | None = None,
) -> RidgePatch:
    """One change of the weights that serves many query tokens at once, by ridge regression. An experiment.

    The queries are read behind the context, and without it from position 0 on; the change is fitted layer by layer on
    the stream that is patched already. With mu = 0 and fewer tokens than a linear has inputs the fitted queries are met
    exactly. What it does to other queries is for `compare` to say; the theorem says nothing about them.

    A norm behind the MLP (Gemma, OLMo-2) gives no more than it can reach: each token aims at the nearest point.

    Args:
        context_ids: one row of tokens, [T] or [1, T].
        query_ids: [Q, T], or lists of different lengths: each is asked by itself.
        mu: μ ≥ 0, in units of ‖h‖².
        layers: as in `context_patch`, whose linears these are, but for a rank of as many events as there are tokens.

    Raises:
        ValueError: as `context_patch`; a mu below 0.

    Example:
        patch = fw.ridge_patch(model, context_ids, queries, mu=1.0)
        patch.tokens.difference, patch.compare(others).difference
    """
    if isinstance(mu, bool) or not isinstance(mu, Real) or not 0 <= float(mu) < float("inf"):
        raise ValueError(f"ridge_patch(mu={mu!r}): expected a number, 0 or more")
    context_1T = one_row("context_ids", context_ids, model)
    ids_QT, mask_QT = tokens(query_ids, None, None, model.config.vocab_size)
    longest = model.config.max_position_embeddings
    if context_1T.shape[1] + ids_QT.shape[1] > longest:
        raise ValueError(
            f"ridge_patch() got a context of {context_1T.shape[1]} tokens and queries of up to {ids_QT.shape[1]}, but "
            f"this model has positions up to {longest}"
        )
    count = ids_QT.numel() if mask_QT is None else int(mask_QT.sum())
    with patched_linears(model, layers, rank=count, overflow="grow", archive=False) as fast:
        informed, fitted = Episode(model), Episode(model, len(ids_QT), shared=True)
        informed.feed(context_1T, logits="last")
        behind = Run(informed.fork(rows=[0] * len(ids_QT)), fast.linears)
        behind.read(ids_QT, mask_QT)
        Fit(fitted, fast.linears, behind, float(mu)).read(ids_QT, mask_QT)
        episode = Episode(model)
        for address, log in fitted.logs.items():
            episode.logs[address].copy_from(log)
        compared = _compare(informed, episode, ids_QT, mask_QT)
    return RidgePatch(episode, compared, informed, fast)


def _compare(informed: Episode, episode: Episode, ids_QT: Tensor, mask_QT: Tensor | None) -> Comparison:
    behind = Run(informed.fork(rows=[0] * len(ids_QT)), {})
    behind.read(ids_QT, mask_QT)
    moments = [0, episode.events]
    trace = episode.probe(
        ids_QT, "resid_post", at=moments, attention_mask=mask_QT, logits="all", progress=lambda _done, _of: None
    )
    runs = [
        (kept(logits_QTV, mask_QT), kept(stream_LQTD.movedim(0, 2), mask_QT))
        for logits_QTV, stream_LQTD in zip(trace.logits, trace["resid_post"], strict=True)
    ]
    return Comparison.of(behind.seen, *runs)


class Fit(Run):
    """Writes the events of each linear just before the linear reads them, for all queries; `informed` has read them."""

    def __init__(self, episode: Episode, linears: Mapping[Address, PlasticLinear], informed: Run, mu: float):
        super().__init__(episode, linears)
        self.informed, self.mu = informed, mu

    def hooks(self, mask_BT: Tensor | None) -> Iterator[Any]:
        yield from super().hooks(mask_BT)
        for address, one in self.linears.items():
            yield one.register_forward_pre_hook(self._writer(address, one, mask_BT))

    def _writer(self, address: Address, one: PlasticLinear, mask_QT: Tensor | None) -> Callable:
        log, state = self.episode.logs[address], self.episode.state

        def hook(_module: Any, inputs: tuple) -> None:
            h_NI = kept(inputs[0], mask_QT)
            frozen_NO = linear(h_NI, one.weight, one.bias).double()
            if one.role == "down_proj":
                target_NO = self._end(address[0], mask_QT)
            else:
                target_NO = kept(self.informed.given[address], mask_QT).double()
            h_NI = h_NI.to(log.dtype)
            u_NO = _inverse(h_NI.double() @ h_NI.double().T, self.mu) @ (target_NO - frozen_NO)
            state.write(address, event_of(u_NO[None].to(log.dtype), h_NI[None]))

        return hook

    def _end(self, layer: int, mask_QT: Tensor | None) -> Tensor:
        missing_ND = kept(self.informed.stream[layer], mask_QT).double() - kept(self.base(layer), mask_QT).double()
        after = self.blocks[layer].after_mlp
        return missing_ND if after is None else torch.stack([Reach.of(after, y_D).before for y_D in missing_ND])


def _inverse(G_NN: Tensor, mu: float) -> Tensor:
    """(G + μ I)⁻¹ on what G spans, which is all that matters: with μ = 0 the limit of small μ."""
    values_N, vectors_NN = torch.linalg.eigh(G_NN)
    floor = values_N[-1] * 10 * len(G_NN) * torch.finfo(G_NN.dtype).eps
    inverse_N = torch.where(values_N > floor, 1 / (values_N.clamp(min=floor) + mu), 0.0)
    return (vectors_NN * inverse_N) @ vectors_NN.T
