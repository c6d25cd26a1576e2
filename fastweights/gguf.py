"""A .gguf file, or the parts of a split one → config, tensors, tokenizer. Needs the `gguf` package.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

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
from .files import one_line, warn
from .gguf_config import Metadata, read_config
from .tokenizer import Tokenizer, bos_processor

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
    """An opened .gguf file of an architecture in ARCHITECTURES; refuses anything else with a one-line ValueError.

    `config` is ready; `shapes` has the checkpoint's names of tensors; `tensors()` yields them with float32 values, one
    at a time; `tokenizer()` rebuilds the tokenizer from the file's vocabulary and merges.
    """

    def __init__(self, path: str | Path):
        try:
            import gguf
        except ImportError:
            raise ImportError(f'reading {path} needs the gguf package: pip install "fastweights[demo]"') from None
        self._dequantize: Callable[..., np.ndarray] = gguf.quants.dequantize
        self.path, readers = _parts(Path(path), gguf.GGUFReader)
        self._reader = readers[0]  # the metadata is in the first part
        self._keys = Metadata(self.path, self._reader)
        self._get = self._keys.get
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
        if longrope := sorted(name for name in shapes if name.startswith("rope_factors_")):
            raise ValueError(
                f"{self.path}: {longrope[0]} is of the rope scaling longrope, which fastweights does not implement"
            )
        if "token_embd.weight" not in shapes:
            raise ValueError(f"{self.path}: the tensor token_embd.weight is missing")
        self._rows = shapes["token_embd.weight"][0]
        freqs = tensors.pop("rope_freqs.weight", None)  # a part of the configuration
        self._tensors = {self._checkpoint_name(name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: shapes[tensor.name] for name, tensor in self._tensors.items()}
        try:
            self.config = read_config(
                self._keys,
                shapes,
                None if freqs is None else np.asarray(freqs.data, dtype=np.float32).reshape(-1),
                bos_token_id=self._special("bos"),
                eos_token_ids=self._stops(),
                pad_token_id=self._special("padding"),
            )
        except ValueError as error:
            known = str(error).startswith(str(self.path))
            raise ValueError(str(error) if known else f"{self.path}: {error}") from None

    def __len__(self) -> int:
        """How many tensors `tensors()` yields."""
        return len(self.shapes)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name in `shapes`: float32, as the model has it. Shapes must be the model's."""
        for name, tensor in self._tensors.items():
            try:
                values = self._dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(
                    f"{self.path}: {tensor.name} is stored as {tensor.tensor_type.name}, "
                    "which the gguf package cannot dequantise"
                ) from None
            # a copy: float32 data would otherwise be a read-only view of the file
            values = np.array(values, dtype=np.float32).reshape(self.shapes[name])
            yield name, torch.from_numpy(self._keys.row.checkpoint_values(tensor.name, values, self.config))

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
        backend.add_tokens(self._added(model, tokens, kinds))
        bos, eos = special["bos_token"], special["eos_token"]
        adds_eos = self._get("tokenizer.ggml.add_eos_token", False)
        if self._get("tokenizer.ggml.add_bos_token", adds_bos) and bos is not None:
            backend.post_processor = bos_processor(backend, bos, eos if adds_eos else None)
        config: dict[str, Any] = {name: tokens[i] for name, i in special.items() if i is not None}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config["model_max_length"] = self.config.max_position_embeddings
        return Tokenizer(backend, config, self._chat_templates(), self.config.eos_token_ids)

    def _added(self, model: str, tokens: list[str], kinds: list[int]) -> list[AddedToken]:
        """The tokens that are found in a text before it is split."""
        stops = {tokens[i] for i in self.config.eos_token_ids}
        ends = _ENDS if "</s>" in stops else _ENDS - {"</s>"}
        # Phi-3's special tokens take the white space behind them; those around a whole text do not
        greedy = self._keys.architecture == "phi3" and model == "llama"
        whole = {"<unk>", "<s>", "<|endoftext|>"}
        return [
            AddedToken(
                token,
                special=kind != USER_DEFINED or token in ends,
                normalized=False,
                rstrip=greedy and token not in whole,
            )
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in ends
        ]

    def _special(self, name: str) -> int | None:
        """The id that the metadata gives a special token, or that llama.cpp takes where it is silent."""
        key = f"tokenizer.ggml.{name}_token_id"
        sentencepiece = self._get("tokenizer.ggml.model", None) == "llama"
        value = self._get(key, {"bos": 1, "eos": 2, "unknown": 0}.get(name) if sentencepiece else None)
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        size = len(tokens.data) if tokens else self._rows
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
        tokens = self._get("tokenizer.ggml.tokens", [])
        kinds = self._get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
        known = {token: i for i, token in enumerate(tokens) if token in _ENDS}
        parts = set()  # tokens that end a part of a turn alone, in the vocabularies that llama.cpp knows
        if known.keys() >= {"<|return|>", "<|call|>"} or known.keys() >= {"<|flush|>", "<|calls|>"}:
            parts.add(known.get("<|end|>"))
        if "</s>" in known and kinds[known["</s>"]] != CONTROL and known["</s>"] not in named:
            parts.add(known["</s>"])  # HTML, in the vocabularies of Gemma and Qwen
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

    def _checkpoint_name(self, name: str) -> str:
        row = self._keys.row
        found = row.checkpoint_name(name)
        if found is None:
            raise ValueError(
                f"{self.path}: the tensor {name} is not part of a {row.family.title} that fastweights implements"
            )
        return found


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
