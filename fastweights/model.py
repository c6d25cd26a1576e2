"""A Llama, and what else is its block, on plain torch modules, named as in the checkpoint.

It knows nothing of plasticity.

Shape suffixes: B batch, T tokens of this call, D model width, H heads, K key/value heads, E head width, V vocabulary,
L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import PHI
from .binding import Binding
from .cache import KVCache, Positions
from .config import LlamaConfig
from .families import ROLES
from .kernels.attention import attention
from .kernels.elementwise import on_gpu, rms_norm, silu_mul
from .kernels.linear import linear
from .kernels.rope import rotate
from .rope import Rope

# The first call of MKL's vector functions in a process sets them up. If two threads of one operation make it together,
# one may compute its half to 11 bits: the cosines of rope were off by 1.5e-4 then. So one thread makes it here.
torch.zeros(1, device="cpu").cos()


class Named(nn.Module):
    """A module whose parts have the names of the checkpoint, and are found by their role as well.

    A role is the name in a Llama (`families.LLAMA`): `model.model.layers` of a GPT-2 is its `transformer.h`. A role
    whose part the family does not have gives None.
    """

    def __init__(self, names: Mapping[str, str]):
        super().__init__()
        self.names = names

    def add(self, role: str, module: nn.Module) -> None:
        self._modules[self.names[role]] = module  # add_module asks for the name, and `__getattr__` has an answer

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if name in ROLES and "names" in self.__dict__:
            return modules.get(self.names.get(name))
        return super().__getattr__(name)


class RMSNorm(nn.Module):
    """x · w / sqrt(mean(x²) + eps), Zhang & Sennrich 2019; half precision is normalised in float32.

    kind: "rms": x is rounded to its dtype before it meets w. "rms_once": only the product is. "rms1": the product with
    1 + w is.
    """

    def __init__(self, width: int, eps: float, kind: str = "rms"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if kind == "rms1" else torch.ones(width))
        self.eps, self.kind = eps, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return rms_norm(x, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return (F.rms_norm(x.to(wide), self.weight.shape, None, self.eps) * self.factor.to(wide)).to(x.dtype)

    @property
    def factor(self) -> Tensor:
        """What the normalised stream is multiplied by, [D]; of "rms1" in float32 at least."""
        if self.kind != "rms1":
            return self.weight
        return 1 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))


def norm_of(config: LlamaConfig, width: int) -> nn.Module:
    """A norm of the model's kind."""
    kind, eps = config.family.norm, config.rms_norm_eps
    return nn.LayerNorm(width, eps) if kind == "layer" else RMSNorm(width, eps, kind)


