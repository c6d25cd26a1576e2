"""tokenizer.model: ids and text as transformers and SentencePiece have them, on models that are trained here."""

import json
import random
import shutil
import warnings

import pytest
import sentencepiece
from transformers import AutoTokenizer

from fastweights.bpe import sentencepiece_bpe
from fastweights.spm import SentencePieceModel
from fastweights.tokenizer import Tokenizer

TEXT = (
    "the quick brown fox jumps over a lazy dog naïve café 日本語 テキスト hello world ünïcode straße привет мир def "
    "return x = 1 2 34 2024 model token"
)
WORDS = TEXT.split()
LLAMA = {  # as the tokenizers of Llama 1 and 2 were trained
    "vocab_size": 420,
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.995,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "minloglevel": 2,
}
KINDS = {
    "llama": {},
    "normalising": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "user symbols": {"user_defined_symbols": ["<|x|>", "foo", "he"], "control_symbols": ["[CTRL]"], "pad_id": 3},
    "no bytes": {"byte_fallback": False, "vocab_size": 150},
    "unigram": {"model_type": "unigram", "vocab_size": 330, "hard_vocab_limit": False},
}
CHARACTERS = [
    *"abcdefghijklmnop ABC 0123456789.,!?\n\t",
    *[" "] * 8,
    *["▁", "日", "e\u0301", "ß", "🎉", "👩\u200d👩\u200d👧", "ﬁ", "\xa0", "<0x41>", "[INST]", "foo", "he", "<|x|>"],
]
SPECIAL = ["<s>", "</s>", "<unk>", "[CTRL]", "[PAD]"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CLASS = {**NAMES, "tokenizer_class": "LlamaTokenizer"}

pytestmark = pytest.mark.filterwarnings("ignore:.*add_bos_token, so texts begin without BOS")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A function from the name of a kind to the path of its model, trained once."""
    folder, rng = tmp_path_factory.mktemp("spm"), random.Random(0)
    corpus = [" ".join(rng.choices(WORDS, k=rng.randrange(3, 12))) for _ in range(2000)]

    def model(kind):
        path = folder / f"{kind}.model"
        if not path.exists():
            options = {**LLAMA, **KINDS[kind]}
            prefix = str(path.with_suffix(""))
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus), model_prefix=prefix, **options)
        return path

    return model


def both(path, folder, config, **files):
    """Our tokenizer and transformers' of a folder with this tokenizer.model."""
    shutil.copy(path, folder / "tokenizer.model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, value in {"tokenizer_config": config, **files}.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)


def strings(count, special=(), seed=1):
    rng = random.Random(seed)
    for _ in range(count):
        if rng.random() < 0.5:
            yield "".join(rng.choices([*CHARACTERS, *special], k=rng.randrange(20)))
        else:
            words = rng.choices([*WORDS, *special], k=rng.randrange(1, 6))
            yield " " * rng.choice([0, 0, 1, 2]) + " ".join(words) + " " * rng.choice([0, 0, 1])


def same(ours, theirs, texts):
    for text in texts:
        for special in (True, False):
            got = ours.encode(text, add_special_tokens=special)
            assert got == theirs(text, add_special_tokens=special).input_ids, text
    assert (len(ours), ours.bos_token_id) == (len(theirs), theirs.bos_token_id)
    rng = random.Random(2)
    for _ in range(len(texts)):
        ids = [rng.randrange(len(ours)) for _ in range(rng.randrange(1, 15))]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), ids


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("prefix", [None, True, False])
def test_a_llama_tokenizer_has_the_ids_and_the_text_of_transformers(trained, tmp_path, legacy, prefix):
    config = {**CLASS, "legacy": legacy, "add_prefix_space": prefix, "add_bos_token": True}
    config = {key: value for key, value in config.items() if value is not None}
    ours, theirs = both(trained("llama"), tmp_path, config)
    assert type(theirs).__name__ == "LlamaTokenizer"
    texts = [text for text in strings(2000, SPECIAL) if not text.startswith("<s>")]  # BOS is never doubled here
    same(ours, theirs, texts)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_class_the_ids_are_those_of_sentencepiece_and_transformers(trained, tmp_path, kind):
    ours, theirs = both(trained(kind), tmp_path, None)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(trained(kind)))
    same(ours, theirs, list(strings(500, SPECIAL)))
    for text in strings(2000, seed=3):
        if kind == "unigram":  # `tokenizers` takes a written-out byte token for the byte there, as transformers does
            text = text.replace("<0x41>", "")
        ids = pieces.encode(text)
        assert ours.encode(text) == ids, text
        if kind != "no bytes":  # SentencePiece shows <unk> as " ⁇ "
            assert ours.decode(ids) == pieces.decode(ids), text
    assert (ours.bos_token, ours.eos_token_ids) == ("<s>", (2,))


