"""What the cases run on: the model under test, frozen or plastic for the while."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

import fastweights as fw
from fastweights.config import LlamaConfig
from fastweights.model import Llama
from fastweights.tokenizer import Tokenizer

from . import measure, peers
from .measure import Unavailable


def _usual(
    model_type: str, vocabulary: int, width: int, mlp: int, layers: int, heads: int, groups: int, **more: Any
) -> dict[str, Any]:
    """A config.json in the names that most families share."""
    return {
        "model_type": model_type, "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": mlp,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, **more,
    }  # fmt: skip


UNTIED = {"tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _usual("llama", 512, 64, 160, 4, 4, 2, **UNTIED),  # for trying the harness itself
    "135m": _usual("llama", 49152, 576, 1536, 30, 9, 3, rope_theta=1e5),  # SmolLM2-135M
    "1b": _usual("llama", 128256, 2048, 8192, 16, 32, 8, rope_theta=5e5),  # Llama-3.2-1B
    "8b": _usual("llama", 128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, **UNTIED),  # Llama-3.1-8B
    "gpt2": {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12},
    "qwen2.5-0.5b": _usual("qwen2", 151936, 896, 4864, 24, 14, 2, rope_theta=1e6),
    "gemma-3-270m": _usual(
        "gemma3_text", 262144, 640, 2048, 18, 4, 1, head_dim=256, sliding_window=512, query_pre_attn_scalar=256,
        hidden_activation="gelu_pytorch_tanh", rope_theta=1e6, rope_local_base_freq=1e4,
    ),
    "qwen3-0.6b": _usual("qwen3", 151936, 1024, 3072, 28, 16, 8, head_dim=128, rope_theta=1e6),
    # a quarter of the layers of Mistral-7B-v0.1: a CPU's memory may be too small for all
    "mistral-7b/4": _usual("mistral", 32000, 4096, 14336, 8, 32, 8, sliding_window=4096, **UNTIED),
}  # fmt: skip


def shape_config(name: str) -> LlamaConfig:
    return LlamaConfig.from_dict(SHAPES[name], f"shape {name}")


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, and not given back
        return torch.cuda.mem_get_info(device)[0] + kept
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """Random weights of a scale that keeps activations of the order of 1."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    need = dtype.itemsize * (measure.linear_parameters(config) + embedding)
    if need * 1.3 > available_bytes(device):
        raise Unavailable(f"{need / 1e9:.1f} GB of weights, {available_bytes(device) / 1e9:.1f} GB are free")
    with torch.device("meta"):
        model = Llama(config)
    model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1 if name.endswith(".weight") and config.family.norm != "rms1" else 0)
            else:
                scale = 0.5 / weight.shape[-1] ** 0.5
                apart = weight is model.model.embed_tokens.weight and not config.tie_word_embeddings
                weight.normal_(0, 1 if apart else scale, generator=generator)
    return model.requires_grad_(False).eval()


def byte_tokenizer(vocabulary: int) -> Tokenizer:
    """One token a byte, the ids spread over the vocabulary: random weights have no tokenizer of their own."""
    letters, apart = sorted(pre_tokenizers.ByteLevel.alphabet()), vocabulary // 256
    backend = Backend(models.BPE({letter: n * apart for n, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


class Bed:
    """The model under test and what the cases share; a fresh `peer` is made once."""

    def __init__(self, model: Llama, name: str, tokenizer: Any = None, folder: Path | None = None):
        self.model, self.name, self.tokenizer, self.folder = model, name, tokenizer, folder
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        self.linears = tuple(self.config.family.linears)  # of an MLP
        # relative, of logits: float32 as DESIGN §8 asks of the real model; half precision by its epsilon
        self.tolerance = 1e-5 if self.dtype.itemsize >= 4 else 4 * torch.finfo(self.dtype).eps

    def amplified(self, times: int) -> float:
        """The tolerance where events amplify rounding; in half precision `times` of it would pass anything."""
        return self.tolerance * (times if self.dtype.itemsize >= 4 else min(times, 2))

    @cached_property
    def peer(self) -> Any:
        need = measure.decode_bytes(self.config, self.dtype.itemsize, 0)
        if need * 1.2 > available_bytes(self.device):
            raise Unavailable(f"no memory for a copy of {need / 1e9:.1f} GB of weights for transformers")
        return peers.transformers_model(self.model)

    def ids(self, tokens: int, rows: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.config.vocab_size, (rows, tokens), generator=generator)

    def layers(self, count: int | None = 3) -> list[int]:
        """`count` layers from a third of the depth on (11, 12, 13 of 30), or all."""
        depth = self.config.num_hidden_layers
        if count is None or count >= depth:
            return list(range(depth))
        first = 11 if depth >= 14 else (depth - count) // 2
        return list(range(first, first + count))


RULE = fw.Hebbian(rate=1e-3)


class Plastic:
    """An episode of a plastic model; the model is plastic only while it runs, so others may use it frozen."""

    def __init__(
        self,
        bed: Bed,
        layers: Sequence[int],
        linears: Sequence[str],
        rank: int,
        length: int,
        overflow: str = "grow",
        archive: bool = False,
        rows: int = 1,
        rule: fw.rules.Rule = RULE,
    ):
        self.bed = bed
        swap = [(bed.model.model.layers[n].mlp, name) for n in layers for name in linears]
        fw.detach(bed.model)
        fw.attach(bed.model, layers, rule, linears=linears, rank=rank, overflow=overflow, archive=archive)
        self.linears = [(mlp, name, getattr(mlp, name)) for mlp, name in swap]
        self.episode = fw.Episode(bed.model, rows, max_length=length)

    def on(self) -> None:
        fw.detach(self.bed.model)
        for mlp, name, linear in self.linears:
            setattr(mlp, name, linear)
