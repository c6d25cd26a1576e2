"""config.json and generation_config.json → LlamaConfig: every key is read, known to be harmless, named, or refused.

What differs between the families is in `families`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .families import FAMILIES, Family
from .files import read_json, warn

DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class RopeScaling:
    """How rope frequencies are stretched: "linear" by `factor` alone, "llama3" by all four numbers."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3"):
            raise ValueError(
                f"rope_type {self.rope_type!r} is not implemented, expected 'default', 'linear' or 'llama3'"
            )
        _check_positive_float("rope factor", self.factor)
        _check_positive_float("rope low_freq_factor", self.low_freq_factor)
        _check_positive_float("rope high_freq_factor", self.high_freq_factor)
        _check_positive_int("rope original_max_position_embeddings", self.original_max_position_embeddings)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"rope_type": self.rope_type} | {key: getattr(self, key) for key in _ROPE_KEYS[self.rope_type]}


class Rope(NamedTuple):
    """How one layer turns queries and keys by their positions."""

    theta: float
    scaling: RopeScaling | None
    channels: int  # of each head, the first ones


@dataclass(frozen=True)
class LlamaConfig:
    """A model's shape, under Hugging Face's names; refuses values that no model of its family can have.

    `rope_scaling` is None for plain rope. `attention_bias` is that of q, k and v; `output_bias` says whether o has one
    as well. `eos_token_ids` holds every id that ends a text (possibly none). `dtype` is what config.json says; the
    tensors themselves decide what is loaded. `model_type` is a row of `families`. `windows` holds a number for each
    layer: a token sees itself and `window` − 1 tokens before it; None: it sees all before it, as with a window that is
    as long as any text. Left out, no layer has one.

    What a Llama leaves out: `hidden_act` is the MLP's φ, a name of `activations.PHI`. `partial_rotary_factor` is the
    share of each head that rope turns. `rope_local_base_freq` is the rope_theta of layers with a window, which have no
    `rope_scaling`; None: they have the others'. Scores are multiplied by `scales`, which come from
    `query_pre_attn_scalar` and the two keys of GPT-2. A cap c makes c · tanh(x / c) of scores or logits.
    `use_parallel_residual`: attention and MLP read the same stream. `rms_norm_eps` is that of every norm.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None
    model_type: str = "llama"
    windows: tuple[int | None, ...] = ()
    hidden_act: str = "silu"
    partial_rotary_factor: float = 1.0
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: float | None = None
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_parallel_residual: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type is {self.model_type!r}, expected one of {', '.join(FAMILIES)}")
        for key in _POSITIVE_INTS:
            _check_positive_int(key, getattr(self, key))
        for key in ("rms_norm_eps", "rope_theta"):
            _check_positive_float(key, getattr(self, key))
        for key in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} is {getattr(self, key)!r}, expected true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number (rope turns pairs of channels)")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        object.__setattr__(self, "windows", self._checked_windows())

    def _checked_windows(self) -> tuple[int | None, ...]:
        """A window for every layer; None where it cuts no text."""
        layers, windows = self.num_hidden_layers, tuple(self.windows)
        given = {window for window in windows if window is not None}
        for window in given:
            _check_positive_int("sliding_window", window)
        if not given:
            return (None,) * layers
        if len(windows) != layers:
            raise ValueError(f"windows has {len(windows)} entries, expected one for each of {layers} layers")
        kinds = self.family.windows
        if kinds is None or len(given) > 1 or (kinds == "all" and None in windows):
            raise ValueError(f"windows is {windows}, and a {self.model_type} has no layers of such windows")
        if self.rope_local_base_freq is not None:  # a window says which rope a layer has
            return windows
        return tuple(None if window is None or window >= self.max_position_embeddings else window for window in windows)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def output_bias(self) -> bool:
        """Whether o_proj has a bias."""
        return self.family.biases.get("output_bias", self.attention_bias)

    @property
    def rotary_dim(self) -> int:
        """How many channels of each head rope turns: the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rope of each layer; None where positions are learned."""
        if "embed_positions" in self.family.names:
            return (None,) * self.num_hidden_layers
        whole = Rope(self.rope_theta, self.rope_scaling, self.rotary_dim)
        if self.rope_local_base_freq is None:
            return (whole,) * self.num_hidden_layers
        local = Rope(self.rope_local_base_freq, None, self.rotary_dim)
        return tuple(whole if window is None else local for window in self.windows)

    @property
    def scales(self) -> tuple[float, ...]:
        """What the scores of each layer are multiplied by."""
        scale = (self.query_pre_attn_scalar or self.head_dim) ** -0.5 if self.scale_attn_weights else 1.0
        apart = range(1, self.num_hidden_layers + 1) if self.scale_attn_by_inverse_layer_idx else ()
        return tuple(scale / n for n in apart) or (scale,) * self.num_hidden_layers

    @property
    def phi(self) -> dict[str, str]:
        """The linears of an MLP by name, in the order in which a forward pass meets them, and the name of each φ."""
        names, phi = self.family.names, {name: "identity" for name in self.family.linears}
        if "gate_up_proj" in names:
            phi[names["gate_up_proj"]] = f"{self.hidden_act}|identity"
        else:
            phi[names.get("gate_proj", names["up_proj"])] = self.hidden_act
        return phi

    @property
    def features(self) -> frozenset[str]:
        """What this model has beyond a Llama, in words: a fast path runs it if it knows all of them."""
        family, names = self.family, self.family.names
        has = {
            "layer norms": family.norm == "layer",
            "norms times 1 + w": family.norm == "rms1",
            "norms that round once": family.norm == "rms_once",
            "norms behind attention and MLP": "after_mlp" in names,
            "no norms before attention and MLP": "before_mlp" not in names,
            "norms of the heads of q and k": family.qk_norm == "head",
            "norms of q and k": family.qk_norm == "all",
            "q, k and v in one linear": "qkv_proj" in names and not family.interleaved,
            "q, k and v head by head in one linear": family.interleaved,
            "gate and up in one linear": "gate_up_proj" in names,
            "an MLP without a gate": not {"gate_proj", "gate_up_proj"} & names.keys(),
            f"the activation {self.hidden_act}": self.hidden_act != "silu",
            "learned positions": "embed_positions" in names,
            "scaled embeddings": family.scaled_embedding,
            "rope of a part of each head": self.rotary_dim != self.head_dim,
            "a rope of its own in some layers": len(set(self.ropes)) > 1,
            "a scale of scores of its own": set(self.scales) != {self.head_dim**-0.5},
            "capped scores": self.attn_logit_softcapping is not None,
            "capped logits": self.final_logit_softcapping is not None,
            "attention beside the MLP": self.use_parallel_residual,
        }
        return frozenset(name for name, there in has.items() if there)

    @classmethod
    def from_folder(cls, folder: str | Path, strict: bool = False) -> LlamaConfig:
        """Reads config.json, and the stop ids of generation_config.json where it names any.

        Those replace config.json's, as in transformers' generate(): instruction-tuned models name the end of
        their turn there alone. Raises as `from_file`.
        """
        config = cls.from_file(Path(folder) / "config.json", strict)
        path = Path(folder) / "generation_config.json"
        generation = read_json(path)
        if "eos_token_id" not in generation:
            return config
        try:
            return replace(config, eos_token_ids=eos_ids(generation["eos_token_id"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path, strict: bool = False) -> LlamaConfig:
        """Reads a config.json; ValueError names the file, the key, its value and what was expected."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist, expected a Llama's config.json there")
        return cls.from_dict(read_json(Path(path)), path, strict)

    @classmethod
    def from_dict(cls, hf: Mapping[str, Any], path: str | Path = "config.json", strict: bool = False) -> LlamaConfig:
        """Reads the keys of any Llama generation's config.json; `path` is named in errors.

        A key that transformers reads and that changes the logits here or there is refused unless it is
        implemented. Keys that transformers does not read for this family are named in one warning, or refused if
        `strict`.
        """
        if not isinstance(hf, Mapping):
            raise ValueError(f"{path} holds a {type(hf).__name__}, expected an object of settings")
        unread: list[str] = []
        try:
            config = cls(**_read(hf, unread))
            if unread and strict:
                raise ValueError(f"asks for {', '.join(sorted(unread))}, which fastweights does not implement")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if unread:
            names = ", ".join(sorted(unread))
            kind = config.family.architecture.removesuffix("ForCausalLM")
            warn(f"{path}: ignoring {names}, which transformers' {kind} does not read (strict=True refuses)")
        return config

    def to_dict(self) -> dict[str, Any]:
        """A config.json with the older rope keys, which every version of transformers reads."""
        hf: dict[str, Any] = {
            "architectures": [self.family.architecture],
            "hidden_act": "silu",
        }
        hf |= asdict(self)
        del hf["windows"]
        for key in (*self.family.biases, *_BEYOND):  # the family itself says it
            hf.pop(key, None)
        if self.family.windows is not None:
            hf["sliding_window"] = next((window for window in self.windows if window is not None), None)
        if self.family.windows == "some" and hf["sliding_window"] is not None:
            hf["use_sliding_window"] = True
            hf["layer_types"] = [_FULL if window is None else _SLIDING for window in self.windows]
            hf["max_window_layers"] = hf["layer_types"].index(_SLIDING)  # for versions without layer_types
        hf["rope_scaling"] = self.rope_scaling.to_dict() if self.rope_scaling else None
        eos = hf.pop("eos_token_ids")
        hf["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
        hf["torch_dtype"] = hf.pop("dtype")
        return hf


_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}

