"""Families of models that have Llama's block: a row each says what differs, under the names of config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Args:
        architecture: the class of transformers that runs it.
        qkv_bias: whether q, k and v have a bias; o and the MLP have none then. None: the keys attention_bias (of q, k,
            v and o) and mlp_bias say it.
        defaults: what transformers fills in for keys that config.json leaves out.
        windows: which layers may have a sliding window. None: no layer. "all": every layer, where sliding_window is a
            number. "some": where use_sliding_window is true, those that layer_types names; without layer_types those
            from max_window_layers on.
    """

    architecture: str
    qkv_bias: bool | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: str | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family(  # Qwen2 and Qwen2.5
        "Qwen2ForCausalLM",
        qkv_bias=True,
        defaults={
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        windows="some",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        qkv_bias=False,
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
        windows="all",
    ),
}
