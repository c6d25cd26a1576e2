"""The keys of a config.json ↔ the fields of LlamaConfig: every key is read, known to be harmless, named, or refused.

What differs between the families is in `families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checks import first, listed, positive_float, positive_int, short
from .families import BEYOND, FAMILIES, Family
from .rope import read_rope
from .windows import read_windows, window_keys, write_windows

# What config.json calls a φ, and our name of it: one name for one function.
ACTIVATIONS = {
    **{name: "silu" for name in ("silu", "swish")},
    **{name: "gelu" for name in ("gelu", "gelu_python")},
    **{
        name: "gelu_tanh"
        for name in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
    },
}

_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # where the family has no other

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WHOLE = (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")
# Fields of LlamaConfig that are a key of config.json as it stands, under one of the family's names.
_PLAIN = (*_WHOLE, "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "pad_token_id", *sorted(BEYOND))
_HANDLED = {
    *("model_type", "eos_token_id", "dtype", "torch_dtype", "attention_bias", "mlp_bias"),
    # by `rope`, which looks at them in every family
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"),
    "auto_map",
    # by `quantised`: what is loaded is dense
    *("quantization_config", "quantization", "compression_config"),
}

# Keys that would change the numbers, and the only values that leave them alone.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (None,),
    "is_causal": (None, True),
    "rope_interleaved": (None, False),
    "per_layer_config": (None, {}),
    "is_encoder_decoder": (None, False),
}

_HARMLESS = {
    # about the file
    *("architectures", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"),
    *(
        "tokenizer_class",
        "prefix",
        "torchscript",
        "transformers.js_config",
        "custom_pipelines",
        "unsloth_version",
    ),
    *("unsloth_fixed", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset"),
    *("_attn_implementation_internal", "_flash_attn_2_enabled", "experts_implementation"),
    # about training and other heads
    *("initializer_range", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "id2label"),
    *("label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params", "use_bfloat16"),
    *("tf_legacy_loss", "gradient_checkpointing", "is_llama_config"),
    # about what the forward pass returns
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_decoder"),
    *("tie_last_hidden_states", "use_return_dict", "keys_to_ignore_at_inference"),
    # Splits a matrix product in pretraining_tp parts to repeat a training run's rounding: the mathematics is
    # the same without, and transformers itself no longer does it.
    "pretraining_tp",
    # about layouts that a Llama does not have
    *("pruned_heads", "add_cross_attention", "tie_encoder_decoder", "cross_attention_hidden_size"),
    "chunk_size_feed_forward",
    # generation settings that older versions kept here
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
    *(
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
    ),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *(
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    ),
    *(
        "epsilon_cutoff",
        "eta_cutoff",
        "encoder_repetition_penalty",
        "num_assistant_tokens",
        "target_lookbehind",
    ),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind"),
    *("sep_token_id", "decoder_start_token_id"),
}


def read(given: Mapping[str, Any], unread: list[str]) -> dict[str, Any]:
    """The fields of LlamaConfig from a config.json; the keys that its family does not read are added to `unread`."""
    family = _family(given)
    hf = {**family.defaults, **given}
    only = {**_ONLY, **family.only}
    for key, allowed in only.items():
        if key in hf and hf[key] not in allowed:
            raise ValueError(f"{key} is {short(hf[key])}, and fastweights implements only {listed(allowed)}")
    fields = {name: _value(name, given, family) for name in _PLAIN if family.has(name)}
    _check(fields, family)
    # What follows may be absent: transformers fills in the same values.
    length = first(fields["max_position_embeddings"], hf.get("max_sequence_length"), 2048)
    spelt = {name: family.spellings(name) for name in ("attention_bias", "mlp_bias")}
    biases = {name: first(*map(hf.get, keys), False) for name, keys in spelt.items()}
    fixed = {key: value for key, value in family.biases.items() if key in biases}
    fields |= {
        "model_type": given["model_type"],
        "num_key_value_heads": first(fields.get("num_key_value_heads"), fields["num_attention_heads"]),
        "head_dim": _head_dim(fields, given, family),
        "max_position_embeddings": length,
        "hidden_act": _activation(hf, family),
        "tie_word_embeddings": first(fields["tie_word_embeddings"], False),
        "bos_token_id": _token_id("bos_token_id", fields["bos_token_id"]),
        "pad_token_id": _token_id("pad_token_id", fields["pad_token_id"]),
        "eos_token_ids": eos_ids(hf.get("eos_token_id")),
        "dtype": _dtype(hf),
        "windows": read_windows(hf, family, fields["num_hidden_layers"], length),
        **biases,
        **fixed,
        **read_rope(given, family, length, unread),
    }
    unread += _unread(
        given, fields, family, _HANDLED | {*sum(spelt.values(), ())} | only.keys() | _HARMLESS | family.harmless
    )
    unread += [key for key, value in fixed.items() if given.get(key) not in (None, value)]
    if given.get("auto_map"):  # code of the repository, which transformers runs only if told to trust it
        unread.append("auto_map")
    return fields


def write(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A config.json, under the family's names, that `read` and every version of transformers read as these fields."""
    phi = family.spellings("hidden_act")[0]
    usual = family.defaults.get(phi, "silu")
    eos, scaling = fields["eos_token_ids"], fields["rope_scaling"]
    ours = {
        **fields,
        "hidden_act": usual if ACTIVATIONS.get(usual) == fields["hidden_act"] else _NAMES[fields["hidden_act"]],
        "rope_scaling": scaling.to_dict() if scaling else None,
        # transformers has no null for these two
        "query_pre_attn_scalar": first(fields["query_pre_attn_scalar"], fields["head_dim"]),
        "rope_local_base_freq": first(fields["rope_local_base_freq"], fields["rope_theta"]),
    }
    for name in ("windows", "eos_token_ids", "dtype", *family.biases):  # the family itself says its biases
        ours.pop(name, None)
    return {
        "architectures": [family.architecture],
        **{family.spellings(name)[0]: value for name, value in ours.items() if family.has(name)},
        **write_windows(fields["windows"], family, fields["max_position_embeddings"]),
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "torch_dtype": fields["dtype"],
    }


