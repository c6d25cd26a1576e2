"""A Llama on plain torch modules, named as in the checkpoint. It knows nothing of plasticity.

Shape suffixes: B batch, T tokens of this call, S cache slots, D model width, H heads, K key/value heads,
E head width, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .config import LlamaConfig
from .kernels.attention import attention
from .kernels.linear import linear


@dataclass(frozen=True)
class Span:
    """Where the tokens of one forward pass stand: made once per pass, read by every layer."""

    position_BT: Tensor  # absolute position of each token in its row (int64); 0 for padding
    real_BT: Tensor | None  # False = padding; None = no padding
    start: int | None  # the slot of the first token when all rows agree; None = rows differ
    end: int  # slots in use after this pass, longest row
    visible: Tensor | None  # [B or 1, 1, T, S] True where a query may look; None: causal, or everything

    @staticmethod
    def fresh(shape: tuple[int, int], attention_mask: Tensor | None, device) -> Span:
        """Tokens by themselves, from position 0, without a cache."""
        rows, tokens = shape
        if attention_mask is None or bool(attention_mask.all()):
            return Span(torch.arange(tokens, device=device).expand(rows, tokens), None, 0, tokens, None)
        real_BT = attention_mask.to(device=device, dtype=torch.bool)
        position_BT = (real_BT.cumsum(1) - 1) * real_BT
        causal_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
        itself_TT = torch.eye(tokens, dtype=torch.bool, device=device)  # padding must look somewhere
        visible = (causal_TT & real_BT[:, None, None]) | itself_TT
        return Span(position_BT, real_BT, None, tokens, visible)

    def repeat(self, times: int) -> Span:
        """The same rows over and over: row r stands at r + n · B for every n."""
        tile = [times, *[1] * 3]
        return replace(
            self,
            position_BT=self.position_BT.repeat(times, 1),
            real_BT=None if self.real_BT is None else self.real_BT.repeat(times, 1),
            visible=None if self.visible is None or len(self.visible) == 1 else self.visible.repeat(tile),
        )

    def last(self, x_BTD: Tensor) -> Tensor:
        """The last real token of each row, [B, 1, D]."""
        if self.real_BT is None:
            return x_BTD[:, -1:]
        column_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        last_B = (self.real_BT * column_T).amax(dim=1)
        return x_BTD[torch.arange(x_BTD.shape[0], device=x_BTD.device), last_B][:, None]


class KVCache:
    """Keys and values of every layer, and the one owner of position.

    A token's slot is its absolute position in its own row: padding is not stored, so a ragged batch needs
    no mask beyond causality. The last slot is scratch: padding is written there and never read.

    Args:
        max_length: slots to allocate once. None: start small and double up to `max_position_embeddings`.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, max_length: int | None, dtype, device):
        self.positions = config.max_position_embeddings  # that the model has: `limit` may be less
        self.limit = self.positions if max_length is None else max_length
        self.lengths = [0] * batch_size
        slots = min(256, self.limit) if max_length is None else max_length
        shape = (batch_size, config.num_key_value_heads, slots + 1, config.head_dim)
        # zeros, not empty: padding queries may look at a slot that nothing has been written to
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(k) for k in self.keys]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2] - 1

    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens; past `limit` it refuses."""
        if length > self.limit:
            hint = f"make the episode with max_length={length} or more, up to {self.positions}"
            if length > self.positions:
                hint = f"this model has {self.positions} positions, so the text must be shorter"
            raise ValueError(
                f"{length} tokens do not fit: the KV cache holds {self.limit} per row "
                f"({max(self.lengths)} are in use); {hint}"
            )
        if length > self.capacity:
            slots = self.bucket(length)
            for buffers in (self.keys, self.values):
                for layer, old in enumerate(buffers):
                    new = old.new_zeros(*old.shape[:2], slots + 1, old.shape[3])
                    new[:, :, : old.shape[2] - 1] = old[:, :, :-1]
                    buffers[layer] = new

    def bucket(self, length: int) -> int:
        """Slots to look at, or to have, for rows of `length` tokens: a power of two, so that they seldom change."""
        return min(self.limit, max(256, 1 << (length - 1).bit_length()))

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forgets the tokens after `lengths`. Their slots become zero: not even NaN may shine through a mask."""
        self.lengths = list(lengths)
        for buffer in (*self.keys, *self.values):
            for row, length in enumerate(lengths):
                buffer[row, :, length:] = 0

    def span(self, shape: tuple[int, int], attention_mask: Tensor | None, device) -> Span:
        """Positions of the next `shape` = (B, T) tokens; padding (mask 0) takes no position."""
        rows, tokens = shape
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        start = self.lengths[0] if len(set(self.lengths)) == 1 else None
        if attention_mask is None and start is not None:
            end = start + tokens
            position_BT = torch.arange(start, end, device=device).expand(rows, tokens)
            visible = None
            if tokens > 1 and start > 0:
                visible = torch.ones(tokens, end, dtype=torch.bool, device=device).tril(start)[None, None]
            return Span(position_BT, None, start, end, visible)
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None]
        if attention_mask is None:
            real_BT = torch.ones(shape, dtype=torch.bool, device=device)
        else:
            real_BT = attention_mask.to(device=device, dtype=torch.bool)
        position_BT = (lengths_B1 + real_BT.cumsum(1) - 1) * real_BT
        end = int(max(int(position_BT.max()) + 1, *self.lengths))
        visible = torch.arange(end, device=device) <= position_BT[:, None, :, None]
        return Span(position_BT, real_BT, None, end, visible)

    def append(self, layer: int, k_BKTE: Tensor, v_BKTE: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Stores this pass's keys and values; returns all of the layer's, [B, K, end, E]."""
        return self._store(self.keys[layer], k_BKTE, span), self._store(self.values[layer], v_BKTE, span)

    def _store(self, buffer: Tensor, new_BKTE: Tensor, span: Span) -> Tensor:
        stored = buffer[:, :, : span.end]
        if new_BKTE.requires_grad:
            # The graph must not see a buffer that later tokens overwrite: the gradient flows through a copy.
            with torch.no_grad():
                self._write(buffer, new_BKTE.detach(), span)
            copy = torch.cat([stored, stored.new_zeros(*stored.shape[:2], 1, stored.shape[3])], dim=2)
            self._write(copy, new_BKTE, span)
            return copy[:, :, :-1]
        self._write(buffer, new_BKTE, span)
        return stored

    @staticmethod
    def _write(buffer: Tensor, new_BKTE: Tensor, span: Span) -> None:
        if span.start is not None:
            buffer[:, :, span.start : span.end] = new_BKTE
        else:
            assert span.real_BT is not None
            slot_BT = torch.where(span.real_BT, span.position_BT, buffer.shape[2] - 1)
            row_B1 = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
            buffer[row_B1, :, slot_BT] = new_BKTE.transpose(1, 2)

    def advance(self, span: Span) -> None:
        if span.real_BT is None:
            self.lengths = [span.end] * len(self.lengths)
        else:
            counts = span.real_BT.sum(1).tolist()
            self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]


class RMSNorm(nn.Module):
    """x · w / sqrt(mean(x²) + eps), Zhang & Sennrich 2019; half precision is normalised in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear through `kernels.linear`."""

    plain = True  # it gives W h + b and nothing else: see `fused`

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each pair of channels, [E/2] float32 (Su et al. 2021; llama3 and linear scaling)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def rotate(x_BHTE: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos_BT, sin_BT = rope
    half = x_BHTE.shape[-1] // 2
    y_BHTE = x_BHTE * cos_BT
    y_BHTE[..., :half].addcmul_(x_BHTE[..., half:], sin_BT[..., :half], value=-1)
    y_BHTE[..., half:].addcmul_(x_BHTE[..., :half], sin_BT[..., half:])
    return y_BHTE


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, E, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(D, config.num_attention_heads * E, bias=bias)
        self.k_proj = Linear(D, config.num_key_value_heads * E, bias=bias)
        self.v_proj = Linear(D, config.num_key_value_heads * E, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * E, D, bias=bias)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], span: Span, cache: KVCache | None) -> Tensor:
        q, k, v = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, span)
        z_BTHE = attention(q, k, v, span.visible, span.start)
        return self.o_proj(z_BTHE.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, O, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, O, bias=bias)
        self.up_proj = Linear(D, O, bias=bias)
        self.down_proj = Linear(O, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # a gate may have a kernel for both, SiLU included, and say when that can run
        both = getattr(self.gate_proj, "gate_and_up", None)
        act_BTO = both(self.up_proj, x_BTD) if both else None
        if act_BTO is None:
            # what gate_proj gave may be in somebody's hands (a hook's); what SiLU gives is not
            act_BTO = F.silu(self.gate_proj(x_BTD)).mul_(self.up_proj(x_BTD))
        return self.down_proj(act_BTO)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        span: Span,
        cache: KVCache | None,
        columns: Tensor | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, span, cache)
        if columns is not None:  # all that anyone will look at
            x_BTD = x_BTD[:, columns]
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Llama for causal language modelling; `state_dict()` has the checkpoint's names.

    Example:
        model, tokenizer = fw.load()
        logits_BTV = model(torch.tensor([tokenizer.encode("The capital of France is")]))
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.frequency: Tensor | None = None  # made on first use: a model may be built on the meta device
        self.tie_weights()
        self.requires_grad_(False)
        self.eval()
        # A block as large as glibc adapts to, freed: it then keeps freed activations for the next layer. It would give
        # them back to the system, and a pass of many tokens spend a fifth of its time on faulting them in again.
        torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8, device="cpu")

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def rope(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B, 1, T, E] in the model's dtype; the angles are float32 as in transformers."""
        angle_BTe = position_BT[:, None, :, None].float() * self.frequencies()
        angle_BTE = torch.cat((angle_BTe, angle_BTe), dim=-1)
        return angle_BTE.cos().to(self.dtype), angle_BTE.sin().to(self.dtype)

    def frequencies(self) -> Tensor:
        """Rope's angle per position, [E/2] float32."""
        if self.frequency is None or self.frequency.device != self.device:
            self.frequency = rope_frequencies(self.config).to(self.device)
        return self.frequency

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        return KVCache(self.config, batch_size, max_length, self.dtype, self.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits: str = "all",
    ) -> Tensor:
        """Runs the tokens after those in `cache`; the cache moves on only if the whole pass succeeded.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], 0 = padding, anywhere in a row; positions count real tokens only.
            cache: from `new_cache`; None runs the tokens by themselves from position 0.
            logits: "all": [B, T, V]; "last": [B, 1, V], the last real token of each row.
        """
        shape = (input_ids.shape[0], input_ids.shape[1])
        if cache is None:
            span = Span.fresh(shape, attention_mask, self.device)
        else:
            span = cache.span(shape, attention_mask, self.device)
            cache.reserve(span.end)
        logits_BTV = fused.step(self, input_ids, span, cache) if shape[1] == 1 else None
        if logits_BTV is None:
            x_BTD = self.blocks(self.model.embed_tokens(input_ids), span, cache)
            logits_BTV = self.unembed(span.last(x_BTD) if logits == "last" else x_BTD)
        if cache is not None:
            cache.advance(span)
        return logits_BTV

    def blocks(
        self,
        x_BTD: Tensor,
        span: Span,
        cache: KVCache | None = None,
        start: int = 0,
        stop: int | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after blocks `start` to `stop`; of some tokens alone, where `columns` [T′] names them."""
        rope, final = self.rope(span.position_BT), self.model.layers[-1] if columns is not None else None
        for block in islice(self.model.layers, start, stop):
            x_BTD = block(x_BTD, rope, span, cache, *([columns] if block is final else []))
        return x_BTD

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """Logits of a residual stream."""
        return self.lm_head(self.model.norm(x_BTD))
