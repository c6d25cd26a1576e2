"""A .gguf is the same model and tokenizer as the checkpoint it was made from."""

import itertools
import json
import math
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.tokenization_utils_base import generate_merges

import fastweights as fw
from fastweights.gguf import GgufFile
from fastweights.gguf_config import llama3_stretch
from fastweights.rope import RopeScaling

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "vocab_size": 320}
SPECIAL = ["<unk>", "<s>", "</s>"]
CORPUS = ["the quick brown fox jumps over the lazy dog 1234", "naïve café\n\n it's  two"] * 10

LLAMA_CPP = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def hf_model(**changes):
    torch.manual_seed(0)
    model = LlamaForCausalLM(HFConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    return model


def llama_cpp_rows(weight, heads):
    """Rows as llama.cpp's converter orders them, written out one by one: pair (i, i + E/2) becomes (2i, 2i + 1)."""
    rows = np.empty_like(weight)
    width = len(weight) // heads
    for head in range(heads):
        for i in range(width // 2):
            rows[head * width + 2 * i] = weight[head * width + i]
            rows[head * width + 2 * i + 1] = weight[head * width + i + width // 2]
    return rows


def byte_level_vocabulary():
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    state = json.loads(backend.to_str())["model"]
    tokens = [t for t, _ in sorted(state["vocab"].items(), key=lambda item: item[1])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["merges"]]
    return tokens + [f"<pad{n}>" for n in range(320 - len(tokens))], merges


def write(path, model, quantization="F32", vocabulary="gpt2", drop=(), tensors=None, rename=None, **meta):
    """A .gguf as llama.cpp's converter would write it for `model`; `rename` gives normal tokens another text."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    architecture = meta.pop("architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture)
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.dimension_count": head_dim,
    }
    if head_dim * config.num_attention_heads != config.hidden_size:
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    for key, value in keys.items():
        if key not in drop:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
    for key, value in meta.items():
        add = {
            str: writer.add_string,
            float: writer.add_float32,
            int: writer.add_uint32,
            bool: writer.add_bool,
        }
        add[type(value)](key.replace("__", "."), value)
    if vocabulary == "gpt2":
        tokens, merges = byte_level_vocabulary()
        kinds = [3 if t in SPECIAL or t.startswith("<pad") else 1 for t in tokens]
        gone = {tokens[n] for n in rename or ()}
        merges = [m for m in merges if not gone & {m.replace(" ", ""), *m.split(" ")}]
        tokens = [(rename or {}).get(n, t) for n, t in enumerate(tokens)]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(merges)
    elif vocabulary:
        tokens, scores = vocabulary
        kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
    if vocabulary:
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    for name, tensor in (tensors if tensors is not None else model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if "q_proj" in name and architecture == "llama":
            values = llama_cpp_rows(values, config.num_attention_heads)
        if "k_proj" in name and architecture == "llama":
            values = llama_cpp_rows(values, config.num_key_value_heads)
        for theirs, ours in {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }.items():
            name = name.replace(theirs, ours)
        for theirs, ours in LLAMA_CPP.items():
            name = name.replace(theirs, ours)
        name = name.replace("model.layers.", "blk.")
        kind = gguf.GGMLQuantizationType[quantization if values.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GPT2 = {"tokenizer__ggml__pre": "gpt-2"}
IDS = torch.arange(24).reshape(2, 12) * 7 % 320


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 1},
    ],
    ids=["untied", "tied", "biased", "multi-query"],
)
def test_float32_gguf_is_the_same_model(tmp_path, changes):
    theirs = hf_model(**changes)
    model, _ = fw.load(write(tmp_path / "m.gguf", theirs, **GPT2))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= 1e-5
    assert model.config.rms_norm_eps == 1e-5  # stored as the float32 9.99999975e-06
    assert (model.config.bos_token_id, model.config.eos_token_ids) == (1, (2,))


def test_a_qwen2_gguf_is_the_same_model(tmp_path):
    torch.manual_seed(0)
    theirs = Qwen2ForCausalLM(Qwen2Config(**SHAPE, rope_theta=1e6)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
        meta = {"architecture": "qwen2", "tokenizer__ggml__pre": "qwen2", "tokenizer__ggml__add_bos_token": False}
        model, tokenizer = fw.load(write(tmp_path / "m.gguf", theirs, **meta))
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= 1e-5
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (model.config.model_type, model.config.attention_bias, model.config.output_bias) == ("qwen2", True, False)
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("a 1234", add_special_tokens=False)]
    assert pieces[-4:] == ["1", "2", "3", "4"]
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")  # NFC


@pytest.mark.parametrize(("quantization", "tolerance"), [("F16", 1e-3), ("BF16", 5e-3), ("Q8_0", 5e-3)])
def test_quantised_gguf_is_the_dequantised_values(tmp_path, quantization, tolerance):
    theirs = hf_model()
    model, _ = fw.load(write(tmp_path / "m.gguf", theirs, quantization, **GPT2))
    kind = gguf.GGMLQuantizationType[quantization]
    for name, tensor in theirs.state_dict().items():
        got = model.state_dict()[name]
        assert got.dtype == torch.float32
        assert (got - tensor).abs().max() <= tolerance * tensor.abs().max(), name
        if "v_proj.weight" in name:
            expected = gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind)
            assert np.array_equal(got.numpy(), expected)


def test_dtype_is_honoured(tmp_path):
    model, _ = fw.load(write(tmp_path / "m.gguf", hf_model(), **GPT2), dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_linear_scaling_is_read(tmp_path):
    path = write(tmp_path / "m.gguf", hf_model(), llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    assert GgufFile(path).config.rope_scaling == RopeScaling("linear", 4.0)
    path = write(tmp_path / "old.gguf", hf_model(), llama__rope__scale_linear=2.0)
    assert GgufFile(path).config.rope_scaling == RopeScaling("linear", 2.0)


def stretch_as_llama_cpp(factor, theta, width, low=1.0, high=4.0, length=8192):
    """rope_freqs.weight, frequency by frequency, as llama.cpp's converter computes it."""
    stretch = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * theta ** (i / width)
        if wavelength < length / high:
            stretch.append(1.0)
        elif wavelength > length / low:
            stretch.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            stretch.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(stretch)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_from_rope_freqs(tmp_path, factor):
    theirs = hf_model(head_dim=64, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    stretch = stretch_as_llama_cpp(factor, 500000.0, 64)
    path = write(tmp_path / "m.gguf", theirs, tensors=theirs.state_dict() | {"rope_freqs.weight": stretch}, **GPT2)
    file = GgufFile(path)
    assert file.config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    assert np.abs(llama3_stretch(file.config.rope_scaling, 500000.0, 64) - stretch.numpy()).max() <= 1e-5 * factor
    model, _ = fw.load(path)
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    scaled = hf_model(head_dim=64, rope_parameters=rope)
    with torch.no_grad():
        assert (model(IDS) - scaled(IDS).logits).abs().max() <= 1e-5
    strange = stretch.clone()
    strange[-3] *= 1.01
    bad = write(tmp_path / "bad.gguf", theirs, tensors=theirs.state_dict() | {"rope_freqs.weight": strange}, **GPT2)
    with pytest.raises(ValueError, match=r"bad\.gguf: rope_freqs.weight is not Llama 3's scaling"):
        GgufFile(bad)


def sentencepiece_vocabulary():
    """Pieces and scores like SentencePiece's: the earlier a piece was learnt, the higher its score."""
    backend = Backend(models.BPE())
    specials = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))]
    text = ["▁" + line.replace(" ", "▁") for line in CORPUS]
    backend.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False, max_token_length=9),
    )
    tokens = [t for t, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    return tokens, [0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)]


