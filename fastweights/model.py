"""A Llama on plain torch modules, named as in the checkpoint. It knows nothing of plasticity.

Shape suffixes: B batch, T tokens of this call, D model width, H heads, K key/value heads, E head width, V vocabulary,
L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .binding import Binding
from .cache import KVCache, Positions
from .config import LlamaConfig
from .kernels.attention import attention
from .kernels.elementwise import on_gpu, rms_norm, silu_mul
from .kernels.linear import linear
from .kernels.rope import rotate

# The first call of MKL's vector functions in a process sets them up. If two threads of one operation make it together,
# one may compute its half to 11 bits: the cosines of rope were off by 1.5e-4 then. So one thread makes it here.
torch.zeros(1, device="cpu").cos()


class RMSNorm(nn.Module):
    """x · w / sqrt(mean(x²) + eps), Zhang & Sennrich 2019; half precision is normalised in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """nn.Linear through `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each pair of channels, [E/2] float32 (Su et al. 2021; llama3 and linear scaling)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended
    rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, binding: Binding):
        super().__init__()
        self.layer, self.head_dim, self.binding = layer, config.head_dim, binding
        self.window = config.windows[layer]
        D, E, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = Linear(D, config.num_attention_heads * E, bias=bias)
        self.k_proj = Linear(D, config.num_key_value_heads * E, bias=bias)
        self.v_proj = Linear(D, config.num_key_value_heads * E, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * E, D, bias=config.output_bias)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], positions: Positions, cache: KVCache | None
    ) -> Tensor:
        q, k, v = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        visible, start = positions.seen(self.window)
        tap, z_BTHE = self.binding.tap, None  # what edits and captures see of attention; None as a rule
        if cache is not None and tap is None:
            q, k, v = cache.rotate_append(self.layer, q, k, v, rope, positions)
        else:
            q, k = rotate(q, k, rope)
            if tap is not None:
                q, k = tap.rotated(self.layer, q, k)
            if cache is not None:
                k, v = cache.append(self.layer, k, v, positions)
        if tap is not None:
            z_BTHE = tap.attention(self.layer, q, k, v, visible)
        if z_BTHE is None:
            z_BTHE = attention(q, k, v, visible, start)
        return self.o_proj(z_BTHE.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        D, O, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, O, bias=bias)
        self.up_proj = Linear(D, O, bias=bias)
        self.down_proj = Linear(O, D, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        # a hook may keep what gate_proj gave, so that is not changed in place; what SiLU gives is ours
        if on_gpu(x_BTD):
            act_BTO = silu_mul(self.gate_proj(x_BTD), self.up_proj(x_BTD))
        else:  # what gate_proj gave is free again before up_proj runs
            act_BTO = F.silu(self.gate_proj(x_BTD)).mul_(self.up_proj(x_BTD))
        return self.down_proj(act_BTO)


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int, binding: Binding):
        super().__init__()
        self.self_attn = Attention(config, layer, binding)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], positions: Positions, cache: KVCache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, positions, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """Everything between token ids and the last norm; its own angles of rope, so that a hook on it sees all of that."""

    def __init__(self, config: LlamaConfig, binding: Binding):
        super().__init__()
        self.config = config
        self.windows = {window for window in config.windows if window is not None}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer, binding) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.frequency: Tensor | None = None  # made on first use: a model may be built on the meta device

    def forward(self, input_ids: Tensor, positions: Positions, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last norm, [B, T, D]."""
        return self.norm(self.blocks(self.embed_tokens(input_ids), positions, cache))

    def blocks(
        self,
        x_BTD: Tensor,
        positions: Positions,
        cache: KVCache | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """The residual stream after blocks `start` to `stop`."""
        rope = self.rope(positions.position_BT)
        positions = positions.with_visible(self.windows, cached=cache is not None)
        for block in islice(self.layers, start, stop):
            x_BTD = block(x_BTD, rope, positions, cache)
        return x_BTD

    def rope(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B, 1, T, E] in the model's dtype; the angles are float32 as in transformers."""
        angle_BTe = position_BT[:, None, :, None].float() * self.frequencies()
        angle_BTE = torch.cat((angle_BTe, angle_BTe), dim=-1)
        dtype = self.embed_tokens.weight.dtype
        return angle_BTE.cos().to(dtype), angle_BTE.sin().to(dtype)

    def frequencies(self) -> Tensor:
        """Rope's angle per position, [E/2] float32."""
        frequency, device = self.frequency, self.embed_tokens.weight.device
        if frequency is None or frequency.device != device:
            self.frequency = frequency = rope_frequencies(self.config).to(device)
        return frequency


FastStep = Callable[["Llama", Tensor, Positions, "KVCache | None"], "Tensor | None"]


class Llama(nn.Module):
    """Llama for causal language modelling; `state_dict()` has the checkpoint's names.

    Example:
        model, tokenizer = fw.load()
        logits_BTV = model(torch.tensor([tokenizer.encode("The capital of France is")]))
    """

    # one token of each row without running the modules, or None where they must run; `engine.fused` gives it
    fast_step: ClassVar[FastStep | None] = None

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.binding = Binding()
        self.model = Decoder(config, self.binding)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
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

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        return KVCache(self.config, batch_size, max_length, self.dtype, self.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        logits: str = "all",
        positions: Positions | None = None,
    ) -> Tensor:
        """Runs the tokens after those in `cache`; the cache moves on only if the whole pass succeeded.

        Args:
            input_ids: [B, T] int64, on any device.
            attention_mask: [B, T], 0 = padding, anywhere in a row; positions count real tokens only.
            cache: from `new_cache`; None runs the tokens by themselves from position 0.
            logits: "all": [B, T, V]; "last": [B, 1, V], the last real token of each row.
            positions: where the tokens stand, from a caller who has worked that out, made room in the cache and will
                `advance` it; the mask is not looked at then, and the modules run.

        Raises:
            ValueError: the tokens do not fit into the cache, or `logits` is something else; nothing changes then.
        """
        if logits not in ("all", "last"):
            raise ValueError(f"logits={logits!r}: expected 'all' or 'last'")
        input_ids, logits_BTV = input_ids.to(self.device), None
        own = positions is None
        if positions is None:
            shape = (input_ids.shape[0], input_ids.shape[1])
            if cache is None:
                positions = Positions.alone(shape, attention_mask, self.device)
            else:
                positions = cache.positions(shape, attention_mask, self.device)
                cache.reserve(positions.end)
            if shape[1] == 1 and Llama.fast_step is not None:
                logits_BTV = Llama.fast_step(self, input_ids, positions, cache)
        if logits_BTV is None:
            taps = [call.what for call in self.binding.taps]  # edits and captures of this thread
            seen = bool(taps) and self.binding.tap is None  # a probe sees to them itself
            with taps[0].over(taps, self, input_ids, positions, logits == "last") if seen else nullcontext():
                x_BTD = self.model(input_ids, positions, cache)
                logits_BTV = self.lm_head(positions.last(x_BTD) if logits == "last" else x_BTD)
        if cache is not None and own:
            cache.advance(positions)
        return logits_BTV

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """Logits of a residual stream before the last norm."""
        return self.lm_head(self.model.norm(x_BTD))
