"""A model's shape and what its modules and kernels need to know of it, from config.json and generation_config.json.

What differs between the families is in `families`; the keys of the files are in `config_json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checks import boolean, positive_float, positive_int
from .config_json import ACTIVATIONS, eos_ids, read, write
from .families import BEYOND, FAMILIES, Family
from .files import read_json, warn
from .rope import Rope, RopeScaling

DTYPES = ("float64", "float32", "float16", "bfloat16")


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
            positive_int(key, getattr(self, key))
        for key in _BOOLEANS:
            boolean(key, getattr(self, key))
        for key in _POSITIVE:
            positive_float(key, getattr(self, key))
        for key in _POSITIVE_OR_NONE:
            if getattr(self, key) is not None:
                positive_float(key, getattr(self, key))
        if self.hidden_act not in ACTIVATIONS.values():
            names = ", ".join(dict.fromkeys(ACTIVATIONS.values()))
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected one of {names}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if "embed_positions" not in self.family.names:
            self._check_channels()
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        object.__setattr__(self, "windows", self._checked_windows())

    def _check_channels(self) -> None:
        """Refuses heads of which rope can't turn pairs of channels."""
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, expected an even number (rope turns pairs of channels)")
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor is {self.partial_rotary_factor}, which turns {self.rotary_dim} of "
                f"{self.head_dim} channels, expected an even number of them"
            )

    def _checked_windows(self) -> tuple[int | None, ...]:
        """A window for every layer; None where it cuts no text."""
        layers, windows = self.num_hidden_layers, tuple(self.windows)
        given = {window for window in windows if window is not None}
        for window in given:
            positive_int("sliding_window", window)
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
            config = cls(**read(hf, unread))
            if unread and strict:
                raise ValueError(f"asks for {', '.join(sorted(unread))}, which fastweights does not implement")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if unread:
            names = ", ".join(sorted(unread))
            kind = config.family.title
            warn(f"{path}: ignoring {names}, which transformers' {kind} does not read (strict=True refuses)")
        return config

    def to_dict(self) -> dict[str, Any]:
        """A config.json of the family, with the older rope keys, which every version of transformers reads.

        Raises ValueError where this model has what no config.json of its family can say.
        """
        for key in sorted(BEYOND):
            if not self.family.has(key) and getattr(self, key) != getattr(type(self), key):
                raise ValueError(
                    f"{key} is {getattr(self, key)!r}, which the config.json of a {self.model_type} can't say"
                )
        return write(vars(self), self.family)


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
_BOOLEANS = (
    *("attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "use_parallel_residual"),
)
_POSITIVE = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
_POSITIVE_OR_NONE = (
    *("rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
