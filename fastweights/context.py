"""A context as rank-1 events: the model without the context gives what it gave with it, token by token.

Dherin et al. 2025 (arXiv 2507.16003) for one linear, Goldwaser et al. 2025 (arXiv 2511.17864) for whole blocks. At each
query token, with C for the run behind the context and without it for the run on the stream that is patched already:

    gate, up (or both in one linear)   ΔW = (a_C − a) hᵀ / ‖h‖²              so the MLP's neurons do what they did
    down                               ΔW = (d − W act) actᵀ / ‖act‖²        with  base + norm(d) = the stream in C

base is the stream without the MLP's share: x + attention. So `down` carries what attention lacks, as well in blocks
whose attention and MLP read the same x. a_C − a is W (h_C − h) in exact arithmetic; taken from what the linears gave,
it is right to the last bit in half precision, too.

A norm behind the MLP (Gemma, OLMo-2) gives vectors d w / rms alone, which lie in an ellipsoid. Where the stream in C
lies outside of it, the nearest point of it is taken; layers below the last then aim at where the last layer ends
instead of where they ended themselves, as many as it takes. See `Reach`.

Shape suffixes: T query tokens, L layers, I in, O out, D model width, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .attach import FastWeights, attach, detach
from .comparison import Comparison
from .episode import Episode
from .episode_state import Address
from .inputs import Ids, tokens
from .kernels.linear import linear
from .model import Llama, RMSNorm
from .plastic import PlasticLinear, plastic_linears, weight_norm
from .rules import ContextPatch
from .state.events import Events

Progress = Callable[[int, int], None]
MORE = 8  # attempts with all layers aiming at the end: each knows better what the layers between add


@dataclass(frozen=True, eq=False)
class Patch:
    """A context as events, and what they do. Tensors are float64 or float32 copies on the CPU.

    Attributes:
        episode: a life without the context that has read the query at its absolute positions. Event n of every patched
            linear belongs to query token n − 1, and was there when that token was read. A linear reads its newest event
            alone, so what follows reads the last token's; nothing that follows writes.
        tokens: the query tokens with the context, without it, and without it but with their events.
        query_ids: [T].
        start: the absolute position of the first query token: how many tokens the context has.
    """

    episode: Episode
    tokens: Comparison
    query_ids: Tensor
    start: int
    fast: FastWeights = field(repr=False)

    @property
    def logits(self) -> Tensor:
        """[V] after the last query token, without the context, with its events."""
        return self.tokens.patched[-1]

    @property
    def reference_logits(self) -> Tensor:
        """[V] after the last query token, with the context."""
        return self.tokens.reference[-1]

    @property
    def unpatched_logits(self) -> Tensor:
        """[V] after the last query token, without the context and without events."""
        return self.tokens.unpatched[-1]

    @property
    def layer_error(self) -> Tensor:
        """[L]: ‖stream − stream_C‖ / ‖stream_C‖ behind each layer, at the last query token."""
        return self.tokens.layer_error[-1]

    @property
    def unpatched_layer_error(self) -> Tensor:
        """The same [L] without events."""
        return self.tokens.unpatched_layer_error[-1]

    @cached_property
    def norms(self) -> dict[Address, Tensor]:
        """‖ΔW‖_F / ‖W‖_F of each query token's event, [T], of every patched linear."""
        logs, linears = self.episode.logs, self.fast.linears
        return {a: logs[a].event_norms(0)[: len(self.query_ids)] / weight_norm(linears[a]) for a in linears}

    def replay(self, weight: Callable[[int, Address], float] | None = None) -> Tensor:
        """Logits [T, V] of the query in a fresh life without the context, each token with its events put in before it.

        Args:
            weight: (query token from 0, (layer, linear)) → factor on that event; 0 leaves it out. None: all weigh 1.

        Example:
            patch.replay(lambda token, at: at != (5, "down_proj"))  # without one event of each token
        """
        episode = _begun(self.episode.model, self.start)
        logits = []
        for token, ids in enumerate(self.query_ids):
            with episode.state.alone(), episode.state.attempt():
                for address in self.fast.linears:
                    U_BRO, K_BRI, *_ = self.episode.logs[address].moment_factors()
                    u, k = U_BRO[:1, token : token + 1], K_BRI[:1, token : token + 1]
                    share = 1.0 if weight is None else float(weight(token, address))
                    episode.state.write(address, _event(u * share, k))
            logits.append(episode.feed(ids[None, None], update="none")[0, 0].cpu())
        return torch.stack(logits)


