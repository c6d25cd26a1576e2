"""What a model is made of, from its configuration alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .config import LlamaConfig
from .model import Llama
from .weights import load_config, without_storage

PARTS = ("embedding", "attention", "mlp", "norm", "unembedding")


@dataclass(frozen=True)
class Anatomy:
    """A model's parts in numbers.

    head_dim: E, the width of one head.
    queries_per_kv: how many query heads share one key/value head.
    kv_bytes_per_token: what one token of one sequence takes in the KV cache, over all layers, in `dtype`.
    parameters: how many numbers in "embedding", "attention", "mlp", "norm", "unembedding" and "total". Tied
        embeddings count once, as "embedding"; "unembedding" is 0 then.
    bytes: of all parameters in `dtype`.
    dtype: the model's, or what the configuration says; "float32" where it says nothing, as in a .gguf file.
    """

    layers: int
    heads: int
    kv_heads: int
    queries_per_kv: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    kv_bytes_per_token: int
    parameters: dict[str, int]
    bytes: int
    dtype: str

    def to_dict(self) -> dict:
        """Everything as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """A table: the shape, then the parts with their share of all parameters."""
        total = self.parameters["total"]
        sharing = "" if self.queries_per_kv == 1 else f", {self.queries_per_kv} query heads to a key/value head"
        shape = [
            ("layers", f"{self.layers}"),
            ("width", f"{self.hidden_size}, MLP {self.intermediate_size}, vocabulary {self.vocab_size:,}"),
            ("heads", f"{self.heads} of width {self.head_dim}, key/value heads {self.kv_heads}{sharing}"),
            ("KV cache", f"{self.kv_bytes_per_token:,} bytes per token ({self.dtype})"),
        ]
        lines = [f"{name:<12} {value}" for name, value in shape]
        for part in (*PARTS, "total"):
            tied = "  (tied: the embedding)" if part == "unembedding" and self.tied else ""
            lines.append(f"{part:<12} {self.parameters[part]:>15,}  {self.parameters[part] / total:6.1%}{tied}")
        return "\n".join([*lines, f"{'bytes':<12} {self.bytes:>15,}  ({self.dtype})"])


def anatomy(model_or_name: Llama | str | Path | None = None) -> Anatomy:
    """Layers, heads, parameters by part and bytes of a model, from its configuration; no weight is read for it.

    Args:
        model_or_name: a model, or what `load` takes: a folder, a .gguf file, a name on the Hub (of which config.json
            alone is fetched), or None, the default model (fetched whole where it is not there).

    Raises:
        ValueError, OSError, ImportError: as `load`.
    """
    if isinstance(model_or_name, Llama):
        config, dtype = model_or_name.config, model_or_name.dtype
    elif model_or_name is None or isinstance(model_or_name, str | Path):
        config = load_config(model_or_name)
        dtype = getattr(torch, config.dtype or "float32")
    else:
        got = type(model_or_name).__name__
        raise ValueError(
            f"anatomy() got a value of type {got}: expected a model, a folder, a .gguf file or a name on the Hub"
        )
    parameters = _parameters(config)
    heads, kv_heads, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return Anatomy(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        queries_per_kv=heads // kv_heads,
        head_dim=E,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        kv_bytes_per_token=2 * config.num_hidden_layers * kv_heads * E * dtype.itemsize,
        parameters=parameters,
        bytes=parameters["total"] * dtype.itemsize,
        dtype=str(dtype).removeprefix("torch."),
    )


def _parameters(config: LlamaConfig) -> dict[str, int]:
    """How many numbers each part holds; torch names a tied weight once."""
    counts = dict.fromkeys(PARTS, 0)
    norms = {
        name for role, name in config.family.names.items() if role.startswith(("before_", "after_")) or "norm" in role
    }
    named = {name: role for role, name in config.family.names.items()}
    for name, parameter in without_storage(config).named_parameters():
        words = name.split(".")
        if norms & {*words}:
            part = "norm"
        elif named[words[0]] == "lm_head":
            part = "unembedding"
        elif named[words[1]].startswith("embed_"):
            part = "embedding"
        else:
            part = "attention" if named[words[3]] == "self_attn" else "mlp"
        counts[part] += parameter.numel()
    return counts | {"total": sum(counts.values())}
