# ruff: noqa: E501 (chat templates as they are in the wild)
"""Text ↔ ids: streaming, BOS, chat templates and refusals, on byte-level and SentencePiece-like tokenizers."""

import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastweights.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "  two  spaces and\n\nnew lines",
    "naïve café 日本語 🎉",
] * 20
TEXTS = [
    "the quick dog",
    " a leading space",
    "  two, and a trailing one ",
    "日本語テキスト",
    "🎉👩‍👩‍👧🇩🇪 family",
    "tab\tand\n\nlines\r\n",
    "e\u0301 combining, \u200d joiner, \x00 null, \x7f",
    "",
    " ",
    "�",
    "<0x41> as text",
]


def byte_level(bos=True):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, {"default": TEMPLATE})


def sentencepiece():
    """Llama 2's pipeline: a space becomes ▁, one is put in front, what the vocabulary lacks becomes bytes."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    backend.train_from_iterator(
        ["▁" + text.replace(" ", "▁") for text in CORPUS[::3]],
        trainers.BpeTrainer(vocab_size=340, special_tokens=specials, show_progress=False),
    )
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the byte tokens are ordinary pieces
    state["pre_tokenizer"] = None
    backend = Backend.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, {"default": TEMPLATE})


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n  {% if message['role'] == 'user' %}\n[INST] {{ message['content'] }} "
    "[/INST]{% else %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def streamed(tokenizer, ids, skip=False):
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.push(i) for i in ids]
    return pieces, stream.flush()


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_gives_exactly_the_decoded_text(tokenizer, text):
    ids = tokenizer.encode(text)
    for skip in (False, True):
        pieces, rest = streamed(tokenizer, ids, skip)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=skip)
        if "�" not in text:
            assert not any("�" in piece for piece in [*pieces, rest])


@pytest.mark.parametrize("text", [t for t in TEXTS if t and "\x00" not in t])
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("skip", [False, True])
def test_streaming_random_ids_is_the_decoded_text(tokenizer, skip):
    """Random bytes are mostly no text at all: whatever `decode` makes of them, the stream adds up to it."""
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 25))]
        if rng.random() < 0.5:
            ids = [rng.choice([0, 1, 2, rng.randrange(3, 259)]) for _ in ids]  # mostly single bytes
        pieces, rest = streamed(tokenizer, ids, skip)
        assert "".join(pieces) + rest == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_streaming_does_not_wait_for_the_end(tokenizer):
    pieces, rest = streamed(tokenizer, tokenizer.encode("the quick brown fox jumps over the lazy dog"))
    assert rest == ""
    assert sum(piece != "" for piece in pieces) == len(pieces)


def test_a_stream_may_start_inside_a_text_with_a_space(tokenizer):
    """A generated continuation starts with ' quick': what precedes it is context that the caller pushes first."""
    ids = tokenizer.encode("the quick")
    pieces, rest = streamed(tokenizer, ids, skip=True)
    assert "".join(pieces) + rest == "the quick"
    assert " quick" in "".join(pieces[2:]) or pieces[-1].endswith("quick")


def test_tokens_shows_every_id_in_print(tokenizer):
    everything = range(tokenizer.vocab_size)
    pieces = tokenizer.tokens(everything)
    assert len(pieces) == tokenizer.vocab_size
    assert all(piece and piece.isprintable() for piece in pieces)
    assert tokenizer.tokens([tokenizer.vocab_size + 7]) == [f"<unused {tokenizer.vocab_size + 7}>"]
    assert "".join(tokenizer.tokens(tokenizer.encode("the quick dog"))).removeprefix("<s>").strip() == "the quick dog"
    assert "\\n" in "".join(tokenizer.tokens(tokenizer.encode("a\nb")))


def test_bos_comes_from_the_post_processor_and_never_twice(tokenizer):
    bos = tokenizer.bos_token_id
    assert tokenizer.encode("dog")[0] == bos
    assert tokenizer.encode("dog", add_special_tokens=False)[0] != bos
    assert tokenizer.encode("<s>dog").count(bos) == 1
    assert tokenizer.encode("<s>dog", add_special_tokens=False).count(bos) == 1
    assert tokenizer.encode("<s><s>dog").count(bos) == 2  # the text itself says so
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "dog"}])
    assert prompt.startswith("<s>")
    assert tokenizer.encode(prompt).count(bos) == 1
    assert byte_level(bos=False).encode("dog")[0] != bos


def test_add_bos_token_counts_where_tokenizer_json_says_nothing():
    plain = byte_level(bos=False)
    again = Tokenizer(plain.backend, plain.config | {"add_bos_token": True})
    assert again.encode("dog")[0] == again.bos_token_id


def test_truncation_and_padding_left_in_tokenizer_json_are_off():
    backend = byte_level().backend
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert len(Tokenizer(backend).encode("the quick brown fox")) not in (4, 64)


TEMPLATES = {
    "own": TEMPLATE,
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = "
    "'<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set loop_messages = messages %}"
    "{% set system = '' %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = strftime_now('%d %b %Y') "
    "%}\n{%- endif %}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n{{- date_string }}"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}",
    "tojson and loop controls": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m | tojson }}{{ m | tojson(indent=2) }}\n{% endfor %}{{ tools | tojson if tools else 'no tools' }}",
}
CHATS = [
    [{"role": "user", "content": " <b>'hi'</b> & bye 日本 "}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_templates_render_as_in_transformers(name, chat, prompt):
    ours = byte_level()
    ours.chat_templates = {"default": TEMPLATES[name]}
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=ours.backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATES[name]
    )
    expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert ours.apply_chat_template(chat, add_generation_prompt=prompt) == expected
    assert expected


def test_a_chat_template_that_refuses_or_does_not_exist_is_one_line():
    tokenizer = byte_level()
    tokenizer.chat_templates = {"default": TEMPLATES["llama 2"], "tool_use": "{{ tools }}"}
    with pytest.raises(ValueError, match=r"^the chat template refused the messages: roles must alternate$"):
        tokenizer.apply_chat_template([{"role": "assistant", "content": "hi"}])
    with pytest.raises(
        ValueError, match=r"'rag' does not exist: this tokenizer has only the chat templates \['default'"
    ):
        tokenizer.apply_chat_template(CHATS[0], chat_template="rag")
    with pytest.raises(ValueError, match="messages is a str, expected a list of role/content objects"):
        tokenizer.apply_chat_template("hi")
    with pytest.raises(ValueError, match="messages holds a str, expected role/content objects"):
        tokenizer.apply_chat_template(["hi"])
    assert tokenizer.apply_chat_template(CHATS[0], chat_template="tool_use", tools=[1]) == "[1]"
    tokenizer.chat_templates = {}
    with pytest.raises(ValueError, match="chat template 'default' does not exist: this tokenizer has none"):
        tokenizer.apply_chat_template(CHATS[0])


def test_a_chat_template_cannot_leave_the_sandbox():
    tokenizer = byte_level()
    tokenizer.chat_templates = {"default": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}
    with pytest.raises(ValueError, match="the chat template refused the messages"):
        tokenizer.apply_chat_template(CHATS[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_is_the_same_to_us_and_to_transformers(kind, tmp_path):
    tokenizer = KINDS[kind]()
    tokenizer.save(tmp_path)
    again, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    chat = CHATS[1]
    assert theirs.apply_chat_template(chat, tokenize=False) == again.apply_chat_template(chat, False)
    assert (again.bos_token_id, again.eos_token_ids) == (tokenizer.bos_token_id, tokenizer.eos_token_ids)
    assert not list(tmp_path.glob(".*"))


def test_several_chat_templates_survive_saving(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_templates = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).chat_templates == tokenizer.chat_templates
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_templates


def test_chat_templates_are_found_in_every_place(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_templates = {}
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"chat_template": [{"name": "default", "template": "old"}]}))
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "old"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "json"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_folder(tmp_path).chat_templates == {"default": "jinja"}


def test_stop_ids_are_the_union_of_what_the_files_say(tmp_path):
    byte_level().save(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == (9, 8, 7, 1)


def test_added_tokens_that_only_the_config_names_get_their_ids(tmp_path):
    tokenizer = byte_level()
    size = tokenizer.vocab_size
    tokenizer.config["added_tokens_decoder"] = {str(size): {"content": "<|pad|>", "special": True}}
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode("<|pad|>", add_special_tokens=False) == [size]
    tokenizer.config["added_tokens_decoder"] = {str(size + 5): {"content": "<|pad|>", "special": True}}
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match=rf"gives '<\|pad\|>' the id {size + 5}, tokenizer.json {size}"):
        Tokenizer.from_folder(tmp_path)


def test_missing_and_broken_files_are_named_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing, and the tokenizer is read from it$"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json alone is not supported: save it once from transformers"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a whole SentencePiece model$"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer: EOF") as error:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="token id -1 is negative"):
        byte_level().decode([3, -1])


def test_ids_and_texts_are_taken_in_every_form_or_refused_by_name():
    tokenizer = byte_level()
    for ids in ([260, 321], torch.tensor([260, 321]), np.array([260, 321], np.uint16), (260, torch.tensor(321))):
        assert tokenizer.decode(ids) == "the quick"
        assert tokenizer.tokens(ids) == ["the", " quick"]
    assert tokenizer.decode(260) == tokenizer.decode(torch.tensor(260)) == "the"
    for ids in ([[260]], [0.5], "the", None):
        with pytest.raises(ValueError, match=r"ids=.*: expected whole numbers, one or a list of them"):
            tokenizer.decode(ids)
    with pytest.raises(ValueError, match="text is a list: expected one text, a str"):
        tokenizer.encode(["the"])
    with pytest.raises(ValueError, match=r"text holds half a character, '\\ud83c', at 1: it is no Unicode text"):
        tokenizer.encode("a\ud83c")


def test_the_default_model_has_the_tokenizer_that_transformers_sees(smollm2, smollm2_folder):
    _, ours = smollm2
    theirs = AutoTokenizer.from_pretrained(smollm2_folder)
    for text in [*TEXTS, "In 1969, 3.14 times <|im_end|> don't\n\n  x = 2;", *CORPUS[:3]]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids)
        pieces, rest = streamed(ours, ids)
        assert "".join(pieces) + rest == ours.decode(ids)
    for chat in CHATS:
        assert theirs.apply_chat_template(chat, tokenize=False) == ours.apply_chat_template(chat, False)
    assert ours.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert ours.tokens(ours.encode("In 1969")) == ["In", " ", "1", "9", "6", "9"]
    assert (ours.vocab_size, ours.bos_token_id, ours.eos_token_ids) == (49152, 1, (2,))