def score_oracle(text, tokens, scores):
    """SentencePiece's algorithm: again and again join the neighbours whose piece scores highest, leftmost first."""
    rank = dict(zip(tokens[259:], scores[259:], strict=True))
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(rank[a + b], -n) for n, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in rank]
        if not pairs:
            break
        n = -max(pairs)[1]
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    ids = []
    for part in parts:
        ids += [tokens.index(part)] if part in rank else [3 + b for b in part.encode()]
    return [1, *ids]


def test_sentencepiece_vocabulary_tokenizes_by_score_with_byte_fallback(tmp_path):
    tokens, scores = sentencepiece_vocabulary()
    theirs = hf_model(vocab_size=len(tokens))
    template = {"tokenizer__chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"}
    _, tokenizer = fw.load(write(tmp_path / "m.gguf", theirs, vocabulary=(tokens, scores), **template))
    for text in ["the quick dog", " two  spaces", "café 日本 🎉", "fox\nfox", "unquickly"]:
        ids = tokenizer.encode(text)
        assert ids == score_oracle(text, tokens, scores), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode("</s>dog")[:2] == [1, 2]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    # the same merges as transformers derives from a SentencePiece model
    ours = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    pieces = dict(zip(tokens, range(len(tokens)), strict=True))
    expected = generate_merges(pieces, dict(zip(tokens, scores, strict=True)), skip_tokens=set(tokens[:259]))
    assert [tuple(m) for m in ours] == expected


