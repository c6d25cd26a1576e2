"""A vocabulary as a .gguf or a SentencePiece model holds it → a byte-level or SentencePiece BPE of `tokenizers`."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

# what kind of token each entry is, numbered as SentencePiece and llama.cpp do
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# The regular expressions that the models' own tokenizer.json files hold.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # every digit by itself
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    _GPT2,
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)  # llama.cpp's, for files that name none

# llama.cpp's names for how text is split before byte-level BPE; several name the same way.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0"), (_GPT2,)),
    **dict.fromkeys(("mellum", "modern-bert", "exaone4"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("exaone", "minerva-7b", "mellum2"), (_DIGIT, _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), (LLAMA3,)),
    **dict.fromkeys(("midm-2.0", "lfm2", "jina-v5-nano", "smaug-bpe", "dbrx"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2,)),
    "default": _DEFAULT,
}
# Text is composed (NFC) first in the tokenizers of Qwen and of GPT-NeoX, which are those of MPT and OLMo; llama.cpp
# leaves that out.
COMPOSED = ("qwen2", "deepseek-r1-qwen", "mpt", "olmo")
NOT_LLAMA_3 = ("smaug-bpe", "dbrx")  # split like Llama 3, but merge every word and write BOS only if told to


def writes_bos(pre: str) -> bool:
    """Whether texts start with BOS where a file is silent: Llama 3's do, not those that only split like it."""
    return PRE_TOKENIZERS[pre] == (LLAMA3,) and pre not in NOT_LLAMA_3


def byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Backend:
    """Byte-level BPE over words that are split as `pre`, a key of PRE_TOKENIZERS, says."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    # Llama 3's tokenizer takes a whole word that is in the vocabulary without merging
    backend = Backend(models.BPE(vocab=vocab, merges=pairs, ignore_merges=writes_bos(pre)))
    splits: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if p == _DIGIT else pre_tokenizers.Split(Regex(p), "isolated")
        for p in PRE_TOKENIZERS[pre]
    ]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pre in COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe(
    tokens: list[str], kinds: list[int], scores: list[float], unknown: int | None, space_prefix: bool
) -> Backend:
    """SentencePiece's BPE: the pair whose piece scores highest is joined first, bytes where no piece fits."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    joinable = {t for t, kind in zip(tokens, kinds, strict=True) if kind in (NORMAL, USER_DEFINED, UNUSED)}
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
