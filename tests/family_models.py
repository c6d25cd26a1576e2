"""Tiny random models of every family, in transformers and here, of the same weights."""

from typing import NamedTuple

import torch
import transformers

from fastweights.config import LlamaConfig
from fastweights.families import FAMILIES
from fastweights.model import Llama

SHAPE = {"hidden_size": 48, "intermediate_size": 91, "num_hidden_layers": 3, "num_attention_heads": 6}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 64, "vocab_size": 131}
SHAPE |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4}
WHOLE = {"hidden_size": 60, "head_dim": 10}  # heads · head_dim is the width of the model
BIASES = {"attention_bias": True, "mlp_bias": True}
WINDOW = 4  # shorter than any prompt of a test
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
LOCAL = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}


class Pair(NamedTuple):
    """A model: fields of our config, and keys of transformers' that do not have the same name and value there.

    none: fields of ours that transformers' config must not get.
    """

    model_type: str
    ours: dict
    theirs: dict
    none: tuple = ()


GEMMA = {"hidden_act": "gelu_tanh", "tie_word_embeddings": True, "query_pre_attn_scalar": 14}
NEOX = {**WHOLE, **BIASES, "num_key_value_heads": 6, "hidden_act": "gelu", "partial_rotary_factor": 0.4}
NEOX_THEIRS = {"layer_norm_eps": 1e-5, "rotary_pct": 0.4}
MODELS = {
    "llama": Pair("llama", {}, {}),
    "qwen2": Pair("qwen2", {**WHOLE, "rope_theta": 1e6, "attention_bias": True}, {}),
    "mistral": Pair("mistral", {"windows": (WINDOW,) * 3}, {"sliding_window": WINDOW}),
    "gpt2": Pair(
        "gpt2",
        {**WHOLE, **BIASES, "num_key_value_heads": 6, "hidden_act": "gelu_tanh", "tie_word_embeddings": True},
        {
            "n_embd": 60,
            "n_inner": 91,
            "n_layer": 3,
            "n_head": 6,
            "n_positions": 64,
            "layer_norm_epsilon": 1e-5,
        },
        tuple(key for key in SHAPE if key != "vocab_size"),
    ),
    "gemma3": Pair(
        "gemma3_text",
        {**GEMMA, "windows": (WINDOW, None, WINDOW), "rope_local_base_freq": 1e3},
        {"sliding_window": WINDOW, "layer_types": KINDS, "rope_parameters": LOCAL},
        ("rope_theta", "rope_local_base_freq"),
    ),
    "gemma2": Pair(
        "gemma2",
        {**GEMMA, "windows": (WINDOW, None, WINDOW)} | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        {"sliding_window": WINDOW, "layer_types": KINDS},
    ),
    "qwen3": Pair("qwen3", {"rope_theta": 1e6}, {}),
    "olmo2": Pair("olmo2", WHOLE, {}, ("head_dim",)),
    "gpt_neox": Pair("gpt_neox", {**NEOX, "use_parallel_residual": True}, NEOX_THEIRS),
    "gpt_neox, one after the other": Pair("gpt_neox", {**NEOX, "use_parallel_residual": False}, NEOX_THEIRS),
    "phi3": Pair(
        "phi3",
        {**WHOLE, "partial_rotary_factor": 0.4, "windows": (WINDOW,) * 3},
        {"sliding_window": WINDOW, "pad_token_id": 0, "original_max_position_embeddings": 64},
    ),
}


def pairs(name: str) -> tuple[Llama, transformers.PreTrainedModel]:
    """Our model and transformers', in float32 with random weights; theirs with explicit attention."""
    pair = MODELS[name]
    fields = {**SHAPE, **pair.ours}
    config = LlamaConfig(**fields, model_type=pair.model_type)
    same = {key: value for key, value in fields.items() if key not in ("windows", "hidden_act", *pair.none)}
    kind = getattr(transformers, FAMILIES[pair.model_type].architecture)
    keys = {**same, "bos_token_id": None, "eos_token_id": None, **pair.theirs}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = kind(kind.config_class(**keys, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.requires_grad_(False)
    ours = Llama(config)
    tensors = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        given = tensors["lm_head.weight" if key == "embed_out.weight" else key]
        turned = config.family.transposed and given.dim() == 2 and ".h." in key
        tensor.copy_(given.T if turned else given)
    return ours, theirs
