"""The gradient of one token, by hand: a forward that leaves a tape, and the way back from it.

∂ log p(next token) / ∂a of a plastic linear, with earlier keys and values held constant, needs one token of each row
alone. So its backward is one product with each weight, transposed, from the logits down to the first plastic layer,
and no graph. The token's own key and value are not constant: they depend on the layers below.

Shape suffixes as in `model`; F width of an MLP, N numbers of one row of a tape, S places of the cache, G query heads
that share a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache, Positions
from .episode_state import Address, EpisodeState
from .kernels.attention import attention
from .kernels.linear import product_back
from .kernels.read import read
from .model import Llama, RMSNorm, rotate
from .plastic import PlasticLinear
from .rules import SILU
from .state.reads import Reads


class Left(NamedTuple):
    """What the forward of one block leaves on the tape, in the model's dtype."""

    x_BD: Tensor  # the residual stream before attention
    q_BZ: Tensor  # queries after rope, all heads side by side
    mid_BD: Tensor  # the residual stream before the MLP
    gate_BF: Tensor  # before φ
    up_BF: Tensor


class Tape(NamedTuple):
    """Views of a tape [B, N]: the blocks from the first plastic one on, the stream after the last, and the logits."""

    blocks: list[Left]
    x_BD: Tensor
    logits_BV: Tensor

    @classmethod
    def of(cls, model: Llama, tape_BN: Tensor, first: int) -> Tape:
        *parts, x_BD, logits_BV = tape_BN.split(widths(model, first), dim=1)
        each = len(Left._fields)
        return cls([Left(*parts[n : n + each]) for n in range(0, len(parts), each)], x_BD, logits_BV)


def widths(model: Llama, first: int) -> list[int]:
    """How many numbers each part of a row of the tape has, in the order of `Tape`."""
    config = model.config
    D, Z, M = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    return [D, Z, D, M, M] * (config.num_hidden_layers - first) + [D, config.vocab_size]


def forward(model: Llama, ids_B1: Tensor, positions: Positions, cache: KVCache, first: int) -> Tensor:
    """Reads one token of each row by the model's own modules; returns the tape [B, N] from block `first` on.

    The keys and values are in the cache afterwards, and the caller advances it. Hooks on blocks, attention and MLPs
    do not run: whoever calls this has made sure that there are none.
    """
    x_B1D = model.model.blocks(model.model.embed_tokens(ids_B1), positions, cache, stop=first)
    rope = model.model.rope(positions.position_BT)
    parts = []
    for layer in range(first, len(model.model.layers)):
        block: Any = model.model.layers[layer]
        own, mlp = block.self_attn, block.mlp
        parts.append(x_B1D)
        h_B1D = block.input_layernorm(x_B1D)
        q, k, v = (
            project(h_B1D).unflatten(-1, (-1, own.head_dim)).transpose(1, 2)
            for project in (own.q_proj, own.k_proj, own.v_proj)
        )
        q, k = rotate(q, rope), rotate(k, rope)
        parts.append(q.flatten(1)[:, None])
        k, v = cache.append(layer, k, v, positions)
        x_B1D = x_B1D + own.o_proj(attention(q, k, v, positions.visible, positions.start).flatten(2))
        parts.append(x_B1D)
        h_B1D = block.post_attention_layernorm(x_B1D)
        gate, up = mlp.gate_proj(h_B1D), mlp.up_proj(h_B1D)
        parts += [gate, up]
        x_B1D = x_B1D + mlp.down_proj(F.silu(gate).mul_(up))
    parts += [x_B1D, model.lm_head(model.model.norm(x_B1D))]
    return torch.cat([part[:, 0] for part in parts], dim=1)


def overwritten(state: EpisodeState, linears: Mapping[Address, PlasticLinear], first: int) -> dict[Address, Reads]:
    """Copies of what is read in blocks from `first` on and may be gone when the next token is known.

    A neuron-local rule writes the event of the token itself, and rows that share one ΔW write while others wait.
    """
    shared = state.states < state.batch_size
    return {
        address: Reads.of(log).copied()
        for address, log in state.logs.items()
        if address[0] >= first and (shared or linears[address].rule.neuron_local)
    }


class Slope(NamedTuple):
    """∂ log p(next token) / ∂a of one linear, and its input."""

    a_BO: Tensor
    h_BI: Tensor


