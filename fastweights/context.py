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
from .model import Llama
from .plastic import PlasticLinear, plastic_linears, weight_norm
from .reach import Reach
from .rules import ContextPatch
from .state.events import Events
from .state.moments import Moment

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

    def at(self, token: int, **changes: Any) -> Moment:
        """The moment of one query token's events, for `episode.probe(at=...)`; changes: other fields of `fw.Moment`.

        A probe reads from position 0, so it gives that token's logits if it is asked the token alone, the token is the
        first of the query, and positions are rope's.
        """
        if not 0 <= token < len(self.query_ids):
            raise ValueError(f"at({token}): expected a query token from 0 to {len(self.query_ids) - 1}")
        return Moment(token + 1, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the logits and the events themselves, as JSON holds it."""
        runs = {"reference": self.tokens.reference, "unpatched": self.tokens.unpatched, "patched": self.tokens.patched}
        return {
            "query_ids": self.query_ids.tolist(),
            "start": self.start,
            "layers": sorted({layer for layer, _ in self.fast.linears}),
            **self.tokens.to_dict(),
            "choices": {name: logits_TV.argmax(-1).tolist() for name, logits_TV in runs.items()},
            "norms": {f"{layer}.{name}": norm_T.tolist() for (layer, name), norm_T in self.norms.items()},
        }

    def replay(self, weight: Callable[[int, Address], float] | None = None) -> Tensor:
        """Logits [T, V] of the query in a fresh life without the context, each token with its events put in before it.

        Args:
            weight: (query token from 0, (layer, linear)) → factor on that event; 0 leaves it out. None: all weigh 1.

        Raises:
            ValueError: the model is no longer plastic as it was.

        Example:
            patch.replay(lambda token, at: at != (5, "down_proj"))  # without one event of each token
        """
        self.episode.engine.check()
        episode, logits = begun(self.episode.model, self.start), []
        for token, ids in enumerate(self.query_ids):
            with episode.state.alone(), episode.state.attempt():
                for address in self.fast.linears:
                    U_BRO, K_BRI, *_ = self.episode.logs[address].moment_factors()
                    u, k = U_BRO[:1, token : token + 1], K_BRI[:1, token : token + 1]
                    share = 1.0 if weight is None else float(weight(token, address))
                    episode.state.write(address, event_of(u * share, k))
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
        informed, bare, episode = Episode(model), begun(model, start), begun(model, start)
        informed.feed(context_1T, logits="last")
        runs = [Run(informed, fast.linears), Run(bare, {})]
        runs.append(Patched(episode, fast.linears, runs[0]))
        for token in range(count):
            for run in runs:
                run.read(query_1T[:, token : token + 1])
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
    before, options = plastic_linears(model), {"backend": "torch", **options}
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
    numbers = [layer for layer in every if isinstance(layer, int)]  # of anything else `attach` says what is wrong
    wanted = {(layer % depth, name) for layer in numbers for name in model.config.family.linears}
    form = {"rank": rank, **options}
    return plastic.keys() == wanted and all(
        isinstance(one.rule, ContextPatch) and all(getattr(one, key) == value for key, value in form.items())
        for one in plastic.values()
    )


# ---- the runs


def begun(model: Llama, position: int) -> Episode:
    """An empty life whose first token stands at a later position, and sees nothing before itself."""
    episode = Episode(model)
    episode.state.cache.begin_at(position)
    return episode


def kept(x_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The real tokens of [B, T, …], row after row, [N, …]."""
    return x_BT.flatten(0, 1) if mask_BT is None else x_BT[mask_BT.to(x_BT.device)]


class Run:
    """Feeds of one life on the modules; keeps the logits of all, and what the blocks saw of the last.

    Attributes:
        x: the stream before each block, [B, T, D]. added: what attention adds to it. stream: behind each block.
        given: what each of the named linears gave, [B, T, O].
    """

    def __init__(self, episode: Episode, linears: Mapping[Address, PlasticLinear]):
        self.episode, self.linears = episode, linears
        self.blocks = [*episode.model.model.layers]
        self.x: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}
        self.stream: dict[int, Tensor] = {}
        self.given: dict[Address, Tensor] = {}
        self.fed: list[tuple[Tensor, Tensor]] = []

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> None:
        """Feeds some tokens, which write nothing."""
        with contextlib.ExitStack() as stack:
            for handle in self.hooks(mask_BT):
                stack.callback(handle.remove)
            logits_BTV = self.episode.feed(ids_BT, "none", mask_BT)
        stream_NLD = torch.stack([kept(self.stream[layer], mask_BT) for layer in range(len(self.blocks))], dim=1)
        self.fed.append((kept(logits_BTV, mask_BT).cpu(), stream_NLD.cpu()))

    def hooks(self, mask_BT: Tensor | None) -> Iterator[Any]:
        """The hooks of one feed, which the caller removes."""
        for layer, block in enumerate(self.blocks):
            yield block.register_forward_pre_hook(_before(self.x, layer))
            yield (block.after_attention or block.self_attn).register_forward_hook(_behind(self.added, layer))
            yield block.register_forward_hook(_behind(self.stream, layer))
        for address, one in self.linears.items():
            yield one.register_forward_hook(_behind(self.given, address))

    def base(self, layer: int) -> Tensor:
        """The stream without the MLP's share, as the block sums it up."""
        return self.x[layer] + self.added[layer]

    @property
    def seen(self) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and streams [N, L, D] of all that was fed."""
        return joined(self.fed)


def joined(fed: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits [N, V] and streams [N, L, D] of several feeds as of one."""
    logits, streams = zip(*fed, strict=True)
    return torch.cat(logits), torch.cat(streams)