class Linear(nn.Linear):
    """nn.Linear through `kernels.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def rope_frequencies(rope: Rope) -> Tensor:
    """Angle per position of each pair of channels, float32 (Su et al. 2021; llama3 and linear scaling)."""
    exponent = torch.arange(0, rope.channels, 2, dtype=torch.float32, device="cpu") / rope.channels
    frequency = 1.0 / rope.theta**exponent
    scaling = rope.scaling
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between blended
    rotations = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


Turns = tuple[Tensor, Tensor] | None  # cos and sin of a rope, each [B, 1, T, E] in the model's dtype; None: no rope


class Attention(Named):
    def __init__(self, config: LlamaConfig, layer: int, binding: Binding):
        super().__init__(config.family.names)
        self.layer, self.head_dim, self.binding = layer, config.head_dim, binding
        self.window, self.scale, self.cap = config.windows[layer], config.scales[layer], config.attn_logit_softcapping
        D, E, bias, qk_norm = config.hidden_size, config.head_dim, config.attention_bias, config.family.qk_norm
        self.heads, self.interleaved = config.num_attention_heads, config.family.interleaved
        self.widths = (self.heads * E, config.num_key_value_heads * E, config.num_key_value_heads * E)
        if "qkv_proj" in self.names:
            self.add("qkv_proj", Linear(D, sum(self.widths), bias=bias))
        else:
            for role, width in zip(("q_proj", "k_proj", "v_proj"), self.widths, strict=True):
                self.add(role, Linear(D, width, bias=bias))
        self.add("o_proj", Linear(self.heads * E, D, bias=config.output_bias))
        if qk_norm is not None:
            self.add("q_norm", norm_of(config, E if qk_norm == "head" else self.widths[0]))
            self.add("k_norm", norm_of(config, E if qk_norm == "head" else self.widths[1]))
        self.norms_heads = qk_norm == "head"

    def project(self, x_BTD: Tensor, tap: Any = None) -> list[Tensor]:
        """q [B, H, T, E], and k and v [B, K, T, E], before rope."""
        E = self.head_dim
        if self.qkv_proj is None:
            every = [project(x_BTD) for project in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            qkv = self.qkv_proj(x_BTD)
            if self.interleaved:
                every = [part.flatten(2) for part in qkv.unflatten(-1, (self.heads, 3 * E)).split(E, -1)]
            else:
                every = list(qkv.split(self.widths, -1))
            if tap is not None:
                every = tap.projected(self.layer, every)
        norms = (self.q_norm, self.k_norm, None)
        if not self.norms_heads:
            every = [x if norm is None else norm(x) for norm, x in zip(norms, every, strict=True)]
        every = [x.unflatten(-1, (-1, E)) for x in every]
        if self.norms_heads:
            every = [x if norm is None else norm(x) for norm, x in zip(norms, every, strict=True)]
        return [x.transpose(1, 2) for x in every]

    def forward(self, x_BTD: Tensor, rope: Turns, positions: Positions, cache: KVCache | None) -> Tensor:
        visible, start = positions.seen(self.window)
        tap, z_BTHE = self.binding.tap, None  # what edits and captures see of attention; None as a rule
        q, k, v = self.project(x_BTD, tap)
        if cache is not None and tap is None:
            q, k, v = cache.rotate_append(self.layer, q, k, v, rope, positions)
        else:
            if rope is not None:
                q, k = rotate(q, k, rope)
            if tap is not None:
                q, k = tap.rotated(self.layer, q, k)
            if cache is not None:
                k, v = cache.append(self.layer, k, v, positions)
        if tap is not None:
            z_BTHE = tap.attention(self.layer, q, k, v, visible, self.scale, self.cap)
        if z_BTHE is None:
            z_BTHE = attention(q, k, v, visible, start, self.scale, self.cap)
        return self.o_proj(z_BTHE.flatten(2))


class MLP(Named):
    """down(φ(gate h) ⊙ up h), or down(φ(up h)) where there is no gate."""

    def __init__(self, config: LlamaConfig, layer: int, binding: Binding):
        super().__init__(config.family.names)
        self.layer, self.binding, self.phi = layer, binding, PHI[config.hidden_act]
        D, O, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        for role, width in (("gate_up_proj", 2 * O), ("gate_proj", O), ("up_proj", O)):
            if role in self.names:
                self.add(role, Linear(D, width, bias=bias))
        self.add("down_proj", Linear(O, D, bias=bias))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # a hook may keep what a linear gave, so that is not changed in place; what φ gives is ours
        if self.gate_up_proj is not None:
            gate, up = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
            if (tap := self.binding.tap) is not None:
                gate, up = tap("gate", self.layer, gate), tap("up", self.layer, up)
            act_BTO = self.phi(gate).mul_(up)
        elif self.gate_proj is None:
            act_BTO = self.phi(self.up_proj(x_BTD))
        elif self.phi.name == "silu" and on_gpu(x_BTD):
            act_BTO = silu_mul(self.gate_proj(x_BTD), self.up_proj(x_BTD))
        else:  # what gate_proj gave is free again before up_proj runs
            act_BTO = self.phi(self.gate_proj(x_BTD)).mul_(self.up_proj(x_BTD))
        return self.down_proj(act_BTO)


class Block(Named):
    """x + attention(norm(x)), then x + MLP(norm(x)); or both of the same x.

    A family has norms before the two, or behind them, or both.
    """

    def __init__(self, config: LlamaConfig, layer: int, binding: Binding):
        super().__init__(config.family.names)
        self.layer, self.binding, self.rope = layer, binding, config.ropes[layer]
        self.parallel = config.use_parallel_residual
        self.add("self_attn", Attention(config, layer, binding))
        self.add("mlp", MLP(config, layer, binding))
        for role in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
            if role in self.names:
                self.add(role, norm_of(config, config.hidden_size))

    def forward(
        self, x_BTD: Tensor, ropes: Mapping[Rope | None, Turns], positions: Positions, cache: KVCache | None
    ) -> Tensor:
        attended_BTD = self.attend(x_BTD, ropes[self.rope], positions, cache)
        if self.parallel:
            return x_BTD + attended_BTD + self.feed_forward(x_BTD)
        x_BTD = x_BTD + attended_BTD
        if (tap := self.binding.tap) is not None:
            x_BTD = tap("resid_mid", self.layer, x_BTD)
        return x_BTD + self.feed_forward(x_BTD)

    def attend(self, x_BTD: Tensor, rope: Turns, positions: Positions, cache: KVCache | None) -> Tensor:
        """What attention adds to the stream."""
        before, after = self.before_attention, self.after_attention
        y_BTD = self.self_attn(x_BTD if before is None else before(x_BTD), rope, positions, cache)
        return y_BTD if after is None else after(y_BTD)

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        before, after = self.before_mlp, self.after_mlp
        y_BTD = self.mlp(x_BTD if before is None else before(x_BTD))
        return y_BTD if after is None else after(y_BTD)


class Decoder(Named):
    """Everything between token ids and the last norm; its own angles of rope, so that a hook on it sees all of that."""

    def __init__(self, config: LlamaConfig, binding: Binding):
        super().__init__(config.family.names)
        self.config, self.binding = config, binding
        self.windows = {window for window in config.windows if window is not None}
        self.add("embed_tokens", nn.Embedding(config.vocab_size, config.hidden_size))
        if "embed_positions" in self.names:
            self.add("embed_positions", nn.Embedding(config.max_position_embeddings, config.hidden_size))
        self.add("layers", nn.ModuleList(Block(config, layer, binding) for layer in range(config.num_hidden_layers)))
        self.add("norm", norm_of(config, config.hidden_size))
        self.kinds = tuple(dict.fromkeys(config.ropes))
        self.made: dict[Rope, Tensor] = {}  # frequencies, on first use: a model may be built on the meta device

    def forward(self, input_ids: Tensor, positions: Positions, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last norm, [B, T, D]."""
        return self.norm(self.blocks(self.embed(input_ids, positions.position_BT), positions, cache))

    def embed(self, input_ids: Tensor, position_BT: Tensor) -> Tensor:
        """The residual stream before the first block, [B, T, D]: embeddings, scaled, or with learned positions."""
        x_BTD = self.embed_tokens(input_ids)
        if self.config.family.scaled_embedding:
            x_BTD = x_BTD * torch.tensor(self.config.hidden_size**0.5, dtype=x_BTD.dtype, device=x_BTD.device)
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(position_BT)
        return x_BTD if (tap := self.binding.tap) is None else tap("embedding", None, x_BTD)

    def blocks(
        self,
        x_BTD: Tensor,
        positions: Positions,
        cache: KVCache | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """The residual stream after blocks `start` to `stop`."""
        ropes = self.ropes(positions.position_BT)
        positions = positions.with_visible(self.windows, cached=cache is not None)
        for block in islice(self.layers, start, stop):
            x_BTD = block(x_BTD, ropes, positions, cache)
        return x_BTD

    def ropes(self, position_BT: Tensor) -> dict[Rope | None, Turns]:
        """cos and sin of every rope in the model at these positions."""
        return {kind: None if kind is None else self.rope(position_BT, kind) for kind in self.kinds}

    def rope(self, position_BT: Tensor, kind: Rope) -> tuple[Tensor, Tensor]:
        """cos and sin, each [B, 1, T, E] in the model's dtype; the angles are float32 as in transformers."""
        angle_BTe = position_BT[:, None, :, None].float() * self.frequencies(kind)
        angle_BTE = torch.cat((angle_BTe, angle_BTe), dim=-1)
        dtype = self.embed_tokens.weight.dtype
        return angle_BTE.cos().to(dtype), angle_BTE.sin().to(dtype)

    def frequencies(self, kind: Rope) -> Tensor:
        """A rope's angle per position, [E/2] float32."""
        frequency, device = self.made.get(kind), self.embed_tokens.weight.device
        if frequency is None or frequency.device != device:
            self.made[kind] = frequency = rope_frequencies(kind).to(device)
        return frequency


FastStep = Callable[["Llama", Tensor, Positions, "KVCache | None"], "Tensor | None"]


class Llama(Named):
    """A Llama, or another family's model that is the same block (`families`), for causal language modelling.

    `state_dict()` has the checkpoint's names. Parts have their names in a Llama as well: see `Named`.

    Example:
        model, tokenizer = fw.load()
        logits_BTV = model(torch.tensor([tokenizer.encode("The capital of France is")]))
    """

    # one token of each row without running the modules, or None where they must run; `engine.fused` gives it
    fast_step: ClassVar[FastStep | None] = None

    def __init__(self, config: LlamaConfig):
        super().__init__(config.family.names)
        self.config = config
        self.binding = Binding()
        self.add("model", Decoder(config, self.binding))
        self.add("lm_head", Linear(config.hidden_size, config.vocab_size, bias=False))
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
            if shape[1] == 1 and Llama.fast_step is not None and (cache is None or not any(cache.first)):
                logits_BTV = Llama.fast_step(self, input_ids, positions, cache)
        if logits_BTV is None:
            taps = [call.what for call in self.binding.taps]  # edits and captures of this thread
            seen = bool(taps) and self.binding.tap is None  # a probe sees to them itself
            with taps[0].over(taps, self, input_ids, positions, logits == "last") if seen else nullcontext():
                x_BTD = self.model(input_ids, positions, cache)
                logits_BTV = self.logits(positions.last(x_BTD) if logits == "last" else x_BTD)
        if cache is not None and own:
            cache.advance(positions)
        return logits_BTV

    def unembed(self, x_BTD: Tensor) -> Tensor:
        """Logits of a residual stream before the last norm."""
        return self.logits(self.model.norm(x_BTD))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits of a residual stream after the last norm."""
        logits_BTV = self.capped(self.lm_head(x_BTD))
        return logits_BTV if (tap := self.binding.tap) is None else tap("logits", None, logits_BTV)

    def capped(self, logits_BTV: Tensor) -> Tensor:
        """What the head gives after the model's cap of logits."""
        cap = self.config.final_logit_softcapping
        return logits_BTV if cap is None else cap * torch.tanh(logits_BTV / cap)