@pytest.mark.parametrize(("add_bos", "first"), [(True, 1), (False, None), (None, None), ("llama-bpe", 1)])
def test_add_bos_token_is_honoured(tmp_path, add_bos, first):
    extra = {} if not isinstance(add_bos, bool) else {"tokenizer__ggml__add_bos_token": add_bos}
    if isinstance(add_bos, str):
        extra = {"tokenizer__ggml__pre": add_bos}  # llama.cpp: Llama 3 takes BOS even where the file is silent
    _, tokenizer = fw.load(write(tmp_path / "m.gguf", hf_model(), **GPT2 | extra))
    ids = tokenizer.encode("the dog")
    assert (ids[0] == 1) == (first == 1)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the dog"


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's 1234 dogs\n\n now", ["it", "'s", " 1234", " dogs", "\n\n", " now"]),
        ("smollm", "it's 1234 dogs\n\n now", ["it", "'s", " ", "1", "2", "3", "4", " dogs", "\n\n", " now"]),
        (
            "llama-bpe",
            "IT'S 12345 (dogs\n\n now",
            ["IT", "'S", " ", "123", "45", " (", "dogs", "\n\n", " now"],
        ),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
    ],
)
def test_each_pre_tokenizer_splits_as_the_model_was_trained(tmp_path, pre, text, pieces):
    path = write(tmp_path / "m.gguf", hf_model(), tokenizer__ggml__pre=pre)
    backend = GgufFile(path).tokenizer().backend
    assert [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


REFUSED = [
    (
        {"architecture": "mamba"},
        "has the architecture 'mamba', and fastweights implements only gemma2, gemma3, gpt2, gptneox, llama, olmo2, "
        "phi3, qwen2 and qwen3",
    ),
    ({"drop": ("block_count",)}, "the key llama.block_count is missing"),
    ({"llama__expert_count": 8}, "llama.expert_count is 8"),
    ({"llama__attention__key_length": 32}, "llama.rope.dimension_count is 16, expected the head width 32"),
    ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
    (
        {"tokenizer__ggml__pre": "gpt-4o"},
        "tokenizer.ggml.pre is 'gpt-4o', and fastweights implements only command-r,",
    ),
    ({"vocabulary": None, "tokenizer__ggml__model": "bert"}, "the key tokenizer.ggml.tokens is missing"),
    (
        {"tokenizer__ggml__eot_token_id": 999, **GPT2},
        "tokenizer.ggml.eot_token_id is 999, expected an id below",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_is_not_a_plain_llama_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError) as error:
        fw.load(write(tmp_path / "m.gguf", hf_model(), **changes))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path}/m.gguf")
    assert "\n" not in str(error.value)


def test_pre_tokenizers_with_several_names_split_alike(tmp_path):
    text = "IT'S 12345 (dogs\n\n now"
    for names, first in (
        (("gpt-2", "phi-2", "mpt", "olmo", "exaone4", "jais"), None),
        (("smollm", "codeshell", "exaone", "minerva-7b"), None),
        (("llama-bpe", "falcon-h1", "pixtral", "lfm2"), 1),
        (("smaug-bpe", "dbrx"), None),  # split as Llama 3; BOS only where the file says so
    ):
        found = []
        for name in names:
            path = write(tmp_path / f"{name}.gguf", hf_model(), tokenizer__ggml__pre=name)
            backend = GgufFile(path).tokenizer().backend
            found.append((backend.pre_tokenizer.pre_tokenize_str(text), backend.encode(text).ids))
        assert all(other == found[0] for other in found)
        assert (found[0][1][0] == 1) == (first == 1)
    assert found[0][0] == GgufFile(tmp_path / "lfm2.gguf").tokenizer().backend.pre_tokenizer.pre_tokenize_str(text)


def test_a_file_from_before_pre_tokenizers_had_names_takes_llama_cpps_default_and_says_so(tmp_path):
    path = write(tmp_path / "m.gguf", hf_model())
    with pytest.warns(UserWarning, match=r"m\.gguf has no tokenizer\.ggml\.pre: text is split by llama\.cpp's default"):
        _, tokenizer = fw.load(path)
    text = "a+b 1234"
    pieces = [text[a:b] for _, (a, b) in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == ["a", "+", "b", " ", "123", "4"]


def test_ends_of_turn_are_known_by_their_text_whatever_the_metadata_says(tmp_path):
    rename = {300: "<|im_end|>", 301: "<|eot_id|>", 302: "<|endoftext|>", 303: "<fim_pad>"}
    path = write(tmp_path / "m.gguf", hf_model(), rename=rename, **GPT2)
    model, tokenizer = fw.load(path)
    assert model.config.eos_token_ids == tokenizer.eos_token_ids == (2, 300, 301, 302, 303)
    assert tokenizer.encode("a<|im_end|>")[-1] == 300  # one token, and a special one, though stored as normal text
    assert tokenizer.decode([300], skip_special_tokens=True) == ""
    named = {"tokenizer__ggml__eot_token_id": 305, "tokenizer__ggml__eom_token_id": 306}
    model, tokenizer = fw.load(write(tmp_path / "x.gguf", hf_model(), rename=rename, **GPT2, **named))
    assert model.config.eos_token_ids == (2, 305, 306, 300, 301, 302, 303)
    fw.save(model, tmp_path / "saved", tokenizer)
    assert fw.load(tmp_path / "saved")[0].config.eos_token_ids == model.config.eos_token_ids
    harmony = {300: "<|end|>", 301: "<|return|>", 302: "<|call|>"}  # there <|end|> ends a part of a turn alone
    model, _ = fw.load(write(tmp_path / "h.gguf", hf_model(), rename=harmony, **GPT2))
    assert model.config.eos_token_ids == (2, 301, 302)


def test_an_id_outside_the_vocabulary_that_nothing_needs_is_passed_over(tmp_path):
    path = write(tmp_path / "m.gguf", hf_model(), tokenizer__ggml__padding_token_id=4294967295, **GPT2)
    with pytest.warns(UserWarning, match=r"padding_token_id is 4294967295, which the vocabulary of 320") as caught:
        model, tokenizer = fw.load(path)
    assert len(caught) == 1
    assert model.config.pad_token_id is None
    assert "pad_token" not in tokenizer.config


def test_several_chat_templates_are_found_by_their_names(tmp_path):
    templates = {"tokenizer__chat_template": "plain", "tokenizer__chat_template.tool_use": "with tools"}
    _, tokenizer = fw.load(write(tmp_path / "m.gguf", hf_model(), **GPT2, **templates))
    assert tokenizer.chat_templates == {"default": "plain", "tool_use": "with tools"}
    assert tokenizer.apply_chat_template([]) == "plain"
    assert tokenizer.apply_chat_template([], chat_template="tool_use") == "with tools"


def test_a_file_without_a_vocabulary_gives_the_model_and_none(tmp_path):
    theirs = hf_model()
    path = write(tmp_path / "m.gguf", theirs, vocabulary=None, tokenizer__ggml__model="none")
    with pytest.warns(UserWarning, match=r"m\.gguf has no vocabulary: the tokenizer is None"):
        model, tokenizer = fw.load(path)
    assert tokenizer is None
    with torch.no_grad():
        assert (model(IDS) - theirs(IDS).logits).abs().max() <= 1e-5


def split(folder, theirs, parts=3, name="m-{:05}-of-{:05}.gguf"):
    """The model in parts as gguf-split writes them: the metadata in the first."""
    tensors = list(theirs.state_dict().items())
    share = -(-len(tensors) // parts)
    paths = []
    for n in range(parts):
        path = folder / name.format(n + 1, parts)
        meta = {"split__no": n, "split__count": parts, "split__tensors__count": len(tensors)} | (GPT2 if n == 0 else {})
        some = dict(tensors[n * share : (n + 1) * share])
        paths.append(write(path, theirs, tensors=some, vocabulary="gpt2" if n == 0 else None, **meta))
    return paths


def test_a_split_model_is_loaded_whichever_part_is_named(tmp_path):
    theirs = hf_model()
    paths = split(tmp_path, theirs)
    for path in paths:
        model, tokenizer = fw.load(path)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert tokenizer.vocab_size == 320


def test_a_split_model_that_is_not_whole_is_refused_by_what_is_missing(tmp_path):
    paths = split(tmp_path, hf_model())
    whole = [path.read_bytes() for path in paths]

    def refused(path, message):
        with pytest.raises((ValueError, OSError), match=message) as error:
            fw.load(path)
        assert "\n" not in str(error.value)

    paths[2].unlink()
    refused(paths[0], r"a part of a model split into 3 files, and m-00003-of-00003\.gguf is missing beside it")
    paths[0].unlink()
    refused(paths[1], r"m-00001-of-00003\.gguf, m-00003-of-00003\.gguf are missing")
    for path, content in zip(paths, [whole[0], whole[2], whole[1]], strict=True):
        path.write_bytes(content)
    refused(paths[0], r"m-00002-of-00003\.gguf: split\.no is 2, expected 1")
    lone = tmp_path / "renamed.gguf"
    lone.write_bytes(whole[0])
    refused(lone, r"renamed\.gguf is a part of a model split into 3 files, expected a name like m-00001-of-00003\.gguf")
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    split(tmp_path, hf_model(tie_word_embeddings=True))[2].rename(tmp_path / "other.gguf")
    paths[2].write_bytes(whole[1])
    refused(paths[0], r"split\.no is 1, expected 2")


def test_merges_that_do_not_belong_to_the_vocabulary_are_refused_in_one_line(tmp_path, monkeypatch):
    tokens, merges = byte_level_vocabulary()
    monkeypatch.setitem(globals(), "byte_level_vocabulary", lambda: (tokens, [*merges, "qz qz"]))
    with pytest.raises(ValueError, match=r"m\.gguf holds no usable tokenizer: .*out of vocabulary"):
        fw.load(write(tmp_path / "m.gguf", hf_model(), **GPT2))


def test_missing_and_foreign_tensors_are_named(tmp_path):
    theirs = hf_model()
    tensors = theirs.state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"m.gguf: the tensor model.layers.1.mlp.up_proj.weight is missing"):
        fw.load(write(tmp_path / "m.gguf", theirs, tensors=tensors, **GPT2))
    tensors = theirs.state_dict() | {"blk.0.ffn_gate_exps.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"the tensor blk.0.ffn_gate_exps.weight is not part of a Llama"):
        fw.load(write(tmp_path / "x.gguf", theirs, tensors=tensors, **GPT2))


def test_files_that_are_no_gguf_are_named_in_one_line(tmp_path):
    path = write(tmp_path / "m.gguf", hf_model(), **GPT2)
    whole = path.read_bytes()
    for size in (0, 100, 5000, len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m.gguf is not a readable GGUF file: .") as error:
            fw.load(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"none\.gguf does not exist"):
        fw.load(tmp_path / "none.gguf")


def test_without_the_gguf_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'needs the gguf package: pip install "fastweights\[demo\]"$'):
        fw.load(tmp_path / "m.gguf")