def backward(
    model: Llama,
    tape_BN: Tensor,
    first: int,
    addresses: Iterable[Address],
    next_B: Tensor,
    rows_B: Tensor,
    position_B: Tensor,
    cache: KVCache,
    end: int,
    reads: Mapping[Address, Reads],
) -> dict[Address, Slope]:
    """The slope of every linear in `addresses`, whose lowest layer is `first`; 0 in rows that are not in rows_B.

    The sums are float32 (float64 in a float64 model); products with weights are in their dtype.

    next_B: the next token of each row. position_B: where the token of the tape stands. end: places of the cache to
    look at. reads: the fast weights that the token was read with.
    """
    addresses = tuple(addresses)
    found: dict[Address, Slope] = {}
    tape = Tape.of(model, tape_BN, first)
    dtype = torch.promote_types(tape_BN.dtype, torch.float32)
    d_BV = -tape.logits_BV.softmax(-1, dtype=dtype)
    d_BV.scatter_add_(1, next_B[:, None], d_BV.new_ones(len(d_BV), 1))
    d_BV *= rows_B[:, None]
    d_BD = through_norm(model.model.norm, tape.x_BD, through(model.lm_head, d_BV))
    cos_B1E, sin_B1E = (part[:, 0].to(dtype) for part in model.model.rope(position_B[:, None]))
    for layer in range(len(model.model.layers) - 1, first - 1, -1):
        block: Any = model.model.layers[layer]
        left, mlp, own = tape.blocks[layer - first], block.mlp, block.self_attn
        found[layer, "down_proj"] = Slope(d_BD, F.silu(left.gate_BF) * left.up_BF)
        if (first, "gate_proj") not in addresses and (first, "up_proj") not in addresses and layer == first:
            break
        d_gate_BF, d_up_BF = through_silu(left, through(mlp.down_proj, d_BD, reads.get((layer, "down_proj"))))
        h_BD = RMSNorm.forward(block.post_attention_layernorm, left.mid_BD)  # no hook sees the way back
        found[layer, "gate_proj"], found[layer, "up_proj"] = Slope(d_gate_BF, h_BD), Slope(d_up_BF, h_BD)
        if layer == first:
            break
        d_h_BD = through(mlp.gate_proj, d_gate_BF, reads.get((layer, "gate_proj")))
        d_h_BD = d_h_BD + through(mlp.up_proj, d_up_BF, reads.get((layer, "up_proj")))
        d_BD = d_BD + through_norm(block.post_attention_layernorm, left.mid_BD, d_h_BD)
        past = (cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end])
        d_q, d_k, d_v = through_attention(left.q_BZ, *past, position_B, through(own.o_proj, d_BD))
        d_q, d_k = (rotate(d, (cos_B1E, -sin_B1E)) for d in (d_q, d_k))  # back by the same angle
        by = ((own.q_proj, d_q), (own.k_proj, d_k), (own.v_proj, d_v))
        d_h_BD = sum((through(project, d.flatten(1)) for project, d in by), start=torch.zeros_like(d_BD))
        d_BD = d_BD + through_norm(block.input_layernorm, left.x_BD, d_h_BD)
    return {address: found[address] for address in addresses}


def through(linear: Any, d_BO: Tensor, reads: Reads | None = None) -> Tensor:
    """(W + ΔW)ᵀ d, in d's dtype."""
    d_BI = product_back(d_BO, linear.weight)
    if reads is None or not reads.U_BRO.shape[1]:
        return d_BI
    d_B1O = d_BO[:, None].to(reads.U_BRO.dtype)
    return d_BI + read(d_B1O, reads.K_BRI, reads.U_BRO, None, reads.w_BTR)[:, 0].to(d_BO.dtype)


def through_silu(left: Left, d_BF: Tensor) -> tuple[Tensor, Tensor]:
    """∂/∂ of gate and up through silu(gate) · up, in d's dtype."""
    gate_BF, up_BF = left.gate_BF.to(d_BF.dtype), left.up_BF.to(d_BF.dtype)
    return d_BF * up_BF * SILU.derivative(gate_BF), d_BF * SILU(gate_BF)


def through_norm(norm: RMSNorm, x_BD: Tensor, d_BD: Tensor) -> Tensor:
    """∂/∂x of x · w / sqrt(mean(x²) + eps), in d's dtype."""
    x_BD = x_BD.to(d_BD.dtype)
    scale_B1 = torch.rsqrt(x_BD.square().mean(-1, keepdim=True) + norm.eps)
    x_BD, d_BD = x_BD * scale_B1, d_BD * norm.weight
    return scale_B1 * (d_BD - x_BD * (x_BD * d_BD).mean(-1, keepdim=True))


def through_attention(
    q_BZ: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, position_B: Tensor, d_BZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """∂/∂ of the query [B, H, E], and of the key and value at its own position [B, K, E], in d's dtype."""
    B, K, S, E = k_BKSE.shape
    k_BKSE, v_BKSE = k_BKSE.to(d_BZ.dtype), v_BKSE.to(d_BZ.dtype)
    q_BKGE, d_BKGE = (x.to(d_BZ.dtype).reshape(B, K, -1, E) for x in (q_BZ, d_BZ))
    place_B111 = position_B[:, None, None, None]
    hidden = torch.arange(S, device=q_BZ.device) > place_B111
    p_BKGS = (q_BKGE @ k_BKSE.mT * E**-0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    d_p_BKGS = d_BKGE @ v_BKSE.mT
    d_s_BKGS = p_BKGS * (d_p_BKGS - (p_BKGS * d_p_BKGS).sum(-1, keepdim=True)) * E**-0.5
    own = place_B111.expand(B, K, q_BKGE.shape[2], 1)
    d_k_BKE = (d_s_BKGS.gather(-1, own) * q_BKGE).sum(2)
    d_v_BKE = (p_BKGS.gather(-1, own) * d_BKGE).sum(2)
    return (d_s_BKGS @ k_BKSE).reshape(B, -1, E), d_k_BKE, d_v_BKE
