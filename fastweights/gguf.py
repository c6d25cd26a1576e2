"""A Llama in a .gguf file → config, tensors, tokenizer. Import only; needs the `gguf` package.

The format and llama.cpp's names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor

from .config import LlamaConfig, RopeScaling
from .tokenizer import Tokenizer, bos_processor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# The regular expressions that the models' own tokenizer.json files hold.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    _GPT2,
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)  # llama.cpp's, for files that name none

_PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "gpt2"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3,)),
    "default": _DEFAULT,
}


class GgufFile:
    """An opened .gguf file of Llama architecture; refuses anything else with a one-line ValueError.

    `config` is ready; `tensors()` yields Hugging Face names with float32 values, one at a time; `tokenizer()`
    rebuilds the tokenizer from the file's vocabulary and merges.
    """

    def __init__(self, path: str | Path):
        try:
            import gguf
        except ImportError:
            raise ImportError(f'reading {path} needs the gguf package: pip install "fastweights[demo]"') from None
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path} does not exist, expected a .gguf file")
        self._dequantize: Callable[..., np.ndarray] = gguf.quants.dequantize
        try:
            self._reader = gguf.GGUFReader(self.path)
        except Exception as error:  # whatever a damaged header leads the reader into
            raise ValueError(f"{path} is not a readable GGUF file: {' '.join(str(error).split())}") from None
        architecture = self._get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path} has the architecture {architecture!r}, and fastweights implements only 'llama'")
        self._shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self._reader.tensors}
        for name in self._shapes:
            if name != "rope_freqs.weight":
                self._hf_name(name)
        try:
            self.config = self._config()
        except ValueError as error:
            raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None

    def __len__(self) -> int:
        """How many tensors `tensors()` yields."""
        return len(self._shapes.keys() - {"rope_freqs.weight"})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name: float32, q and k rows in Hugging Face order."""
        for tensor in self._reader.tensors:
            if tensor.name == "rope_freqs.weight":
                continue
            name = self._hf_name(tensor.name)
            try:
                values = self._dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, "
                    "which the gguf package cannot dequantise"
                ) from None
            # a copy: float32 data would otherwise be a read-only view of the file
            values = np.array(values, dtype=np.float32).reshape(self._shapes[tensor.name])
            if "q_proj" in name:
                values = unpermute(values, self.config.num_attention_heads)
            elif "k_proj" in name:
                values = unpermute(values, self.config.num_key_value_heads)
            yield name, torch.from_numpy(values)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with special tokens, BOS rule, stop ids and chat template as the file has them."""
        tokens: list[str] = self._get("tokenizer.ggml.tokens")
        kinds: list[int] = self._get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
        model, pre = self._get("tokenizer.ggml.model"), ""
        if model == "gpt2":
            pre = self._get("tokenizer.ggml.pre")
            backend = _byte_level_bpe(tokens, self._get("tokenizer.ggml.merges"), self._pre_tokenizer(pre))
        elif model == "llama":
            backend = _sentencepiece_bpe(
                tokens,
                kinds,
                self._get("tokenizer.ggml.scores"),
                self._get("tokenizer.ggml.unknown_token_id", None),
                self._get("tokenizer.ggml.add_space_prefix", True),
            )
        else:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.model is {model!r}, and fastweights implements only 'gpt2' and 'llama'"
            )
        backend.add_tokens(
            [
                AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
                for token, kind in zip(tokens, kinds, strict=True)
                if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
            ]
        )
        ids = {key: self._token_id(key, len(tokens)) for key in ("bos", "eos", "eot", "eom", "unknown", "padding")}
        bos, eos = ids["bos"], ids["eos"]
        adds_bos = self._get("tokenizer.ggml.add_bos_token", model == "llama" or _PRE_TOKENIZERS.get(pre) == (_LLAMA3,))
        adds_eos = self._get("tokenizer.ggml.add_eos_token", False)
        if adds_bos and bos is not None:
            backend.post_processor = bos_processor(backend, bos, eos if adds_eos else None)
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        config: dict[str, Any] = {name: tokens[i] for key, name in names.items() if (i := ids[key]) is not None}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config["model_max_length"] = self.config.max_position_embeddings
        template = self._get("tokenizer.chat_template", None)
        stops = [i for key in ("eos", "eot", "eom") if (i := ids[key]) is not None]
        return Tokenizer(backend, config, {"default": template} if template else None, stops)

    def _get(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self.path}: the key {key} is missing, and the model cannot be built without it")

    def _token_id(self, name: str, vocab_size: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self._get(key, None)
        if value is not None and value >= vocab_size:
            raise ValueError(f"{self.path}: {key} is {value}, expected an id below the vocabulary's {vocab_size}")
        return value

    def _pre_tokenizer(self, name: str) -> tuple[str, ...]:
        if name not in _PRE_TOKENIZERS:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.pre is {name!r}, and fastweights implements only "
                f"{', '.join(sorted(_PRE_TOKENIZERS))}"
            )
        return _PRE_TOKENIZERS[name]

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _NAMES:
            raise ValueError(f"{self.path}: the tensor {name} is not part of a Llama that fastweights implements")
        layer = f"model.layers.{match[1]}." if match[1] else ""
        return f"{layer}{_NAMES[match[2]]}.{match[3]}"

    def _config(self) -> LlamaConfig:
        if "token_embd.weight" not in self._shapes:
            raise ValueError(f"{self.path}: the tensor token_embd.weight is missing")
        if experts := self._get("llama.expert_count", 0):
            raise ValueError(f"{self.path}: llama.expert_count is {experts}, and fastweights implements no experts")
        heads, width = self._get("llama.attention.head_count"), self._get("llama.embedding_length")
        for key, value in (
            ("head_count", heads),
            ("head_count_kv", self._get("llama.attention.head_count_kv", heads)),
        ):
            if not isinstance(value, int):
                raise ValueError(f"{self.path}: llama.attention.{key} differs between layers, expected one number")
        head_dim = self._get("llama.attention.key_length", width // heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if (value := self._get(key, head_dim)) != head_dim:
                raise ValueError(f"{self.path}: {key} is {value}, expected the head width {head_dim}")
        theta = _shortest(self._get("llama.rope.freq_base", 10000.0))
        return LlamaConfig(
            vocab_size=self._shapes["token_embd.weight"][0],
            hidden_size=width,
            intermediate_size=self._get("llama.feed_forward_length"),
            num_hidden_layers=self._get("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self._get("llama.context_length"),
            rms_norm_eps=_shortest(self._get("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            rope_scaling=self._rope_scaling(theta, head_dim),
            attention_bias="blk.0.attn_q.bias" in self._shapes,
            mlp_bias="blk.0.ffn_gate.bias" in self._shapes,
            tie_word_embeddings="output.weight" not in self._shapes,
            bos_token_id=self._get("tokenizer.ggml.bos_token_id", None),
            eos_token_ids=tuple(
                dict.fromkeys(
                    i
                    for key in ("eos", "eot", "eom")
                    if (i := self._get(f"tokenizer.ggml.{key}_token_id", None)) is not None
                )
            ),
            pad_token_id=self._get("tokenizer.ggml.padding_token_id", None),
            dtype="float32",
        )

    def _rope_scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        kind = self._get("llama.rope.scaling.type", "linear")
        factor = self._get("llama.rope.scaling.factor", self._get("llama.rope.scale_linear", 0.0))
        if kind not in ("none", "linear"):
            raise ValueError(
                f"{self.path}: llama.rope.scaling.type is {kind!r}, "
                "and fastweights implements only 'none', 'linear' and Llama 3's"
            )
        linear = None
        if kind == "linear" and factor not in (0.0, 1.0):
            linear = RopeScaling("linear", _shortest(factor))
        tensor = next((t for t in self._reader.tensors if t.name == "rope_freqs.weight"), None)
        if tensor is None:
            return linear
        stretch = np.asarray(tensor.data, dtype=np.float32).reshape(-1)
        if (stretch == 1).all():
            return linear
        # llama.cpp stores what Llama 3's scaling does to each frequency; the parameters are published
        scaling = RopeScaling("llama3", _shortest(stretch.max()), 1.0, 4.0, 8192)
        wanted = llama3_stretch(scaling, theta, head_dim)
        if linear is not None or stretch.shape != wanted.shape or not np.allclose(stretch, wanted, rtol=1e-4, atol=0):
            raise ValueError(f"{self.path}: rope_freqs.weight is not Llama 3's scaling, the only one implemented")
        return scaling


_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows [heads · E, ...]: llama.cpp's order (rope's pairs adjacent) to Hugging Face's (halves)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_stretch(scaling: RopeScaling, theta: float, head_dim: int) -> np.ndarray:
    """What Llama 3's scaling divides each rope frequency by, [head_dim / 2] float64."""
    frequency = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clip(0, 1)
    return 1 / ((1 - kept) / scaling.factor + kept)


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.99999974e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _byte_level_bpe(tokens: list[str], merges: list[str], patterns: tuple[str, ...]) -> Backend:
    llama3 = patterns == (_LLAMA3,)  # its tokenizer takes a whole word that is in the vocabulary without merging
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=llama3))
    splits: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if p == _DIGIT else pre_tokenizers.Split(Regex(p), "isolated")
        for p in patterns
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(
    tokens: list[str], kinds: list[int], scores: list[float], unknown: int | None, space_prefix: bool
) -> Backend:
    """SentencePiece's BPE: the pair whose piece scores highest is joined first, bytes where no piece fits."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    joinable = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (_NORMAL, _USER_DEFINED, _UNUSED)}
    for token, score in zip(tokens, scores, strict=True):
        if token not in joinable:
            continue
        halves = [(token[:n], token[n:]) for n in range(1, len(token))]
        known = [(left, right) for left, right in halves if left in joinable and right in joinable]
        for left, right in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])):
            merges.append((-score, -len(left), -len(right), left, right))
    merges.sort(key=lambda merge: merge[:3])
    backend = Backend(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            unk_token=tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix: list[Any] = [normalizers.Prepend("▁")] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend
