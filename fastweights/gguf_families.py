"""What llama.cpp calls families and their parts, and how its converter changes their values: a row each.

Its side of this: https://github.com/ggml-org/llama.cpp/tree/master/conversion and gguf-py/gguf/constants.py there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .config import LlamaConfig
from .families import FAMILIES, Family

# llama.cpp's names of parts, and the roles in `families` that lead to each: from the model, and from one of its blocks.
MODEL = {
    "token_embd": ("model", "embed_tokens"),
    "position_embd": ("model", "embed_positions"),
    "output_norm": ("model", "norm"),
    "output": ("lm_head",),
}
BLOCK = {
    "attn_norm": ("before_attention",),
    "attn_q": ("self_attn", "q_proj"),
    "attn_k": ("self_attn", "k_proj"),
    "attn_v": ("self_attn", "v_proj"),
    "attn_qkv": ("self_attn", "qkv_proj"),
    "attn_q_norm": ("self_attn", "q_norm"),
    "attn_k_norm": ("self_attn", "k_norm"),
    "attn_output": ("self_attn", "o_proj"),
    "post_attention_norm": ("after_attention",),
    "ffn_norm": ("before_mlp",),
    "ffn_gate": ("mlp", "gate_proj"),
    "ffn_up": ("mlp", "up_proj"),
    "ffn_down": ("mlp", "down_proj"),
    "post_ffw_norm": ("after_mlp",),
}


@dataclass(frozen=True)
class Architecture:
    """What a `general.architecture` means.

    The norms of a family whose norms multiply by 1 + w hold 1 + w in the file. A fused qkv holds all q, all k, all v.

    Args:
        model_type: its row in `families`.
        block: parts of a block that have other roles than in `BLOCK`.
        permuted: whether the rows of each head of q and k lie with rope's pairs side by side.
        partial_rope: whether rope may turn a part of each head.
        hidden_act: the MLP's φ, which no file names.
        acts: φ by the number of blocks, where one model of the family differs.
        windows: whether llama.cpp writes the sliding window; which layers have it is the family's.
        local_base: the base of rope in layers with a window. None: that of all layers.
        by_width: the number of blocks of the model whose scores are scaled by (D / H)^-½, D the width and H the heads,
            where all others of the family have E^-½.
        defaults: what llama.cpp takes for keys that a file leaves out.
        only: further keys that would change the numbers, and the values that leave them alone.
    """

    model_type: str
    block: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    permuted: bool = False
    partial_rope: bool = False
    hidden_act: str = "silu"
    acts: Mapping[int, str] = field(default_factory=dict)
    windows: bool = False
    local_base: float | None = None
    by_width: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def checkpoint_name(self, name: str) -> str | None:
        """What the family's checkpoint calls a tensor of the file; None where the family has no such part."""
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None:
            return None
        block, part, kind = match.groups()
        roles = MODEL.get(part) if block is None else {**BLOCK, **self.block}.get(part)
        names = self.family.names
        if roles is None or any(role not in names for role in roles):
            return None
        start = [] if block is None else [names["model"], names["layers"], block]
        return ".".join([*start, *(names[role] for role in roles), kind])

    def checkpoint_values(self, name: str, values: np.ndarray, config: LlamaConfig) -> np.ndarray:
        """A tensor of the file, [O, I] or [O], as our model has it: what the converter changed is put back."""
        part = name.split(".")[-2]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if self.permuted and part in heads:
            return unpermute(values, heads[part])
        if self.family.interleaved and part == "attn_qkv":
            return interleave(values, config.num_attention_heads)
        if self.family.norm == "rms1" and part.endswith("norm"):
            return values - 1
        return values


ARCHITECTURES: dict[str, Architecture] = {
    "gemma2": Architecture(
        "gemma2",
        hidden_act="gelu_tanh",
        windows=True,
        by_width=46,
        defaults={
            "attention.sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": Architecture("gemma3_text", hidden_act="gelu_tanh", windows=True, local_base=10000.0, by_width=62),
    "gpt2": Architecture("gpt2", hidden_act="gelu_tanh"),
    "gptneox": Architecture(  # GPT-NeoX-20B has the tanh form, all of Pythia the exact one; llama.cpp runs both as tanh
        "gpt_neox", partial_rope=True, hidden_act="gelu", acts={44: "gelu_tanh"}
    ),
    "llama": Architecture("llama", permuted=True),
    "olmo2": Architecture("olmo2", only={"attention.sliding_window": (0,)}),  # an OLMo 3 has windows
    "phi3": Architecture("phi3", {"ffn_up": ("mlp", "gate_up_proj")}, partial_rope=True, windows=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
}


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows [heads · E, ...]: llama.cpp's order (rope's pairs side by side) to Hugging Face's (halves)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a fused qkv [3 · heads · E, ...]: all q, all k, all v to [q k v] of each head."""
    return rows.reshape(3, heads, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)