# fields that only some families have
_BEYOND = (
    *("partial_rotary_factor", "rope_local_base_freq", "query_pre_attn_scalar", "scale_attn_weights"),
    *("scale_attn_by_inverse_layer_idx", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual"),
)

_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_HANDLED = {
    *LlamaConfig.__dataclass_fields__,
    "eos_token_id",
    "torch_dtype",
    "max_sequence_length",  # the first Llama conversions' name for max_position_embeddings
    "rope_parameters",
    "original_max_position_embeddings",
    "auto_map",
    # by `quantised`: what is loaded is dense
    *("quantization_config", "quantization", "compression_config"),
} - {"eos_token_ids", "windows"}

_FULL, _SLIDING = "full_attention", "sliding_attention"  # in layer_types

# Keys that would change the numbers, and the only values that leave them alone.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_chunk_size": (None,),
    "is_causal": (None, True),
    "partial_rotary_factor": (None, 1.0),
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


def _read(hf: Mapping[str, Any], unread: list[str]) -> dict[str, Any]:
    """The fields of LlamaConfig from a config.json's keys; those that no Llama reads are added to `unread`."""
    if "model_type" not in hf:
        raise ValueError(f"model_type is missing, expected {_list(tuple(FAMILIES))}")
    if hf["model_type"] not in FAMILIES:
        raise ValueError(
            f"model_type is {_short(hf['model_type'])}, and fastweights implements only {_list(tuple(FAMILIES))}"
        )
    family = FAMILIES[hf["model_type"]]
    given, hf = hf, {**family.defaults, **hf}
    for key, allowed in _ONLY.items():
        if key in hf and hf[key] not in allowed:
            raise ValueError(f"{key} is {_short(hf[key])}, and fastweights implements only {_list(allowed)}")
    known = _HANDLED | _ONLY.keys() | _HARMLESS | {"sliding_window", "use_sliding_window", "layer_types"}
    unread += given.keys() - known - ({"max_window_layers"} if family.windows == "some" else set())
    biases = {key: _first(hf.get(key), False) for key in ("attention_bias", "mlp_bias")}
    fixed = {key: value for key, value in family.biases.items() if key in biases}
    unread += [key for key, value in fixed.items() if given.get(key) not in (None, value)]
    biases |= fixed
    if hf.get("auto_map"):  # code of the repository, which transformers runs only if told to trust it
        unread.append("auto_map")

    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*required, "rms_norm_eps"):
        if hf.get(key) is None:
            raise ValueError(f"{key} is missing, and there is no safe default for it")
        if key in required:
            _check_positive_int(key, hf[key])
    # What follows may be absent: transformers' LlamaConfig fills in the same values.
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim")
    if head_dim is None:
        if hf["hidden_size"] % heads:
            raise ValueError(
                f"hidden_size {hf['hidden_size']} is not a multiple of num_attention_heads {heads}, "
                "and head_dim is missing"
            )
        head_dim = hf["hidden_size"] // heads
    length = _first(hf.get("max_position_embeddings"), hf.get("max_sequence_length"), 2048)
    theta, scaling = _rope(hf, length, unread)
    dtype = _first(hf.get("dtype"), hf.get("torch_dtype"))
    return {
        **{key: hf[key] for key in required},
        "num_key_value_heads": _first(hf.get("num_key_value_heads"), heads),
        "head_dim": head_dim,
        "max_position_embeddings": length,
        "rms_norm_eps": hf["rms_norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        **biases,
        "tie_word_embeddings": _first(hf.get("tie_word_embeddings"), False),
        "bos_token_id": _token_id("bos_token_id", hf.get("bos_token_id", 1)),
        "eos_token_ids": eos_ids(hf.get("eos_token_id", 2)),
        "pad_token_id": _token_id("pad_token_id", hf.get("pad_token_id")),
        "dtype": dtype.removeprefix("torch.") if isinstance(dtype, str) and dtype != "auto" else None,
        "model_type": hf["model_type"],
        "windows": _windows(hf, family, length),
    }


def _windows(hf: Mapping[str, Any], family: Family, length: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; refuses keys that contradict each other, and windows that the family lacks."""
    window, layers, uses = hf.get("sliding_window"), hf["num_hidden_layers"], hf.get("use_sliding_window")
    if window is not None:
        _check_positive_int("sliding_window", window)
    if uses not in (None, True, False):
        raise ValueError(f"use_sliding_window is {_short(uses)}, expected true, false or null")
    full, types, name = (None,) * layers, _layer_types(hf), hf["model_type"]
    cuts = window is not None and window < length
    if family.windows is None:
        if (cuts and uses is not False) or (uses and window is None) or _SLIDING in types:
            key = next(key for key in ("sliding_window", "use_sliding_window", "layer_types") if hf.get(key))
            raise ValueError(f"{key} is {_short(hf[key])}, and a {name} has no sliding windows")
        return full
    if uses and window is None:
        raise ValueError("use_sliding_window is true, but sliding_window is null")
    if family.windows == "all":
        if cuts and uses is False:
            raise ValueError(
                f"sliding_window is {window}, but use_sliding_window is false; a {name} reads only the first"
            )
        if (cuts and _FULL in types) or (window is None and _SLIDING in types):
            raise ValueError(
                f"layer_types is {_short(types)}, but sliding_window is {_short(window)} in all layers of a {name}"
            )
        return (window,) * layers
    if not uses:
        if _SLIDING in types:
            raise ValueError(f"layer_types is {_short(types)}, but use_sliding_window is not true")
        return full
    first = hf["max_window_layers"]
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"max_window_layers is {_short(first)}, expected a number of layers")
    if types and len(types) != layers:
        raise ValueError(f"layer_types has {len(types)} entries, expected one for each of {layers} layers")
    types = types or tuple(_FULL if layer < first else _SLIDING for layer in range(layers))
    return tuple(window if kind == _SLIDING else None for kind in types)


def _layer_types(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """What layer_types says of the layers; () where it says nothing."""
    types = hf.get("layer_types")
    if types is None:
        return ()
    kinds = (_FULL, "attention", _SLIDING)  # "attention" is an older name of full attention
    if not isinstance(types, list | tuple) or any(kind not in kinds for kind in types):
        raise ValueError(f"layer_types is {_short(types)}, and fastweights implements only {_FULL} and {_SLIDING}")
    return tuple(_SLIDING if kind == _SLIDING else _FULL for kind in types)


def _rope(hf: Mapping[str, Any], length: int, unread: list[str]) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling from `rope_theta`/`rope_scaling` or from the newer `rope_parameters`."""
    old, new = hf.get("rope_scaling"), hf.get("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(f"{key} is {_short(value)}, expected an object or null")
    if old and new and {**_renamed(new), **_renamed(old)} != _renamed(new):
        raise ValueError(f"rope_scaling {_short(old)} and rope_parameters {_short(new)} contradict each other")
    if new and any(isinstance(value, Mapping) for value in new.values()):
        raise ValueError(f"rope_parameters {_short(new)} differ between kinds of layers, which is not implemented")
    rope = dict(new or old or {})
    thetas = [t for t in (rope.pop("rope_theta", None), hf.get("rope_theta")) if t is not None]
    for theta in thetas:
        _check_positive_float("rope_theta", theta)
    if len(set(thetas)) > 1:
        raise ValueError(f"rope_theta is {thetas[1]}, but rope_parameters says {thetas[0]}")
    theta = float(thetas[0]) if thetas else 10000.0  # Llama 1 and 2 leave it out
    kinds = {rope.pop(key, None) for key in ("rope_type", "type")} - {None}
    if len(kinds) > 1:
        raise ValueError(f"rope type and rope_type contradict each other: {sorted(kinds)}")
    kind = kinds.pop() if kinds else "default"
    if rope.get("partial_rotary_factor", 1.0) in (None, 1.0):
        rope.pop("partial_rotary_factor", None)
    if kind == "llama3":
        outer = hf.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = _first(outer, rope.get("original_max_position_embeddings"), length)
    if kind not in _ROPE_KEYS:
        raise ValueError(f"rope_type {kind!r} is not implemented, expected 'default', 'linear' or 'llama3'")
    wanted = _ROPE_KEYS[kind]
    if missing := sorted(key for key in wanted if rope.get(key) is None):
        raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)}, which is missing")
    idle = {"original_max_position_embeddings"}  # says where the model came from; only llama3 computes with it
    name = "rope_parameters" if new else "rope_scaling"
    unread += [f"{name}.{key}" for key in rope.keys() - wanted - idle if rope[key] is not None]
    if kind == "default":
        return theta, None
    return theta, RopeScaling(kind, **{key: rope[key] for key in sorted(wanted)})


def _renamed(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the newer name of `type`."""
    return {"rope_type" if key == "type" else key: value for key, value in rope.items()}


def eos_ids(value: Any) -> tuple[int, ...]:
    """Every id of an `eos_token_id` entry, which may be one id, a list or null."""
    ids = [_token_id("eos_token_id", v) for v in (value if isinstance(value, list | tuple) else [value])]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _token_id(key: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{key} is {value!r}, expected a token id or null")
    return value if value is not None and value >= 0 else None  # -1 was the first Llamas' way to say null


def _check_positive_int(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key} is {value!r}, expected a positive whole number")


def _check_positive_float(key: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value < float("inf"):
        raise ValueError(f"{key} is {value!r}, expected a positive number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first(*values: Any) -> Any:
    return next((v for v in values if v is not None), None)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _list(values: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(v) for v in values)
