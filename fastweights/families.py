"""Families of models that are one block: a row each says what differs from a Llama, under the names of its checkpoint.

A new family is a row here and, where it computes something that no other does, a module in `model`. Nothing else looks
at `model_type`: `config` works out from the row and config.json what the modules and the kernels need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# The modules of a model by their roles, and what a Llama's checkpoint calls them. A role that is missing in another
# family's names is a module that it does not have. `before_…` and `after_…` are norms: of what attention or the MLP
# reads, and of what it gives before that is added to the residual stream. q_norm and k_norm stand before rope.
LLAMA: Mapping[str, str] = {
    "model": "model",
    "embed_tokens": "embed_tokens",
    "layers": "layers",
    "before_attention": "input_layernorm",
    "self_attn": "self_attn",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "o_proj",
    "before_mlp": "post_attention_layernorm",
    "mlp": "mlp",
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "norm": "norm",
    "lm_head": "lm_head",
}
QK_NORMS = {"q_norm": "q_norm", "k_norm": "k_norm"}
GEMMA = {
    **LLAMA,
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
OLMO2 = {
    **{role: name for role, name in LLAMA.items() if role not in ("before_attention", "before_mlp")},
    "after_attention": "post_attention_layernorm",
    "after_mlp": "post_feedforward_layernorm",
    **QK_NORMS,
}
GPT2 = {
    "model": "transformer",
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "layers": "h",
    "before_attention": "ln_1",
    "self_attn": "attn",
    "qkv_proj": "c_attn",
    "o_proj": "c_proj",
    "before_mlp": "ln_2",
    "mlp": "mlp",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
    "norm": "ln_f",
    "lm_head": "lm_head",
}
GPT_NEOX = {
    "model": "gpt_neox",
    "embed_tokens": "embed_in",
    "layers": "layers",
    "before_attention": "input_layernorm",
    "self_attn": "attention",
    "qkv_proj": "query_key_value",
    "o_proj": "dense",
    "before_mlp": "post_attention_layernorm",
    "mlp": "mlp",
    "up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
    "norm": "final_layer_norm",
    "lm_head": "embed_out",
}
PHI3 = {
    **{
        role: name for role, name in LLAMA.items() if role not in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    },
    "qkv_proj": "qkv_proj",
    "gate_up_proj": "gate_up_proj",
}


FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types of a config.json

# Fields of `LlamaConfig` that a family has where its row's `defaults` name them.
BEYOND = frozenset(
    {
        "partial_rotary_factor",
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "use_parallel_residual",
    }
)


@dataclass(frozen=True)
class Family:
    """What a `model_type` means.

    Args:
        architecture: the class of transformers that runs it.
        names: its modules by role, see `LLAMA`. A fused `qkv_proj` stands for q, k and v; a fused `gate_up_proj` for
            gate and up; without a gate the MLP is down(φ(up h)); `embed_positions` are learned.
        norm: "rms": RMSNorm; "rms1": RMSNorm times 1 + w; "rms_once": RMSNorm whose product with w is rounded once;
            "layer": LayerNorm.
        qk_norm: what q_norm and k_norm see: each "head", or "all" of q and all of k.
        interleaved: whether the rows of `qkv_proj` lie head by head, [q k v] each; otherwise all q, all k, all v.
        transposed: whether the checkpoint holds the linears of blocks as [I, O].
        scaled_embedding: whether embeddings are multiplied by √D, rounded to the weights' dtype.
        biases: those that config.json does not decide: "attention_bias" (q, k and v), "output_bias" (o), "mlp_bias".
            Left out: the key of this name; o has what q, k and v have.
        keys: what config.json calls a field of `LlamaConfig`, where that differs: every name that transformers reads,
            the one to write first; () where config.json does not say it.
        defaults: what transformers fills in for keys that config.json leaves out, under config.json's names.
        only: further keys that would change the numbers, and the values that leave them alone.
        harmless: further keys that change nothing.
        windows: which layers may have a sliding window. None: no layer. "all": every layer, where sliding_window is a
            number. "some": where use_sliding_window is true, those that layer_types names; without layer_types those
            from max_window_layers on. A number n: those that layer_types names; without it all but every nth layer,
            where n is sliding_window_pattern if `defaults` names that.
        ignored: ends of the names of tensors in the checkpoint that nothing is computed with.
    """

    architecture: str
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA)
    norm: str = "rms"
    qk_norm: str | None = None
    interleaved: bool = False
    transposed: bool = False
    scaled_embedding: bool = False
    biases: Mapping[str, bool] = field(default_factory=dict)
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    windows: str | int | None = None
    ignored: tuple[str, ...] = ()

    def spellings(self, name: str) -> tuple[str, ...]:
        """What config.json calls a field of `LlamaConfig`, the name to write first; () where it does not say it."""
        keys = self.keys.get(name, (name,))
        return keys if name not in BEYOND or keys[0] in self.defaults else ()

    def has(self, name: str) -> bool:
        return bool(self.spellings(name))

    @property
    def title(self) -> str:
        """What messages call it."""
        return self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")

    @property
    def linears(self) -> dict[str, str]:
        """The role of each of an MLP's linears, by name, in the order in which a forward pass meets them."""
        roles = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
        return {self.names[role]: role for role in roles if role in self.names}