def context_patch(
    model: Llama,
    context_ids: Ids,
    query_ids: Ids,
    layers: int | Sequence[int] | str | None = None,
    progress: Progress | None = None,
) -> Patch:
    """The rank-1 events that make the model without a context give the logits that it gave with it.

    Each query token has an event in every MLP linear of the chosen layers: three for a gated MLP, two for a plain one
    or where gate and up are one linear. The query is read without the context at its absolute positions; its tokens see
    each other. The events of a token are made for that token: that they serve others is no claim.

    Over all layers this is exact to rounding, and for a norm behind the MLP too wherever the last layers can reach the
    stream (see the module): then single layers differ, as `layer_error` shows. Over chosen layers, the stream behind
    each of them is right and the others change it again.

    The linears are made plastic by `fw.ContextPatch`, a rule that writes nothing by itself, and stay so: `fw.detach`
    puts the model back. Further patches of the same linears may follow.

    Args:
        context_ids, query_ids: one row of tokens each, [T] or [1, T].
        layers: numbers as in `attach`; None: all.
        progress: called as (query tokens done, query tokens).

    Raises:
        ValueError: tokens or layers that do not fit, a model that is plastic otherwise, an input of norm 0, or an event
            that is not finite; the model is as it was then.

    Example:
        patch = fw.context_patch(model, tokenizer.encode(context), tokenizer.encode(question))
        patch.tokens.difference, patch.tokens.unpatched_difference  # largest logit difference, with and without events
    """
    context_1T, query_1T = one_row("context_ids", context_ids, model), one_row("query_ids", query_ids, model)
    start, count, longest = context_1T.shape[1], query_1T.shape[1], model.config.max_position_embeddings
    if start + count > longest:
        raise ValueError(
            f"context_patch() got a context of {start} tokens and a query of {count}, but this model has positions up "
            f"to {longest}"
        )
    with patched_linears(model, layers, rank=1, overflow="evict", archive=True) as fast:
        informed, bare, episode = Episode(model), _begun(model, start), _begun(model, start)
        informed.feed(context_1T, logits="last")
        runs = [_Run(informed, fast.linears), _Run(bare, {}), _Patched(episode, fast.linears)]
        for token in range(count):
            for run in runs:
                run.read(query_1T[:, token : token + 1], runs[0])
            if progress is not None:
                progress(token + 1, count)
        compared = Comparison.of(*(run.seen for run in runs))
    return Patch(episode, compared, query_1T[0].clone(), start, fast)


# ---- what was given, understood or refused


def one_row(name: str, ids: Ids, model: Llama) -> Tensor:
    """[1, T] on the CPU."""
    if not isinstance(model, Llama):
        raise ValueError(f"context_patch() got a {type(model).__name__}, expected the model that fw.load returns")
    try:
        ids_BT, mask_BT = tokens(ids, None, 1, model.config.vocab_size)
    except ValueError as error:
        raise ValueError(f"context_patch({name}=...): {error}") from None
    if mask_BT is not None:
        raise ValueError(f"context_patch({name}=...) got padding: expected one row of tokens")
    return ids_BT


@contextlib.contextmanager
def patched_linears(
    model: Llama, layers: int | Sequence[int] | str | None, rank: int, **options: Any
) -> Iterator[FastWeights]:
    """The MLP linears of these layers under `ContextPatch`; made so, for good unless what runs inside fails.

    Raises:
        ValueError: linears are plastic already, by other options; nothing changes then.
    """
    before = plastic_linears(model)
    if before:
        if not _alike(model, before, layers, rank, options):
            said = ", ".join(sorted({type(linear.rule).__name__ for linear in before.values()}))
            raise ValueError(
                f"context_patch() got a model with {len(before)} plastic linears ({said}), which are not those of "
                "this patch: fw.detach(model) first"
            )
        fast = FastWeights(model, before)
    else:
        fast = attach(model, "all" if layers is None else layers, ContextPatch(), None, rank, **options)
    try:
        with model.binding.untapped(), torch.no_grad():
            yield fast
    except BaseException:
        if not before:
            detach(model)
        raise


