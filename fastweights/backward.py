"""The gradient of one token, by hand: a forward that leaves a tape, and the way back from it.

∂ log p(next token) / ∂a of a plastic linear, with earlier keys and values held constant, needs one token of each row
alone. So its backward is one product with each weight, transposed, from the logits down to the first plastic layer,
and no graph. The token's own key and value are not constant: they depend on the layers below.

Shape suffixes as in `model`, but L blocks from the first plastic one on; M width of an MLP, N numbers of one row of a
tape, S places of the cache, Z all heads side by side, G query heads that share a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import SILU
from .cache import KVCache, Positions
from .episode_state import Address, EpisodeState
from .kernels.attention import attention
from .kernels.elementwise import silu_mul
from .kernels.linear import product_back
from .kernels.read import read
from .kernels.rope import reference as turned
from .model import Llama, RMSNorm
from .plastic import PlasticLinear
from .state.reads import Reads

KNOWN: frozenset[str] = frozenset()  # what this file knows of `LlamaConfig.features`


def unable(model: Llama) -> str | None:
    """Why the way back by hand is not that of this model; None if it is."""
    unknown = sorted(model.config.features - KNOWN)
    return f"the backward does not know {unknown[0]}" if unknown else None


class Left(NamedTuple):
    """What the forward of the blocks leaves on the tape, block beside block, in the model's dtype."""

    x_BLD: Tensor  # the residual stream before attention
    q_BLZ: Tensor  # queries after rope, all heads side by side
    mid_BLD: Tensor  # the residual stream before the MLP
    gate_BLM: Tensor  # before φ
    up_BLM: Tensor


class Tape(NamedTuple):
    """Views of a tape [B, N]: the blocks from the first plastic one on, the stream after the last, and the logits."""

    blocks: Left
    x_BD: Tensor
    logits_BV: Tensor

    @classmethod
    def of(cls, model: Llama, tape_BN: Tensor, first: int) -> Tape:
        each, layers, after = widths(model)[:-2], model.config.num_hidden_layers - first, widths(model)[-2:]
        blocks, x_BD, logits_BV = tape_BN.split([layers * sum(each), *after], dim=1)
        return cls(Left(*blocks.unflatten(1, (layers, -1)).split(each, dim=2)), x_BD, logits_BV)


def widths(model: Llama) -> list[int]:
    """How many numbers each part of a row of the tape has: those of one block, as in `Left`, and the last two."""
    config = model.config
    D, Z, M = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    return [D, Z, D, M, M, D, config.vocab_size]


def length(model: Llama, first: int) -> int:
    """N, the numbers of a row of the tape from block `first` on."""
    *each, x, logits = widths(model)
    return sum(each) * (model.config.num_hidden_layers - first) + x + logits