def test_the_same_pieces_in_a_gguf_give_the_ids_and_the_text_of_sentencepiece(trained):
    texts, scores, kinds = zip(*SentencePieceModel.read(trained("llama")).pieces, strict=True)
    backend = sentencepiece_bpe(list(texts), list(kinds), list(scores), unknown=0, space_prefix=True)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(trained("llama")))
    for text in strings(2000, seed=5):
        ids = pieces.encode(text)
        assert backend.encode(text).ids == ids, text
        assert backend.decode(ids) == pieces.decode(ids), text


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_bos_and_eos_are_written_where_the_config_says_so(trained, tmp_path, bos, eos):
    config = {k: v for k, v in {**CLASS, "add_bos_token": bos, "add_eos_token": eos}.items() if v is not None}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours, theirs = both(trained("llama"), tmp_path, config)
    ours_said = [str(one.message) for one in said if "add_bos_token, so texts begin without BOS" in str(one.message)]
    assert len(ours_said) == (bos is None)
    assert ours.encode("hello") == theirs("hello").input_ids
    assert (ours.encode("hello")[0] == 1, ours.encode("hello")[-1] == 2) == (bool(bos), bool(eos))


def token(content, **flags):
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False, **flags}


@pytest.mark.parametrize("config", [CLASS, {}, None])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"[PAD]": 420, "tok": 421}},
        {"added_tokens": {"[PAD]": 420}, "special_tokens_map": {"pad_token": "[PAD]"}},
        {"special_tokens_map": {"pad_token": token("[PAD]", lstrip=True), "bos_token": token("<s>")}},
        {"decoder": {"420": token("[PAD]", special=True), "421": token("tok", normalized=True, special=False)}},
    ],
)
def test_added_tokens_of_every_file_are_those_of_transformers(trained, tmp_path, config, legacy, files):
    decoder = files.get("decoder")
    if config is not None:
        config = {**config, "legacy": legacy, **({"added_tokens_decoder": decoder} if decoder else {})}
    others = {name: value for name, value in files.items() if name != "decoder"}
    ours, theirs = both(trained("llama"), tmp_path, config, **others)
    same(ours, theirs, list(strings(150, SPECIAL)))


def test_what_is_saved_is_the_same_to_us_and_to_transformers(trained, tmp_path):
    for number, config in enumerate(
        [{**CLASS, "legacy": False, "add_bos_token": True}, {**CLASS, "legacy": True}, None]
    ):
        ours, theirs = both(trained("llama"), tmp_path, config)
        ours.save(tmp_path / str(number))
        again = Tokenizer.from_folder(tmp_path / str(number))
        theirs = AutoTokenizer.from_pretrained(tmp_path / str(number))
        for text in strings(200):
            assert ours.encode(text) == again.encode(text) == theirs(text).input_ids, text
        for path in tmp_path.glob("*.json"):
            path.unlink()


def test_what_is_no_sentencepiece_model_of_a_known_kind_is_refused_by_name(trained, tmp_path):
    path = tmp_path / "tokenizer.model"
    whole = trained("llama").read_bytes()
    for broken in (b"", b"\x0a", whole[: len(whole) // 2], b"PK\x03\x04" + whole):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"tokenizer\.model is (not a whole SentencePiece model|a Sentence.* without)"
        ):
            SentencePieceModel.read(path)
    path.write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(
        ValueError, match=r"is a tiktoken vocabulary, not a SentencePiece model: tokenizer\.json is needed"
    ):
        SentencePieceModel.read(path)
    corpus = iter([" ".join(WORDS)] * 50)
    options = {"model_prefix": str(tmp_path / "tokenizer"), "minloglevel": 2, "vocab_size": 20}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=corpus, model_type="word", **options)
    with pytest.raises(ValueError, match="is a SentencePiece model of kind word: expected one of kind bpe or unigram"):
        SentencePieceModel.read(path)
