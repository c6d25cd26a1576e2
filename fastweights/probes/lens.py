"""What an activation says in tokens: the lens, ranks, what heads write, and the stream as a sum of its parts.

Shape suffixes: H heads, K key/value heads, E head width, D model width, V vocabulary, N tokens, C parts, L layers,
B rows, T′ columns.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..cache import Positions
from ..inputs import whole_numbers
from ..model import Llama, RMSNorm


class Seen(Protocol):
    """What `decompose` reads of a trace."""

    @property
    def sites(self) -> Mapping[str, Tensor]: ...

    @property
    def layers(self) -> Mapping[str, list[int]]: ...


def lens(model: Llama, hidden: Tensor, norm: bool = True) -> Tensor:
    """Logits [.., V] that a residual stream would give if the model ended there: final norm, then lm_head.

    Args:
        hidden: [.., D], on any device, cast to the model's dtype.
        norm: False leaves the final norm out, and the cap on logits where there is one: what directions add to the
            logits before it is the sum of what each adds.

    Raises:
        ValueError: the last axis is not the model's width.

    The modules run, so hooks on the final norm and on lm_head are part of it.
    """
    D = model.config.hidden_size
    if hidden.dim() == 0 or hidden.shape[-1] != D:
        raise ValueError(f"lens() got hidden {list(hidden.shape)}, expected [.., {D}], the model's width")
    hidden = hidden.to(device=model.device, dtype=model.dtype)
    return model.unembed(hidden) if norm else model.lm_head(hidden)


def rank(logits: Tensor, token_ids: int | Iterable | Tensor) -> Tensor:
    """How many tokens stand strictly higher than each of `token_ids`, [..] int64; 0 = the first choice.

    Args:
        logits: [.., V]; of log-probabilities and probabilities it is the same. A NaN counts as higher.
        token_ids: one id, or a tensor or list of ids that broadcasts against the axes before V.

    Raises:
        ValueError: an id that is no whole number or outside the vocabulary, or shapes that do not broadcast.
    """
    if logits.dim() == 0:
        raise ValueError("rank() got logits without an axis, expected [.., V]")
    V = logits.shape[-1]
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"rank() got token_ids={token_ids!r}: expected whole numbers") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"rank() got token_ids of {ids.dtype}, expected whole numbers")
    if (outside := ids[(ids < 0) | (ids >= V)]).numel():
        raise ValueError(f"rank() got the token id {int(outside[0])}, which is outside the vocabulary of {V}")
    try:
        shape = torch.broadcast_shapes(logits.shape[:-1], ids.shape)
    except RuntimeError:
        raise ValueError(
            f"rank() got token_ids {list(ids.shape)}, which do not broadcast against {list(logits.shape[:-1])}"
        ) from None
    ids = ids.to(logits.device, torch.int64).expand(shape)
    logits = logits.detach().expand(*shape, V)
    return higher(logits, logits.gather(-1, ids[..., None]))


def higher(logits: Tensor, own: Tensor) -> Tensor:
    """How many of logits [.., V] are not at most `own` [.., 1], so that a NaN counts: [..] int64."""
    return logits.shape[-1] - (logits <= own).sum(-1)


def ov(model: Llama, layer: int, token_ids: int | Iterable[int] | Tensor) -> Tensor:
    """Logits [H, N, V] of what each head of a layer writes when it attends to one of these tokens alone.

    Each token runs by itself, at position 0, through the embedding and block 0. What that gives is read by the
    layer's attention norm, v_proj and the head's part of o_proj, and what the head writes by `lens`. With grouped
    queries, head h has the v of key/value head h // (H / K). Biases of o_proj belong to no head and stay out. A norm
    behind attention is given what the head writes alone.

    Args:
        token_ids: N ids.

    Raises:
        ValueError: a layer or an id that does not exist.
    """
    config = model.config
    depth, V, E = config.num_hidden_layers, config.vocab_size, config.head_dim
    if isinstance(layer, bool) or not hasattr(layer, "__index__") or not 0 <= operator.index(layer) < depth:
        raise ValueError(f"layer {layer!r} does not exist: this model has layers 0 to {depth - 1}")
    ids = whole_numbers("token_ids", token_ids)
    if not ids:
        raise ValueError("ov() got no token_ids, expected at least one")
    if max(ids) >= V:
        raise ValueError(f"ov() got the token id {max(ids)}, which is outside the vocabulary of {V}")
    ids_N1 = torch.tensor(ids, device=model.device)[:, None]
    alone = Positions.alone((len(ids), 1), None, model.device)
    x_ND = model.model.blocks(model.model.embed(ids_N1, alone.position_BT), alone, stop=1)[:, 0]
    block = model.model.layers[layer]
    before, attention = block.before_attention, block.self_attn
    _, _, v_NK1E = attention.project((x_ND if before is None else before(x_ND))[:, None])
    v_NHE = v_NK1E[:, :, 0].repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)
    o_DHE = attention.o_proj.weight.unflatten(-1, (-1, E))
    written_HND = torch.einsum("nhe,dhe->hnd", v_NHE, o_DHE)
    return lens(model, written_HND if block.after_attention is None else block.after_attention(written_HND))


def decompose(model: Llama, trace: Seen) -> tuple[list[str], Tensor]:
    """The final norm's output as a sum over who wrote into the stream: names [C], parts [C, .., B, T′, D].

    The norm's scale is that of the whole stream, and held fixed: each part is multiplied by it and by the norm's
    weight, under LayerNorm without its mean over D. So parts @ lm_head's rows are the direct contributions to the
    logits (before a cap). A norm behind attention is held fixed alike for the heads before it.

    Args:
        trace: of `probe` with the sites "embedding", "mlp_out" and "attn_out" or "result" of all layers; with both,
            "result" is taken. Its axes before B stay.

    Returns:
        The names "embedding", and by layer "L0 H0", "L0 H1", … ("result") or "L0 attn" ("attn_out"), with "result"
        and a bias in o_proj "L0 attn_bias", and "L0 mlp"; last "norm bias" where the final norm has a bias. The parts
        have the trace's dtype.

    Raises:
        ValueError: a site or a layer that the trace does not hold, a norm of somebody's own, or parts that do not sum
            to the trace's "final_norm" (if it is there), because an edit changed the stream between them.
    """
    heads = "result" in trace.sites
    attention = "result" if heads else "attn_out"
    depth = model.config.num_hidden_layers
    for site in ("embedding", attention, "mlp_out"):
        if site not in trace.sites:
            name = "'attn_out' or 'result'" if site == "attn_out" else repr(site)
            raise ValueError(
                f"decompose() needs the site {name}, and this trace holds {', '.join(trace.sites) or 'none'}"
            )
        if site != "embedding" and (missing := sorted({*range(depth)} - {*trace.layers[site]})):
            raise ValueError(f"decompose() needs {site!r} of all {depth} layers, and layer {missing[0]} is missing")
    embedding = trace.sites["embedding"]
    names, parts = ["embedding"], [embedding]
    for layer in range(depth):
        here = {site: trace.layers[site].index(layer) for site in (attention, "mlp_out")}
        if heads:
            block = model.model.layers[layer]
            written = list(trace.sites["result"].select(-5, here["result"]).unbind(-2))
            names += [f"L{layer} H{head}" for head in range(len(written))]
            bias_D = block.self_attn.o_proj.bias
            if isinstance(bias_D, Tensor):
                names.append(f"L{layer} attn_bias")
                written.append(bias_D.to(embedding).expand_as(embedding))
            if block.after_attention is not None:
                scale = _scale(block.after_attention, _sum(written)).to(embedding.dtype)
                written = [part * scale for part in written]
            parts += written
        else:
            names.append(f"L{layer} attn")
            parts.append(trace.sites["attn_out"].select(-4, here["attn_out"]))
        names.append(f"L{layer} mlp")
        parts.append(trace.sites["mlp_out"].select(-4, here["mlp_out"]))
    norm, whole = model.model.norm, _sum(parts)
    if isinstance(norm, nn.LayerNorm):
        parts, whole = [part - part.mean(-1, keepdim=True) for part in parts], whole - whole.mean(-1, keepdim=True)
    scale, bias_D = _scale(norm, whole), getattr(norm, "bias", None)
    if "final_norm" in trace.sites:
        _check(whole * scale + (0 if bias_D is None else bias_D), trace.sites["final_norm"])
    scale = scale.to(embedding.dtype)
    stacked = torch.stack(parts)
    stacked = stacked.mul_(scale) if not stacked.requires_grad else stacked * scale
    if bias_D is None:
        return names, stacked
    return [*names, "norm bias"], torch.cat([stacked, bias_D.to(embedding).expand_as(stacked[:1])])


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """In float64."""
    first, *others = parts
    whole = first.to(torch.float64)
    for part in others:
        whole = whole + part
    return whole


def _scale(norm: nn.Module, x_BTD: Tensor) -> Tensor:
    """What a norm multiplies x by, [.., D]; LayerNorm's x has lost its mean."""
    if not isinstance(norm, RMSNorm | nn.LayerNorm):
        found = type(norm).__name__
        raise ValueError(f"decompose() knows the scales of RMSNorm and LayerNorm, and this model has a {found}")
    factor = norm.weight if isinstance(norm, nn.LayerNorm) else norm.factor
    return (x_BTD.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * factor.to(x_BTD)


def _check(sum_BTD: Tensor, seen_BTD: Tensor) -> None:
    """Refuses parts that are not the stream: an edit in between adds what no part holds."""
    apart = float((sum_BTD - seen_BTD).norm() / seen_BTD.double().norm())
    if not apart <= min(0.05, 30 * torch.finfo(seen_BTD.dtype).eps ** 0.75):
        raise ValueError(
            f"decompose(): the parts do not sum to this trace's final_norm (relative difference {apart:.1e}), "
            "so an edit changed the stream between them"
        )