def forward(model: Llama, ids_B1: Tensor, positions: Positions, cache: KVCache, first: int) -> Tensor:
    """Reads one token of each row by the model's own modules; returns the tape [B, N] from block `first` on.

    The keys and values are in the cache afterwards, and the caller advances it. Hooks on blocks, attention and MLPs
    do not run: whoever calls this has made sure that there are none.
    """
    x_B1D = model.model.blocks(model.model.embed(ids_B1, positions.position_BT), positions, cache, stop=first)
    ropes, positions = model.model.ropes(positions.position_BT), positions.with_visible(model.model.windows)
    parts = []
    for layer in range(first, len(model.model.layers)):
        block: Any = model.model.layers[layer]
        own, mlp = block.self_attn, block.mlp
        parts.append(x_B1D)
        q, k, v = own.project(block.before_attention(x_B1D))
        q, k, v = cache.rotate_append(layer, q, k, v, ropes[block.rope], positions)
        parts.append(q.flatten(1)[:, None])
        x_B1D = x_B1D + own.o_proj(attention(q, k, v, *positions.seen(own.window)).flatten(2))
        parts.append(x_B1D)
        h_B1D = block.before_mlp(x_B1D)
        gate, up = mlp.gate_proj(h_B1D), mlp.up_proj(h_B1D)
        parts += [gate, up]
        x_B1D = x_B1D + mlp.down_proj(silu_mul(gate, up))
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
    eps = model.config.rms_norm_eps
    last = Normed.of(tape.x_BD.to(dtype), eps)
    d_BD = last.back(model.model.norm, through(model.lm_head, d_BV), torch.zeros_like(last.x))
    left = Left(*(part.to(dtype) for part in tape.blocks))
    # of all blocks at once: on a GPU a small operation takes as long as one on all of them
    silu_BLM, silu_slope_BLM = F.silu(left.gate_BLM), left.up_BLM * SILU.derivative(left.gate_BLM)
    before, between = Normed.of(left.x_BLD, eps), Normed.of(left.mid_BLD, eps)
    cos_B1E, sin_B1E = (part[:, 0].to(dtype) for part in model.model.ropes(position_B[:, None])[model.model.kinds[0]])
    backwards = (cos_B1E, -sin_B1E)  # rope by the opposite angle
    place_S, at_B1 = torch.arange(end, device=position_B.device), position_B[:, None]
    hidden_BS: dict[int | None, Tensor] = {None: place_S > at_B1}
    hidden_BS |= {window: hidden_BS[None] | (place_S <= at_B1 - window) for window in model.model.windows}
    for layer in range(len(model.model.layers) - 1, first - 1, -1):
        block: Any = model.model.layers[layer]
        n, mlp, own = layer - first, block.mlp, block.self_attn
        gate, up, down = ((layer, name) for name in ("gate_proj", "up_proj", "down_proj"))
        if down in addresses:
            act_BM = F.silu(tape.blocks.gate_BLM[:, n]) * tape.blocks.up_BLM[:, n]
            found[down] = Slope(d_BD, act_BM)
        if layer == first and gate not in addresses and up not in addresses:
            break
        d_act_BM = through(mlp.down_proj, d_BD, reads.get(down))
        d_gate_BM, d_up_BM = d_act_BM * silu_slope_BLM[:, n], d_act_BM * silu_BLM[:, n]
        if gate in addresses or up in addresses:
            norm: RMSNorm = block.before_mlp
            h_BD = RMSNorm.forward(norm, tape.blocks.mid_BLD[:, n])  # no hook sees the way back
            found[gate], found[up] = Slope(d_gate_BM, h_BD), Slope(d_up_BM, h_BD)
        if layer == first:
            break
        d_h_BD = through(mlp.gate_proj, d_gate_BM, reads.get(gate)) + through(mlp.up_proj, d_up_BM, reads.get(up))
        d_BD = between.block(n).back(block.before_mlp, d_h_BD, d_BD)
        past = (cache.keys[layer][:, :, :end], cache.values[layer][:, :, :end])
        unseen_BS = hidden_BS[own.window]
        d_q, d_k, d_v = through_attention(left.q_BLZ[:, n], *past, position_B, unseen_BS, through(own.o_proj, d_BD))
        d_q, d_k = turned(torch.cat((d_q, d_k), dim=1), backwards).split((d_q.shape[1], d_k.shape[1]), dim=1)
        d_h_BD = through(own.q_proj, d_q.flatten(1)) + through(own.k_proj, d_k.flatten(1))
        d_h_BD = d_h_BD + through(own.v_proj, d_v.flatten(1))
        d_BD = before.block(n).back(block.before_attention, d_h_BD, d_BD)
    return {address: found[address] for address in addresses}


def through(linear: Any, d_BO: Tensor, reads: Reads | None = None) -> Tensor:
    """(W + ΔW)ᵀ d, in d's dtype."""
    d_BI = product_back(d_BO, linear.weight)
    if reads is None or not reads.U_BRO.shape[1]:
        return d_BI
    d_B1O = d_BO[:, None].to(reads.U_BRO.dtype)
    return d_BI + read(d_B1O, reads.K_BRI, reads.U_BRO, None, reads.w_BTR)[:, 0].to(d_BO.dtype)


class Normed(NamedTuple):
    """x / sqrt(mean(x²) + eps), and 1 / sqrt(mean(x²) + eps): [..., D] and [..., 1]."""

    x: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x: Tensor, eps: float) -> Normed:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return cls(x * scale, scale)

    def block(self, n: int) -> Normed:
        """One of many blocks side by side."""
        return Normed(self.x[:, n], self.scale[:, n])

    def back(self, norm: RMSNorm, d_BD: Tensor, stream_BD: Tensor) -> Tensor:
        """stream + ∂/∂x of the norm with its weight."""
        d_BD = d_BD * norm.weight
        mean_B1 = (self.x * d_BD).mean(-1, keepdim=True)
        return stream_BD.addcmul(d_BD.addcmul(self.x, mean_B1, value=-1), self.scale)


def through_attention(
    q_BZ: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, position_B: Tensor, hidden_BS: Tensor, d_BZ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """∂/∂ of the query [B, H, E], and of the key and value at its own position [B, K, E], in d's dtype."""
    B, K, _, E = k_BKSE.shape
    k_BKSE, v_BKSE = k_BKSE.to(d_BZ.dtype), v_BKSE.to(d_BZ.dtype)
    q_BKGE, d_BKGE = (x.reshape(B, K, -1, E) for x in (q_BZ * E**-0.5, d_BZ))
    p_BKGS = (q_BKGE @ k_BKSE.mT).masked_fill(hidden_BS[:, None, None], float("-inf")).softmax(-1)
    d_p_BKGS = d_BKGE @ v_BKSE.mT
    d_s_BKGS = p_BKGS * (d_p_BKGS - (p_BKGS * d_p_BKGS).sum(-1, keepdim=True))
    own = position_B[:, None, None, None].expand(B, K, q_BKGE.shape[2], 1)
    d_k_BKE = (d_s_BKGS.gather(-1, own).mT @ q_BKGE)[:, :, 0]
    d_v_BKE = (p_BKGS.gather(-1, own).mT @ d_BKGE)[:, :, 0]
    return (d_s_BKGS @ k_BKSE).reshape(B, -1, E) * E**-0.5, d_k_BKE, d_v_BKE