def _alike(model: Llama, plastic: Mapping[Address, PlasticLinear], layers: Any, rank: int, options: Mapping) -> bool:
    """Whether these are the linears that `attach` would make of the same layers and options."""
    depth = model.config.num_hidden_layers
    every = range(depth) if layers is None or layers == "all" else [layers] if isinstance(layers, int) else layers
    wanted = {(layer % depth, name) for layer in every for name in model.config.family.linears}
    form = {"rank": rank, **options}
    return plastic.keys() == wanted and all(
        isinstance(one.rule, ContextPatch) and all(getattr(one, key) == value for key, value in form.items())
        for one in plastic.values()
    )


# ---- the runs


def _begun(model: Llama, position: int) -> Episode:
    """An empty life whose first token stands at a later position, and sees nothing before itself."""
    episode = Episode(model)
    episode.state.cache.begin_at(position)
    return episode


def _event(u_11O: Tensor, k_11I: Tensor) -> Events:
    return Events(u_11O, k_11I, None, torch.ones(1, 1, dtype=torch.bool, device="cpu"), True)


class _Run:
    """Reads tokens one by one, on the modules; keeps the logits and the stream behind every layer.

    given: what each of the named linears gave for the last token, [1, 1, O]. stream: behind each layer, [1, 1, D].
    """

    def __init__(self, episode: Episode, linears: Mapping[Address, PlasticLinear]):
        self.episode, self.linears = episode, linears
        self.blocks = [*episode.model.model.layers]
        self.given: dict[Address, Tensor] = {}
        self.stream: dict[int, Tensor] = {}
        self._logits: list[Tensor] = []
        self._streams: list[Tensor] = []

    def read(self, ids_11: Tensor, informed: _Run) -> None:
        """One token; `informed` has read it behind the context."""
        with contextlib.ExitStack() as stack:
            for handle in self.hooks(informed):
                stack.callback(handle.remove)
            logits_11V = self.episode.feed(ids_11, update="none")
        self._logits.append(logits_11V[0, 0].cpu())
        self._streams.append(torch.stack([self.stream[layer][0, 0] for layer in range(len(self.blocks))]).cpu())

    def hooks(self, informed: _Run) -> Iterator[Any]:
        """The hooks of one token; the caller removes them."""
        for layer, block in enumerate(self.blocks):
            yield block.register_forward_hook(_into(self.stream, layer))
        for address, one in self.linears.items():
            yield one.register_forward_hook(_into(self.given, address))

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and streams [T, L, D]."""
        return torch.stack(self._logits), torch.stack(self._streams)


def _into(found: dict, key: Any) -> Callable:
    def hook(_module: Any, _inputs: Any, out: Tensor) -> None:
        found[key] = out.detach()

    return hook


class _OutOfReach(Exception):
    """The last patched layer cannot reach its stream; another attempt aims at it from further below."""


class _Patched(_Run):
    """Writes the event of each linear just before the linear reads it, from what it has read so far."""

    def __init__(self, episode: Episode, linears: Mapping[Address, PlasticLinear]):
        super().__init__(episode, linears)
        self.patched = sorted({layer for layer, _ in linears})
        self.x: dict[int, Tensor] = {}  # before each block
        self.added: dict[int, Tensor] = {}  # by each block, but what we choose
        self.ahead, self.give_up = 1, False  # so many of the patched layers aim at the end of the last

    def read(self, ids_11: Tensor, informed: _Run) -> None:
        depth = len(self.patched)
        attempts = [min(2**n, depth) for n in range(depth.bit_length() + MORE)]
        for number, self.ahead in enumerate(attempts, 1):
            self.give_up = number == len(attempts)
            with contextlib.suppress(_OutOfReach):  # the feed is undone
                return super().read(ids_11, informed)

    def hooks(self, informed: _Run) -> Iterator[Any]:
        for layer, block in enumerate(self.blocks):
            yield block.register_forward_pre_hook(self._before(layer))
            yield (block.after_attention or block.self_attn).register_forward_hook(_into(self.added, layer))
            if layer not in self.patched:
                yield block.register_forward_hook(self._behind(layer))
        yield from super().hooks(informed)  # they keep the stream, and what linears gave
        for address, one in self.linears.items():
            yield one.register_forward_pre_hook(self._writer(address, one, informed))

    def _before(self, layer: int) -> Callable:
        def hook(_module: Any, inputs: tuple) -> None:
            self.x[layer] = inputs[0]

        return hook

    def _behind(self, layer: int) -> Callable:
        def hook(_module: Any, _inputs: Any, out: Tensor) -> None:
            self.added[layer] = out - self.x[layer]

        return hook

    def _writer(self, address: Address, one: PlasticLinear, informed: _Run) -> Callable:
        log, state = self.episode.logs[address], self.episode.state

        def hook(_module: Any, inputs: tuple) -> None:
            h_11I = inputs[0].to(log.dtype)
            square = h_11I.square().sum(-1, keepdim=True)
            if not bool(square):
                raise ValueError(
                    f"{one.name}: query token {state.lengths[0]} has an input of norm 0 there, and no event acts on it"
                )
            frozen_11O = linear(inputs[0], one.weight, one.bias).to(log.dtype)
            down = one.role == "down_proj"
            target_11O = self._end(address[0], informed) if down else informed.given[address]
            state.write(address, _event(target_11O.to(log.dtype) - frozen_11O, h_11I / square))

        return hook

    def _end(self, layer: int, informed: _Run) -> Tensor:
        """What `down` must give so that the stream behind the block is the one with the context, or near it."""
        block = self.blocks[layer]
        wide = self.episode.logs[layer, block.mlp.names["down_proj"]].dtype
        # the sum as the block makes it
        missing = informed.stream[layer].to(wide) - (self.x[layer] + self.added[layer]).to(wide)
        if block.after_mlp is None:
            return missing
        last = self.patched[-1]
        if layer in self.patched[-self.ahead :] and layer != last:
            between = (self.added[n].to(wide) for n in range(layer + 1, last + 1))  # of the attempt before
            missing = informed.stream[last].to(wide) - (self.x[layer] + self.added[layer]).to(wide)
            missing = missing - sum(between, torch.zeros_like(missing))
        reach = Reach.of(block.after_mlp, missing[0, 0])
        if layer == last and not reach.exact and not self.give_up:
            raise _OutOfReach
        return reach.before.expand_as(missing)


@dataclass(frozen=True)
class Reach:
    """The input of an RMS norm that makes it give a vector, or the nearest that it can give.

    With factor w it gives y = w d / √(mean d² + eps), so mean (y / w)² < 1. Such a y is given by d = (y / w) √(s + eps)
    with s = mean d² = eps ρ² / (1 − ρ²), ρ² = mean (y / w)². Any other is replaced by the nearest of ρ² = 1 − 1e-6:
    y_i ← y_i w_i² / (w_i² + λ), with the λ > 0 that fits.

    before: d [D]. exact: whether y itself is given.
    """

    before: Tensor
    exact: bool

    @classmethod
    def of(cls, norm: RMSNorm, y_D: Tensor) -> Reach:
        """Computed in float64."""
        y, w, most = y_D.double(), norm.factor.double(), 1 - 1e-6
        ratio = torch.where(w == 0, 0.0, y / w)
        exact = bool(ratio.square().mean() <= most) and not bool(((w == 0) & (y != 0)).any())
        if not exact:
            least, largest = torch.zeros_like(y[0]), (y * w).square().mean().sqrt() / most + w.square().max()
            for _ in range(80):  # the mean falls as λ grows
                middle = (least + largest) / 2
                inside = (y * w / (w.square() + middle)).square().mean() <= most
                least, largest = torch.where(inside, least, middle), torch.where(inside, middle, largest)
            ratio = y * w / (w.square() + largest)
        rho = ratio.square().mean()
        square = norm.eps * rho / (1 - rho)
        return cls((ratio * (square + norm.eps).sqrt()).to(y_D.dtype), exact)
