"""tokenizer.model, a trained SentencePiece model → a pipeline of the `tokenizers` package, as transformers builds it.

The file is one protobuf message of which a dozen fields matter here, so it is read without a protobuf library.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from .bpe import CONTROL, NORMAL, UNKNOWN, USER_DEFINED

UNIGRAM, BPE = 1, 2  # kinds of models


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says: the pieces in the order of their ids, and how text becomes pieces.

    pieces: (text, score, kind) of each id.
    unk, bos, eos: the pieces with these roles; None where the model has none.
    charsmap: normalisation of characters, as SentencePiece compiled it; b"" = none.
    prefix: whether a space is put in front of every text.
    trim: whether spaces at both ends are dropped and runs of spaces become one.
    """

    pieces: list[tuple[str, float, int]]
    kind: int
    byte_fallback: bool
    unk: str | None
    bos: str | None
    eos: str | None
    charsmap: bytes
    prefix: bool
    trim: bool
    escape: bool

    @classmethod
    def read(cls, path: Path) -> SentencePieceModel:
        """Raises ValueError, with one sentence, for a file that is no SentencePiece model of a kind known here."""
        data = path.read_bytes()
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            raise ValueError(f"{path} is a tiktoken vocabulary, not a SentencePiece model: tokenizer.json is needed")
        try:
            fields = list(_fields(data))
            trainer = _last(value for number, value in fields if number == 2)
            normalizer = _last(value for number, value in fields if number == 3)
            pieces = [_piece(dict(_fields(value))) for number, value in fields if number == 1]
            names = {}
            for role, field, standard in (("unk", 40, b"<unk>"), ("bos", 41, b"<s>"), ("eos", 42, b"</s>")):
                there = trainer.get(field, field - 40) < 1 << 31  # -1, none, is a large number here
                names[role] = trainer.get(field + 5, standard).decode() if there else None
        except (ValueError, IndexError, struct.error, AttributeError, TypeError):
            raise ValueError(f"{path} is not a whole SentencePiece model") from None
        kind = trainer.get(3, UNIGRAM)
        if not pieces or kind not in (UNIGRAM, BPE):
            what = f"of kind { ({3: 'word', 4: 'char'}.get(kind, kind)) }" if pieces else "without pieces"
            raise ValueError(f"{path} is a SentencePiece model {what}: expected one of kind bpe or unigram")
        if trainer.get(24):
            raise ValueError(f"{path} has treat_whitespace_as_suffix, which fastweights does not implement")
        return cls(
            pieces=pieces,
            kind=kind,
            byte_fallback=bool(trainer.get(35, 0)),
            charsmap=normalizer.get(2, b""),
            prefix=bool(normalizer.get(3, 1)),
            trim=bool(normalizer.get(4, 1)),
            escape=bool(normalizer.get(5, 1)),
            **names,
        )

    def backend(self, llama: bool, legacy: bool | None, add_prefix_space: bool | None) -> Backend:
        """The pipeline, with the control pieces as special tokens.

        Args:
            llama: the rules of transformers' LlamaTokenizer, which has a pipeline of its own and takes the pieces
                from the file. False: the file's own rules, which give the ids that SentencePiece gives.
            legacy: True puts a space in front of every stretch of text between special tokens, False in front of
                the first alone; None is False for a LlamaTokenizer and True otherwise.
            add_prefix_space: of a LlamaTokenizer; None is True.
        """
        if llama and self.kind == BPE:
            return self._llama(bool(legacy), add_prefix_space is not False)
        return self._as_trained(legacy is not False)

    def _llama(self, legacy: bool, prefix: bool) -> Backend:
        vocab = {text: i for i, (text, _, _) in enumerate(self.pieces)}
        # a piece joins before those that came later in training: the order of its id
        merges = [(i, len(a), len(b), a, b) for text, i in vocab.items() for a, b in _halves(text, vocab)]
        backend = Backend(self._bpe(vocab, [(a, b) for *_, a, b in sorted(merges, key=lambda merge: merge[:3])], False))
        scheme = ("always" if legacy else "first") if prefix else "never"
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
        parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
        self._mark(backend, {CONTROL, USER_DEFINED})
        return backend

    def _as_trained(self, legacy: bool) -> Backend:
        owned = [text for text, _, kind in self.pieces if kind == USER_DEFINED]
        if self.kind == UNIGRAM:
            unk_id = next((i for i, (_, _, kind) in enumerate(self.pieces) if kind == UNKNOWN), None)
            scores = [(text, score) for text, score, _ in self.pieces]
            backend = Backend(models.Unigram(scores, unk_id, self.byte_fallback))
        else:
            vocab = {text: i for i, (text, _, _) in enumerate(self.pieces)}
            rank = {text: (-score, i) for i, (text, score, kind) in enumerate(self.pieces) if kind == NORMAL}
            merges = sorted((*rank[text], a, b) for text in rank for a, b in _halves(text, rank))
            backend = Backend(self._bpe(vocab, [(a, b) for *_, a, b in merges], bool(owned)))
        first: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.trim:  # of spaces alone: SentencePiece leaves other white space
            first += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if self.escape:
            first.append(normalizers.Replace(" ", "▁"))
        if self.prefix and legacy:  # Metaspace puts no second "▁" in front of one, SentencePiece does
            first.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
        backend.normalizer = normalizers.Sequence(first)
        then: list[Any] = []
        if self.prefix:
            scheme = "always" if legacy else "first"
            then.append(pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False))
        if owned:  # SentencePiece gives them out whole
            pattern = "|".join(re.escape(text) for text in sorted(owned, key=len, reverse=True))
            then.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
        if then:
            backend.pre_tokenizer = pre_tokenizers.Sequence(then)
        parts: list[Any] = [decoders.Replace("▁", " ")]
        parts += [decoders.ByteFallback()] if self.byte_fallback else []
        parts += [decoders.Fuse()] if self.byte_fallback or self.prefix else []
        parts += [decoders.Strip(" ", 1, 0)] if self.prefix else []
        backend.decoder = decoders.Sequence(parts)
        self._mark(backend, {CONTROL})
        return backend

    def _bpe(self, vocab: dict[str, int], merges: list[tuple[str, str]], whole: bool) -> models.BPE:
        """`whole`: a word that is a piece is taken without merging."""
        options = {"fuse_unk": True, "byte_fallback": self.byte_fallback, "ignore_merges": whole}
        return models.BPE(vocab=vocab, merges=merges, unk_token=self.unk, **options)

    def _mark(self, backend: Backend, kinds: set[int]) -> None:
        """Pieces of some kinds are found in the text before anything else; control pieces are special."""
        marked = [(text, kind == CONTROL) for text, _, kind in self.pieces if kind in kinds]
        if self.unk is not None:
            marked = [(self.unk, True), *marked]
        backend.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in marked])


def _halves(text: str, known: dict) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(text)):
        if text[:cut] in known and text[cut:] in known:
            yield text[:cut], text[cut:]


def _piece(fields: dict[int, Any]) -> tuple[str, float, int]:
    return fields.get(1, b"").decode(), struct.unpack("<f", fields.get(2, b"\0\0\0\0"))[0], fields.get(3, NORMAL)


def _last(messages: Iterator[bytes]) -> dict[int, Any]:
    return next((dict(_fields(message)) for message in reversed(list(messages))), {})


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: a number for a varint, bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if (wire := key & 7) == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(data, at)
        if wire not in (1, 2, 5) or at + length > len(data):
            raise ValueError
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