def _before(found: dict, key: Any) -> Callable:
    def hook(_module: Any, inputs: tuple) -> None:
        found[key] = inputs[0]

    return hook


def _behind(found: dict, key: Any) -> Callable:
    def hook(_module: Any, _inputs: Any, out: Tensor) -> None:
        found[key] = out

    return hook


class _OutOfReach(Exception):
    """The last patched layer cannot reach its stream; another attempt aims at it from further below."""


class Patched(Run):
    """Writes the event of each linear just before the linear reads it; `informed` has read the same token."""

    def __init__(self, episode: Episode, linears: Mapping[Address, PlasticLinear], informed: Run):
        super().__init__(episode, linears)
        self.informed = informed
        self.layers = sorted({layer for layer, _ in linears})
        self.ahead, self.give_up = 1, False  # so many of the patched layers aim at the end of the last

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> None:
        depth = len(self.layers)
        attempts = [min(2**n, depth) for n in range(depth.bit_length() + MORE)]
        for number, self.ahead in enumerate(attempts, 1):
            self.give_up = number == len(attempts)
            with contextlib.suppress(_OutOfReach):  # the feed is undone
                return super().read(ids_BT, mask_BT)

    def hooks(self, mask_BT: Tensor | None) -> Iterator[Any]:
        yield from super().hooks(mask_BT)
        for address, one in self.linears.items():
            yield one.register_forward_pre_hook(self._writer(address, one))

    def _writer(self, address: Address, one: PlasticLinear) -> Callable:
        log, state = self.episode.logs[address], self.episode.state

        def hook(_module: Any, inputs: tuple) -> None:
            h_11I = inputs[0].to(log.dtype)
            square = h_11I.square().sum(-1, keepdim=True)
            if not bool(square):
                raise ValueError(
                    f"{one.name} reads an input of norm 0 at position {state.lengths[0]}, on which no event acts: "
                    "expected another input, or layers without it"
                )
            state.write(address, event_of(self.value(address, one, inputs[0]), h_11I / square))

        return hook

    def value(self, address: Address, one: PlasticLinear, h_11I: Tensor) -> Tensor:
        """What the linear's output lacks, [1, 1, O], in the precision of the factors."""
        dtype = self.episode.logs[address].dtype
        target_11O = self._end(address[0], dtype) if one.role == "down_proj" else self.informed.given[address]
        return target_11O.to(dtype) - linear(h_11I, one.weight, one.bias).to(dtype)

    def _end(self, layer: int, dtype: torch.dtype) -> Tensor:
        """What `down` must give so that the stream behind the block is the one with the context, or near it."""
        base, after, last = self.base(layer).to(dtype), self.blocks[layer].after_mlp, self.layers[-1]
        missing = self.informed.stream[layer].to(dtype) - base
        if after is None:
            return missing
        if layer in self.layers[-self.ahead : -1]:
            missing = self.informed.stream[last].to(dtype) - base - self._between(layer, last).to(dtype)
        reach = Reach.of(after, missing[0, 0])
        if layer == last and not reach.exact and not self.give_up:
            raise _OutOfReach
        return reach.before.expand_as(missing)

    def _between(self, layer: int, last: int) -> Tensor:
        """What everything but the MLPs that are patched added behind a layer in the attempt before."""
        added = [self.added[n] for n in range(layer + 1, last + 1)]
        added += [self.stream[n] - self.base(n) for n in range(layer + 1, last) if n not in self.layers]
        return torch.stack(added).sum(0)


def event_of(u_1TO: Tensor, k_1TI: Tensor) -> Events:
    """Events of one row, all written."""
    return Events(u_1TO, k_1TI, None, torch.ones(u_1TO.shape[:2], dtype=torch.bool, device="cpu"), True)
