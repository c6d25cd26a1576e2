"""A Llama in a .gguf file, or in the parts of a split one → config, tensors, tokenizer. Needs the `gguf` package.

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
from tokenizers import AddedToken
from torch import Tensor

from .bpe import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    USER_DEFINED,
    byte_level_bpe,
    sentencepiece_bpe,
    writes_bos,
)
from .config import LlamaConfig
from .files import one_line, warn
from .rope import RopeScaling
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

# The architectures that are read, and whether llama.cpp reorders the rows of their q and k.
PERMUTED = {"llama": True, "qwen2": False}
# Tokens that end a turn or a text whatever the metadata says: llama.cpp knows them by their text.
_ENDS = {
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>"),
    *("[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>", "<|return|>"),
    *("<|call|>", "<|flush|>", "<|calls|>", "<turn|>", "<|tool_response>", "[e~["),
    # of a file or a repository, in models of code
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
    *("<REPO>", "<reponame>", "<|file_sep|>"),
}


class GgufFile:
    """An opened .gguf file of an architecture in PERMUTED; refuses anything else with a one-line ValueError.

    `config` is ready; `tensors()` yields Hugging Face names with float32 values, one at a time; `tokenizer()`
    rebuilds the tokenizer from the file's vocabulary and merges.
    """

    def __init__(self, path: str | Path):
        try:
            import gguf
        except ImportError:
            raise ImportError(f'reading {path} needs the gguf package: pip install "fastweights[demo]"') from None
        self._dequantize: Callable[..., np.ndarray] = gguf.quants.dequantize
        self.path, self._readers = _parts(Path(path), gguf.GGUFReader)
        self._reader = self._readers[0]  # the metadata is in the first part
        self.architecture: str = self._get("general.architecture")
        if self.architecture not in PERMUTED:
            raise ValueError(
                f"{self.path} has the architecture {self.architecture!r}, and fastweights implements only "
                f"{' and '.join(map(repr, PERMUTED))}"
            )
        self._tensors = [tensor for reader in self._readers for tensor in reader.tensors]
        self._shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in self._tensors}
        for name in self._shapes:
            if name != "rope_freqs.weight":
                self._hf_name(name)
        try:
            self.config = self._config()
        except ValueError as error:
            known = str(error).startswith(str(self.path))
            raise ValueError(str(error) if known else f"{self.path}: {error}") from None

    def __len__(self) -> int:
        """How many tensors `tensors()` yields."""
        return len(self._shapes.keys() - {"rope_freqs.weight"})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name: float32, q and k rows in Hugging Face order."""
        for tensor in self._tensors:
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
            if "q_proj" in name and PERMUTED[self.architecture]:
                values = unpermute(values, self.config.num_attention_heads)
            elif "k_proj" in name and PERMUTED[self.architecture]:
                values = unpermute(values, self.config.num_key_value_heads)
            yield name, torch.from_numpy(values)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, with special tokens, BOS rule, stop ids and chat templates as the file has them.

        None, with a warning, where the file has no vocabulary.
        """
        model = self._get("tokenizer.ggml.model", None)
        if model in (None, "none", "no_vocab"):
            warn(f"{self.path} has no vocabulary: the tokenizer is None, ids are the caller's")
            return None
        tokens: list[str] = self._get("tokenizer.ggml.tokens")
        kinds: list[int] = self._get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}
        special = {name: self._special(key) for name, key in names.items()} | {"pad_token": self.config.pad_token_id}
        if model == "gpt2":
            pre = self._pre()
            adds_bos = writes_bos(pre)
            merges = self._get("tokenizer.ggml.merges")
            try:
                backend = byte_level_bpe(tokens, merges, pre)
            except Exception as error:  # tokenizers raises a bare Exception
                raise ValueError(f"{self.path} holds no usable tokenizer: {one_line(error)}") from None
        elif model == "llama":
            adds_bos = True
            scores, prefix = self._get("tokenizer.ggml.scores"), self._get("tokenizer.ggml.add_space_prefix", True)
            backend = sentencepiece_bpe(tokens, kinds, scores, special["unk_token"], prefix)
        else:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.model is {model!r}, and fastweights implements only 'gpt2' and 'llama'"
            )
        added = [
            AddedToken(token, special=kind != USER_DEFINED or token in _ENDS, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in _ENDS
        ]
        backend.add_tokens(added)
        bos, eos = special["bos_token"], special["eos_token"]
        adds_eos = self._get("tokenizer.ggml.add_eos_token", False)
        if self._get("tokenizer.ggml.add_bos_token", adds_bos) and bos is not None:
            backend.post_processor = bos_processor(backend, bos, eos if adds_eos else None)
        config: dict[str, Any] = {name: tokens[i] for name, i in special.items() if i is not None}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config["model_max_length"] = self.config.max_position_embeddings
        return Tokenizer(backend, config, self._chat_templates(), self.config.eos_token_ids)

    def _get(self, key: str, *default: Any) -> Any:
        field = self._reader.get_field(key)
        if field is not None:
            return field.contents()
        if default:
            return default[0]
        raise ValueError(f"{self.path}: the key {key} is missing, and the model cannot be built without it")

    def _own(self, key: str, *default: Any) -> Any:
        """A key of the architecture."""
        return self._get(f"{self.architecture}.{key}", *default)

    def _special(self, name: str) -> int | None:
        """The id that the metadata gives a special token, or that llama.cpp takes where it is silent."""
        key = f"tokenizer.ggml.{name}_token_id"
        sentencepiece = self._get("tokenizer.ggml.model", None) == "llama"
        value = self._get(key, {"bos": 1, "eos": 2, "unknown": 0}.get(name) if sentencepiece else None)
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        size = len(tokens.data) if tokens else self._shapes["token_embd.weight"][0]
        if value is None or value < 0:  # -1 says none
            return None
        if value < size:
            return value
        if name in ("unknown", "padding"):  # nothing is computed with them
            warn(f"{self.path}: {key} is {value}, which the vocabulary of {size} does not hold: ignored")
            return None
        raise ValueError(f"{self.path}: {key} is {value}, expected an id below the vocabulary's {size}")

    def _stops(self) -> tuple[int, ...]:
        """Every id that ends a text or a turn: what the metadata names, then what llama.cpp knows by its text."""
        named = [self._special(key) for key in ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")]
        known = {token: i for i, token in enumerate(self._get("tokenizer.ggml.tokens", [])) if token in _ENDS}
        parts = set()  # tokens that end a part of a turn alone, in the vocabularies that llama.cpp knows
        if known.keys() >= {"<|return|>", "<|call|>"} or known.keys() >= {"<|flush|>", "<|calls|>"}:
            parts.add(known.get("<|end|>"))
        if "<|tool_response>" in known:
            parts.add(known.get("</s>"))
        return tuple(dict.fromkeys(i for i in [*named, *known.values()] if i is not None and i not in parts))

    def _pre(self) -> str:
        """How text is split before byte-level BPE: a key of PRE_TOKENIZERS."""
        name = self._get("tokenizer.ggml.pre", "")
        if not name:
            warn(
                f"{self.path} has no tokenizer.ggml.pre: text is split by llama.cpp's default, perhaps not as the "
                "model was trained; convert it again with a newer llama.cpp"
            )
            return "default"
        if name not in PRE_TOKENIZERS:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.pre is {name!r}, and fastweights implements only command-r, default, "
                "gpt-2, llama-bpe, qwen2, smollm and what llama.cpp splits like one of them"
            )
        return name

    def _chat_templates(self) -> dict[str, str]:
        """By name: `tokenizer.chat_template` is "default", `tokenizer.chat_template.tool_use` is "tool_use"."""
        key = "tokenizer.chat_template"
        named = {name.removeprefix(key + "."): self._get(name) for name in self._reader.fields if key + "." in name}
        default = self._get(key, None)
        return named | ({"default": default} if default else {})

    def _hf_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _NAMES:
            raise ValueError(f"{self.path}: the tensor {name} is not part of a Llama that fastweights implements")
        layer = f"model.layers.{match[1]}." if match[1] else ""
        return f"{layer}{_NAMES[match[2]]}.{match[3]}"

    def _config(self) -> LlamaConfig:
        if "token_embd.weight" not in self._shapes:
            raise ValueError(f"{self.path}: the tensor token_embd.weight is missing")
        if experts := self._own("expert_count", 0):
            raise ValueError(
                f"{self.path}: {self.architecture}.expert_count is {experts}, and fastweights implements no experts"
            )
        heads, width = self._own("attention.head_count"), self._own("embedding_length")
        for key, value in (
            ("head_count", heads),
            ("head_count_kv", self._own("attention.head_count_kv", heads)),
        ):
            if not isinstance(value, int):
                raise ValueError(
                    f"{self.path}: {self.architecture}.attention.{key} differs between layers, expected one number"
                )
        head_dim = self._own("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if (value := self._own(key, head_dim)) != head_dim:
                raise ValueError(
                    f"{self.path}: {self.architecture}.{key} is {value}, expected the head width {head_dim}"
                )
        theta = _shortest(self._own("rope.freq_base", 10000.0))
        return LlamaConfig(
            vocab_size=self._shapes["token_embd.weight"][0],
            hidden_size=width,
            intermediate_size=self._own("feed_forward_length"),
            num_hidden_layers=self._own("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._own("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self._own("context_length"),
            rms_norm_eps=_shortest(self._own("attention.layer_norm_rms_epsilon")),
            rope_theta=theta,
            rope_scaling=self._rope_scaling(theta, head_dim),
            attention_bias="blk.0.attn_q.bias" in self._shapes,
            mlp_bias="blk.0.ffn_gate.bias" in self._shapes,
            tie_word_embeddings="output.weight" not in self._shapes,
            bos_token_id=self._special("bos"),
            eos_token_ids=self._stops(),
            pad_token_id=self._special("padding"),
            dtype="float32",
            model_type=self.architecture,
        )

    def _rope_scaling(self, theta: float, head_dim: int) -> RopeScaling | None:
        kind = self._own("rope.scaling.type", "linear")
        factor = self._own("rope.scaling.factor", self._own("rope.scale_linear", 0.0))
        if kind not in ("none", "linear"):
            raise ValueError(
                f"{self.path}: {self.architecture}.rope.scaling.type is {kind!r}, "
                "and fastweights implements only 'none', 'linear' and Llama 3's"
            )
        linear = None
        if kind == "linear" and factor not in (0.0, 1.0):
            linear = RopeScaling("linear", _shortest(factor))
        tensor = next((t for t in self._tensors if t.name == "rope_freqs.weight"), None)
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


def _parts(path: Path, open_file: Callable[[Path], Any]) -> tuple[Path, list[Any]]:
    """A reader of the file, or of every part of the split model that it is a part of; and the first one's path."""

    def read(path: Path) -> Any:
        try:
            return open_file(path)
        except Exception as error:  # whatever a damaged header leads the reader into
            raise ValueError(f"{path} is not a readable GGUF file: {one_line(error)}") from None

    def value(reader: Any, key: str, default: int) -> int:
        field = reader.get_field(key)
        return default if field is None else int(field.contents())

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a .gguf file")
    reader = read(path)
    count = value(reader, "split.count", 1)
    if count <= 1:
        return path, [reader]
    ending = f"-of-{count:05}{path.suffix}"
    match = re.fullmatch(rf"(.*)-\d{{5}}{re.escape(ending)}", path.name)
    if match is None:
        raise ValueError(f"{path} is a part of a model split into {count} files, expected a name like m-00001{ending}")
    paths = [path.with_name(f"{match[1]}-{n:05}{ending}") for n in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise FileNotFoundError(
            f"{path} is a part of a model split into {count} files, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing beside it"
        )
    readers = [reader if part == path else read(part) for part in paths]
    for n, (part, reader) in enumerate(zip(paths, readers, strict=True)):
        if (found := value(reader, "split.no", -1)) != n:
            raise ValueError(f"{part}: split.no is {found}, expected {n} in this part of the split model")
    names = [tensor.name for reader in readers for tensor in reader.tensors]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{paths[0]}: two parts of the split model hold {twice[0]}")
    total = value(readers[0], "split.tensors.count", len(names))
    if len(names) != total:
        raise ValueError(f"{paths[0]}: the parts of the split model hold {len(names)} tensors, expected {total}")
    return paths[0], readers


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
