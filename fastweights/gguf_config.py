"""The metadata of a .gguf file → LlamaConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .checks import positive_int
from .config import LlamaConfig
from .gguf_families import ARCHITECTURES
from .rope import RopeScaling

# Keys that would change the numbers of any architecture, and the values that leave them alone.
_ONLY: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (0.0, 1.0),
}


class Metadata:
    """The keys of a file whose architecture is a row of ARCHITECTURES; anything else is a one-line ValueError."""

    def __init__(self, path: Path, reader: Any):
        self.path, self._reader = path, reader
        self.architecture: str = self.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            *names, last = ARCHITECTURES
            raise ValueError(
                f"{path} has the architecture {self.architecture!r}, and fastweights implements only "
                f"{', '.join(names)} and {last}"
            )
        self.row = ARCHITECTURES[self.architecture]

    def get(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self.path}: the key {key} is missing, and the model cannot be built without it")

    def own(self, key: str, *default: Any) -> Any:
        """A key of the architecture; where the file leaves it out, what llama.cpp takes then."""
        return self.get(
            f"{self.architecture}.{key}", *([self.row.defaults[key]] if key in self.row.defaults else default)
        )

    def count(self, key: str) -> int:
        """A key of the architecture that counts something."""
        value: int = self.own(key)
        positive_int(f"{self.architecture}.{key}", value)
        return value

    def refuse(self, key: str, value: Any, wanted: str) -> ValueError:
        """The error of a key of the architecture."""
        return ValueError(f"{self.path}: {self.architecture}.{key} is {value!r}, {wanted}")


def read_config(
    keys: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    rope_freqs: np.ndarray | None,
    *,
    bos_token_id: int | None,
    eos_token_ids: tuple[int, ...],
    pad_token_id: int | None,
) -> LlamaConfig:
    """The configuration of a file with tensors of these shapes; ValueError names the key, its value and what it may be.

    rope_freqs: what each frequency of rope is divided by, [E/2]; None where the file has no such tensor.
    """
    row, own = keys.row, keys.own
    for key, allowed in {**_ONLY, **row.only}.items():
        if (value := own(key, allowed[0])) not in allowed:
            raise keys.refuse(key, value, f"and fastweights implements only {' and '.join(map(str, allowed))} there")
    heads, kv_heads, head_dim = _heads(keys)
    width, layers = keys.count("embedding_length"), keys.count("block_count")
    theta = _shortest(own("rope.freq_base", 10000.0))
    windows = _windows(keys, layers)
    epsilon = "layer_norm_epsilon" if row.family.norm == "layer" else "layer_norm_rms_epsilon"
    return LlamaConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=width,
        intermediate_size=own("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=own("context_length"),
        rms_norm_eps=_shortest(own(f"attention.{epsilon}")),
        rope_theta=theta,
        rope_scaling=_rope_scaling(keys, theta, head_dim, rope_freqs),
        attention_bias=bool(shapes.keys() & {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}),
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        pad_token_id=pad_token_id,
        dtype="float32",
        model_type=row.model_type,
        windows=windows,
        hidden_act=row.acts.get(layers, row.hidden_act),
        partial_rotary_factor=_share(own("rope.dimension_count", head_dim), head_dim),
        rope_local_base_freq=_local_base(keys, theta, windows),
        query_pre_attn_scalar=None if row.by_width is None else width // heads if layers == row.by_width else head_dim,
        attn_logit_softcapping=_cap(keys, "attn_logit_softcapping"),
        final_logit_softcapping=_cap(keys, "final_logit_softcapping"),
        use_parallel_residual=own("use_parallel_residual") if row.family.has("use_parallel_residual") else False,
    )


def _heads(keys: Metadata) -> tuple[int, int, int]:
    """How many heads queries have, how many keys and values have, and their width."""
    heads = keys.own("attention.head_count")
    kv_heads = keys.own("attention.head_count_kv", heads)
    for key, value in (("head_count", heads), ("head_count_kv", kv_heads)):
        if not isinstance(value, int):
            raise ValueError(
                f"{keys.path}: {keys.architecture}.attention.{key} differs between layers, expected one number"
            )
        positive_int(f"{keys.architecture}.attention.{key}", value)
    head_dim = keys.own("attention.key_length", keys.count("embedding_length") // heads)
    for key in ("attention.value_length", *(() if keys.row.partial_rope else ("rope.dimension_count",))):
        if (value := keys.own(key, head_dim)) != head_dim:
            raise keys.refuse(key, value, f"expected the head width {head_dim}")
    return heads, kv_heads, head_dim


def _windows(keys: Metadata, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer; () where none has one."""
    window = keys.own("attention.sliding_window", 0) if keys.row.windows else 0
    if window == 0:
        return ()
    kinds = keys.row.family.windows
    if kinds == "all":
        return (window,) * layers
    key = "attention.sliding_window_pattern"
    pattern = keys.own(key, kinds)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise ValueError(
                f"{keys.path}: {keys.architecture}.{key} has {len(pattern)} entries, expected one for each of "
                f"{layers} layers"
            )
        return tuple(window if slides else None for slides in pattern)
    # the last of every `pattern` layers sees everything; 0: no layer does
    return tuple(window if not pattern or layer % pattern < pattern - 1 else None for layer in range(layers))


def _local_base(keys: Metadata, theta: float, windows: tuple[int | None, ...]) -> float | None:
    """The base of rope in layers with a window; None where it is that of all layers."""
    base = _shortest(keys.own("rope.freq_base_swa", keys.row.local_base or theta))
    if keys.row.local_base is not None:
        return base if any(windows) else None
    if any(windows) and base != theta:
        raise keys.refuse("rope.freq_base_swa", base, f"expected the {theta} of rope.freq_base")
    return None


def _cap(keys: Metadata, key: str) -> float | None:
    """A cap of scores or logits; None where the family or the file has none."""
    cap = keys.own(key, 0.0) if keys.row.family.has(key) else 0.0
    return _shortest(cap) if cap else None


def _rope_scaling(keys: Metadata, theta: float, head_dim: int, rope_freqs: np.ndarray | None) -> RopeScaling | None:
    kind = keys.own("rope.scaling.type", "linear")
    factor = keys.own("rope.scaling.factor", keys.own("rope.scale_linear", 0.0))
    if kind not in ("none", "linear"):
        raise keys.refuse("rope.scaling.type", kind, "and fastweights implements only 'none', 'linear' and Llama 3's")
    linear = None
    if kind == "linear" and factor not in (0.0, 1.0):
        linear = RopeScaling("linear", _shortest(factor))
    if rope_freqs is None or (rope_freqs == 1).all():
        return linear
    # llama.cpp stores what Llama 3's scaling does to each frequency; the parameters are published
    scaling = RopeScaling("llama3", _shortest(rope_freqs.max()), 1.0, 4.0, 8192)
    wanted = llama3_stretch(scaling, theta, head_dim)
    if linear is not None or rope_freqs.shape != wanted.shape or not np.allclose(rope_freqs, wanted, rtol=1e-4, atol=0):
        raise ValueError(f"{keys.path}: rope_freqs.weight is not Llama 3's scaling, the only one implemented")
    return scaling


def llama3_stretch(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3's scaling divides each rope frequency by, [head_dim / 2] float64."""
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clip(0, 1)
    return 1 / ((1 - kept) / scaling.factor + kept)


def _share(channels: int, head_dim: int) -> float:
    """The share of a head that `channels` are, such that int(head_dim · share) is `channels` again."""
    share = channels / head_dim
    return share if int(head_dim * share) == channels else math.nextafter(share, 1)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value)))