NO_BIAS = {"attention_bias": False, "output_bias": False, "mlp_bias": False}
GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "final_logit_softcapping": None,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", defaults={"bos_token_id": 1, "eos_token_id": 2}),
    "qwen2": Family(  # Qwen2 and Qwen2.5
        "Qwen2ForCausalLM",
        biases={**NO_BIAS, "attention_bias": True},
        defaults={
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        windows="some",
    ),
    "mistral": Family(
        "MistralForCausalLM",
        biases=NO_BIAS,
        defaults={
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "num_key_value_heads": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        windows="all",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        GPT2,
        norm="layer",
        transposed=True,
        biases={"attention_bias": True, "output_bias": True, "mlp_bias": True},
        keys={
            "hidden_size": ("n_embd", "hidden_size"),
            "intermediate_size": ("n_inner",),
            "num_hidden_layers": ("n_layer", "num_hidden_layers"),
            "num_attention_heads": ("n_head", "num_attention_heads"),
            "num_key_value_heads": (),
            "head_dim": (),
            "max_position_embeddings": ("n_positions", "max_position_embeddings"),
            "rms_norm_eps": ("layer_norm_epsilon",),
            "hidden_act": ("activation_function",),
            "rope_theta": (),
            "rope_scaling": (),
        },
        defaults={
            "n_positions": 1024,
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "tie_word_embeddings": True,
            "bos_token_id": 50256,
            "eos_token_id": 50256,
        },
        only={"add_cross_attention": (None, False), "pruned_heads": (None, {})},
        harmless=frozenset(
            {
                "n_ctx",  # n_positions once more; transformers reads it no longer
                "reorder_and_upcast_attn",  # the same products, rounded otherwise
                *("attn_pdrop", "summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"),
                *("summary_proj_to_labels", "classifier_dropout"),
            }
        ),
        ignored=(".attn.bias", ".attn.masked_bias"),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {**GEMMA, **QK_NORMS},
        norm="rms1",
        qk_norm="head",
        scaled_embedding=True,
        biases={"mlp_bias": False},
        keys={"hidden_act": ("hidden_activation",)},
        defaults={
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window_pattern": 6,
        },
        only={"use_bidirectional_attention": (None, False)},
        harmless=frozenset({"cache_implementation"}),
        windows=6,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GEMMA,
        norm="rms1",
        scaled_embedding=True,
        biases={"mlp_bias": False},
        keys={"hidden_act": ("hidden_activation",)},
        defaults={
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        only={"use_bidirectional_attention": (None, False)},
        harmless=frozenset({"cache_implementation", "sliding_window_size"}),
        windows=2,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**LLAMA, **QK_NORMS},
        qk_norm="head",
        biases={"mlp_bias": False},
        defaults={
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        windows="some",
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        OLMO2,
        norm="rms_once",
        qk_norm="all",
        biases={"mlp_bias": False},
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "eos_token_id": 50279,
            "pad_token_id": 1,
        },
    ),
    "gpt_neox": Family(  # Pythia
        "GPTNeoXForCausalLM",
        GPT_NEOX,
        norm="layer",
        interleaved=True,
        biases={"mlp_bias": True},
        keys={
            "rms_norm_eps": ("layer_norm_eps",),
            "num_key_value_heads": (),
            "head_dim": (),
            "rope_theta": ("rotary_emb_base",),
            "partial_rotary_factor": ("rotary_pct",),
        },
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "rotary_pct": 0.25,
            "attention_bias": True,
            "use_parallel_residual": True,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        harmless=frozenset({"classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"}),
        ignored=(".attention.bias", ".attention.masked_bias"),
    ),
    "phi3": Family(  # Phi-3 and Phi-4
        "Phi3ForCausalLM",
        PHI3,
        biases=NO_BIAS,
        defaults={
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
        },
        windows="all",
    ),
}

ROLES = frozenset(role for family in FAMILIES.values() for role in family.names)
