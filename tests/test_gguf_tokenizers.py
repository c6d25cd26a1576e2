"""The tokenizers of families in .gguf files: ids as SentencePiece and transformers give them."""

import io
import random
import unicodedata

import numpy as np
import pytest
import sentencepiece
from test_gguf import byte_level_vocabulary
from test_gguf_families import CASES, write

from fastweights.gguf import GgufFile

TEXT = "the quick brown fox jumps over a lazy dog naïve café hello world def return x = 1 2 34"
WORDS = TEXT.split()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def tokenizer_of(path, name, tokens, **meta):
    meta = {"token_list": tokens, "context_length": 48} | meta
    embedding = [("token_embd.weight", np.zeros((len(tokens), 64), np.float32))]
    return GgufFile(write(path, CASES[name], embedding, **meta)).tokenizer()


def trained(symbols, **options):
    """A SentencePiece model with byte fallback in which `symbols` are user-defined."""
    rng, model = random.Random(0), io.BytesIO()
    corpus = [" ".join(rng.choices(WORDS, k=rng.randrange(3, 12))) for _ in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def as_converted(pieces, control):
    """Tokens, scores and kinds as llama.cpp's converter writes them."""
    tokens, scores, kinds = [], [], []
    for i in range(pieces.vocab_size()):
        text = pieces.id_to_piece(i)
        kind = UNKNOWN if pieces.is_unknown(i) else BYTE if pieces.is_byte(i) else NORMAL
        if pieces.is_control(i) or text in control:
            kind = CONTROL
        elif pieces.get_score(i) == 0 and kind == NORMAL and i < 259:  # user-defined ones stand before the bytes
            text, kind = text.replace("▁", " "), USER_DEFINED
        tokens.append(text)
        kinds.append(kind)
        scores.append(-1000.0 if kind in (CONTROL, USER_DEFINED) else pieces.get_score(i))
    return {"token_scores": scores, "token_types": kinds, "tokenizer_model": "llama"}, tokens


def test_gemmas_vocabulary_gives_the_ids_and_the_text_of_sentencepiece(tmp_path):
    symbols = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁", "<s>", "</s>"]
    roles = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    ids = {f"{role}_id": i for role, i in roles.items()} | {f"{role}_piece": f"<{role}>" for role in roles}
    pieces = trained(symbols, add_dummy_prefix=False, **ids)
    meta, tokens = as_converted(pieces, symbols[:2])
    meta |= {f"{role}_token_id": i for role, i in roles.items()} | {"add_space_prefix": False}
    tokenizer = tokenizer_of(tmp_path / "m.gguf", "gemma3", tokens, **meta)
    rng = random.Random(1)
    parts = [*WORDS, " ", "  ", "   ", "    ", "\n", "\n\n", "<s>", "</s>", "<end_of_turn>", "日本", "🎉", "é", "a"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randrange(1, 12)))
        wanted = pieces.encode(text)
        assert tokenizer.encode(text) == [2, *wanted], text
        assert tokenizer.decode(wanted) == text
    # <end_of_turn> ends a turn; </s> is HTML, which a Gemma writes and goes on
    assert tokenizer.eos_token_ids == (1, tokens.index("<end_of_turn>"))
    assert tokenizer.decode(pieces.encode("a</s><end_of_turn>"), skip_special_tokens=True) == "a</s>"


def test_phi3s_special_tokens_take_the_white_space_behind_them(tmp_path):
    symbols = ["<|endoftext|>", "<|user|>", "<|end|>"]
    pieces = trained(symbols)
    meta, tokens = as_converted(pieces, symbols)
    tokenizer = tokenizer_of(tmp_path / "m.gguf", "phi3", tokens, bos_token_id=1, eos_token_id=2, **meta)
    user, end, of_text = (tokens.index(token) for token in ("<|user|>", "<|end|>", "<|endoftext|>"))
    fox, newline = pieces.encode("fox"), pieces.piece_to_id("<0x0A>")
    assert tokenizer.encode("<|user|>\nfox<|end|> \n<|user|>") == [1, user, *fox, end, user]
    assert newline in tokenizer.encode("<|endoftext|>\nfox")
    assert newline in tokenizer.encode("<s>\nfox")
    assert tokenizer.eos_token_ids == (2, of_text, end)


@pytest.mark.parametrize(
    ("name", "pre", "composed"), [("gptneox", "olmo", True), ("gptneox", "mpt", True), ("gpt2", "gpt-2", False)]
)
def test_gpt_neox_composes_characters_and_gpt2_does_not(tmp_path, name, pre, composed):
    tokens, merges = byte_level_vocabulary()
    meta = {"tokenizer_model": "gpt2", "tokenizer_pre": pre, "token_merges": merges}
    tokenizer = tokenizer_of(tmp_path / "m.gguf", name, tokens, **meta)
    text = "naïve café"
    apart = unicodedata.normalize("NFD", text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.encode(apart) == tokenizer.encode(text)) == composed
    assert tokenizer.bos_token_id is None