def _family(given: Mapping[str, Any]) -> Family:
    kind, text = given.get("model_type"), given.get("text_config")
    if "model_type" not in given:
        raise ValueError(f"model_type is missing, expected {listed(tuple(FAMILIES))}")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    inner = text.get("model_type", f"{kind}_text") if isinstance(text, Mapping) else None
    if inner in tuple(FAMILIES):
        raise ValueError(
            f"model_type is {short(kind)}, which holds a {inner} beside other models; fastweights reads only the text "
            f"model saved by itself ({inner})"
        )
    raise ValueError(f"model_type is {short(kind)}, and fastweights implements only {listed(tuple(FAMILIES))}")


def _value(name: str, given: Mapping[str, Any], family: Family) -> Any:
    """What a config.json says of a field under any of the family's names, or what transformers fills in."""
    keys = family.spellings(name)
    found = {key: given[key] for key in keys if key in given}
    said = {key: value for key, value in found.items() if value is not None}
    for key, value in said.items():
        if value != (usual := next(iter(said.values()))):
            raise ValueError(f"{key} is {short(value)}, but {next(iter(said))} is {short(usual)}")
    return first(*said.values()) if found else family.defaults.get(keys[0])


def _check(fields: dict[str, Any], family: Family) -> None:
    """Refuses sizes that are missing or no sizes, under the file's names."""
    name_of = {name: family.spellings(name)[0] for name in fields}
    wide = name_of["intermediate_size"] in family.defaults  # GPT-2: four times the width where null
    if fields["intermediate_size"] is None and wide and fields["hidden_size"] is not None:
        positive_int(name_of["hidden_size"], fields["hidden_size"])
        fields["intermediate_size"] = 4 * fields["hidden_size"]
    for name in (*_REQUIRED, "rms_norm_eps"):
        if fields[name] is None:
            raise ValueError(f"{name_of[name]} is missing, and there is no safe default for it")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if type(fields.get(name)) is int:  # transformers 5 takes no whole number for a cap
            fields[name] = float(fields[name])
    for name in (name for name in _WHOLE if name in fields):
        # transformers fills in these two where they are absent, and refuses null
        filled_in = name in ("head_dim", "max_position_embeddings") and name_of[name] in family.defaults
        if fields[name] is not None or filled_in:
            positive_int(name_of[name], fields[name])
    positive_float(name_of["rms_norm_eps"], fields["rms_norm_eps"])


def _head_dim(fields: Mapping[str, Any], given: Mapping[str, Any], family: Family) -> int:
    if fields.get("head_dim") is not None:
        return fields["head_dim"]
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    size, count = (family.spellings(name)[0] for name in ("hidden_size", "num_attention_heads"))
    if width % heads:
        raise ValueError(f"{size} {width} is not a multiple of {count} {heads}, and head_dim is missing")
    if given.get("head_dim") not in (None, width // heads):
        raise ValueError(
            f"head_dim is {short(given['head_dim'])}, but {size} {width} is {heads} heads of {width // heads}"
        )
    return width // heads


def _activation(hf: Mapping[str, Any], family: Family) -> str:
    key = family.spellings("hidden_act")[0]
    name = hf.get(key, "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"{key} is {short(name)}, and fastweights implements only {listed(tuple(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _dtype(hf: Mapping[str, Any]) -> str | None:
    dtype = first(hf.get("dtype"), hf.get("torch_dtype"))
    return dtype.removeprefix("torch.") if isinstance(dtype, str) and dtype != "auto" else None


def _unread(given: Mapping[str, Any], fields: Mapping[str, Any], family: Family, known: set[str]) -> list[str]:
    """The keys that the family does not read. Another family's name of a number that says the same is none of them."""
    names = (*_PLAIN, "hidden_act", "rope_theta")
    known = known | window_keys(family) | {key for name in names for key in family.spellings(name)}
    if given["model_type"] == "llama":
        known.add("max_sequence_length")  # the first conversions' name for max_position_embeddings
    said = {name: _value(name, given, family) if family.has(name) else fields.get(name) for name in names}
    return [key for key in given.keys() - known if key not in said or given[key] not in (None, said[key])]


def eos_ids(value: Any) -> tuple[int, ...]:
    """Every id of an `eos_token_id` entry, which may be one id, a list or null."""
    ids = [_token_id("eos_token_id", v) for v in (value if isinstance(value, list | tuple) else [value])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _token_id(key: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key} is {value!r}, expected a token id or null")
    return value if value is not None and value >= 0 else None  # -1 was the first Llamas' way to say null
