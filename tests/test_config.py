"""config.json of every Llama generation: the same numbers as transformers, or a refusal that names the key."""

import hashlib
import json
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from transformers import LlamaConfig as HFConfig

import fastweights as fw
from fastweights.config import LlamaConfig
from fastweights.rope import RopeScaling

BASE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "use_cache": True}
BASE |= {"initializer_range": 0.02, "rms_norm_eps": 1e-05, "tie_word_embeddings": False}

LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def shape(vocab, hidden, mlp, layers, heads, **rest):
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return BASE | dict(zip(keys, (vocab, hidden, mlp, layers, heads), strict=True)) | rest


SMALL = shape(320, 64, 96, 2, 4)

CONFIGS = {
    # the very first conversion: ids 0/1/-1, another name for the length
    "llama-1": shape(
        32000, 4096, 11008, 32, 32, bos_token_id=0, eos_token_id=1, pad_token_id=-1, max_sequence_length=2048,
        rms_norm_eps=1e-06, torch_dtype="float16", transformers_version="4.27.0.dev0",
    ),
    "llama-2-7b-chat": shape(
        32000, 4096, 11008, 32, 32, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096, pretraining_tp=1,
        num_key_value_heads=32, rope_scaling=None, torch_dtype="float16", _name_or_path="meta-llama/Llama-2-7b-chat-hf",
    ),
    "llama-2-70b": shape(
        32000, 8192, 28672, 80, 64, bos_token_id=1, eos_token_id=2, max_position_embeddings=4096, pretraining_tp=8,
        num_key_value_heads=8, rope_scaling=None, torch_dtype="float16",
    ),
    "longchat": shape(
        32000, 4096, 11008, 32, 32, bos_token_id=1, eos_token_id=2, max_position_embeddings=16384,
        rope_scaling={"type": "linear", "factor": 8.0}, temperature=0.9, top_p=0.6, max_length=4096,
    ),
    "llama-3-8b": shape(
        128256, 4096, 14336, 32, 32, attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=128001, max_position_embeddings=8192, num_key_value_heads=8, pretraining_tp=1, rope_scaling=None,
        rope_theta=500000.0, torch_dtype="bfloat16", transformers_version="4.40.0.dev0",
    ),
    "llama-3.1-8b-instruct": shape(
        128256, 4096, 14336, 32, 32, attention_bias=False, mlp_bias=False, bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009], max_position_embeddings=131072, num_key_value_heads=8,
        rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, torch_dtype="bfloat16",
    ),
    "llama-3.2-1b": shape(
        128256, 2048, 8192, 16, 32, head_dim=64, bos_token_id=128000, eos_token_id=128001,
        max_position_embeddings=131072, num_key_value_heads=8, rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
        rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16",
    ),
    "tinyllama": shape(
        32000, 2048, 5632, 22, 32, attention_bias=False, bos_token_id=1, eos_token_id=2, max_position_embeddings=2048,
        num_key_value_heads=4, rope_scaling=None, rope_theta=10000.0, torch_dtype="bfloat16",
    ),
    "smollm2-135m-instruct": shape(
        49152, 576, 1536, 30, 9, attention_bias=False, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=0.041666666666666664, is_llama_config=True, max_position_embeddings=8192,
        num_key_value_heads=3, rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
        torch_dtype="bfloat16", transformers_version="4.42.3",
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "odd head_dim, multi-query": shape(
        1000, 96, 128, 2, 6, head_dim=32, num_key_value_heads=1, attention_bias=True, mlp_bias=True, eos_token_id=None,
    ),
    "transformers 5, llama3": shape(
        128256, 2048, 8192, 16, 32, head_dim=64, bos_token_id=128000, eos_token_id=128001, dtype="bfloat16",
        max_position_embeddings=131072, num_key_value_heads=8, pad_token_id=None,
        rope_parameters=LLAMA3_ROPE | {"rope_theta": 500000.0},
    ),
    "transformers 5, linear": SMALL | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4}},
    "transformers 5, default": SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}  # fmt: skip

SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
)
SAME += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "attention_bias", "mlp_bias")
SAME += ("tie_word_embeddings", "bos_token_id", "pad_token_id")


@pytest.mark.parametrize("name", CONFIGS)
def test_config_reads_the_same_values_as_transformers(name):
    ours, theirs = LlamaConfig.from_dict(CONFIGS[name]), HFConfig(**json.loads(json.dumps(CONFIGS[name])))
    for key in SAME:
        expected = getattr(theirs, key)
        assert getattr(ours, key) == (None if expected == -1 else expected), key
    rope = theirs.rope_parameters
    assert ours.rope_theta == rope["rope_theta"]
    scaling = ours.rope_scaling
    assert (scaling.rope_type if scaling else "default") == rope["rope_type"]
    for key, value in (scaling.to_dict() if scaling else {}).items():
        assert rope[key] == value
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert ours.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))


@pytest.mark.parametrize("name", CONFIGS)
def test_written_config_is_the_same_to_us_and_to_transformers(name):
    ours = LlamaConfig.from_dict(CONFIGS[name])
    written = json.loads(json.dumps(ours.to_dict()))
    assert LlamaConfig.from_dict(written) == ours
    source = json.loads(json.dumps(CONFIGS[name]))
    theirs, again = HFConfig(**source).to_dict(), HFConfig(**written).to_dict()
    rope, rope_again = theirs.pop("rope_parameters"), again.pop("rope_parameters")
    rope.pop("type", None)
    assert rope_again == rope
    for key in (*SAME, "eos_token_id", "dtype", "hidden_act", "model_type"):
        assert again[key] == (None if theirs[key] == -1 else theirs[key]), key


def test_what_is_written_of_a_llama_stays_as_it_is():
    """Saved episodes name their model by a hash of it: a key more, and none of them loads."""
    assert LlamaConfig.from_dict(CONFIGS["llama-3.2-1b"]).to_dict() == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256,
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": True, "bos_token_id": 128000, "eos_token_id": 128001,
        "pad_token_id": None, "torch_dtype": "bfloat16",
    }  # fmt: skip
    written = [LlamaConfig.from_dict(CONFIGS[name]).to_dict() for name in sorted(CONFIGS)]
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
    assert digest == "740f79784fc89af0b9c7cd229f08a8b531c7b419e69c97cb1b5e15c24be8e5be"


def test_a_config_that_transformers_writes_is_accepted(tmp_path):
    HFConfig(**SMALL).save_pretrained(tmp_path)
    assert LlamaConfig.from_file(tmp_path / "config.json") == LlamaConfig.from_dict(SMALL)


def test_every_key_transformers_can_write_is_known():
    everything = HFConfig(**SMALL).to_dict() | GenerationConfig._get_default_generation_params()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LlamaConfig.from_dict(everything, strict=True) == LlamaConfig.from_dict(SMALL)


UNREAD = [  # keys that transformers' Llama does not read, and their names in the warning
    ({"_model_name_or_path": "a.gguf", "unk_token_id": 0}, "_model_name_or_path, unk_token_id"),  # of a .gguf saved
    ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
    ({"logit_scale": 2.0, "num_local_experts": 8}, "logit_scale, num_local_experts"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 3.0}}, "rope_scaling.mscale"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 3.0}}, "rope_parameters.factor"),
    ({"attention_multiplier": 3.0, "hidden_activation": "gelu"}, "attention_multiplier, hidden_activation"),
]
HARMLESS = [
    {"pretraining_tp": 4, "is_decoder": True, "chunk_size_feed_forward": 2, "pruned_heads": {"0": [1]}},
    {"sep_token_id": 3, "temperature": 0.2, "num_beams": 4, "attention_dropout": 0.5, "use_cache": False},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    {"layer_types": ["full_attention", "attention"], "head_dim": None, "rope_scaling": {}},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small random Llama, as transformers saves it."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(HFConfig(**SMALL))
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("extra", "named"), [*UNREAD, *((keys, None) for keys in HARMLESS)])
def test_keys_that_transformers_does_not_read_leave_its_logits_and_are_named_once(saved, extra, named):
    path = saved / "config.json"
    path.write_text(json.dumps(SMALL | extra))
    (saved / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = fw.load(saved)
    texts = [str(w.message) for w in caught]
    says = f"{path}: ignoring {named}, which transformers' Llama does not read (strict=True refuses)"
    assert texts == ([] if named is None else [says])
    assert all(w.filename == __file__ for w in caught)  # it points here, not into the library
    ids = torch.arange(40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(saved).eval()
        assert (model(ids) - theirs(ids).logits).abs().max() <= 1e-4
    if named:
        with pytest.raises(ValueError, match=f"asks for {named}, which fastweights does not implement"):
            fw.load(saved, strict=True)
    else:
        fw.load(saved, strict=True)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (2,)),
        ({"eos_token_id": [5, 7]}, (5, 7)),
        ({"eos_token_id": 9, "temperature": 0.6}, (9,)),
        ({"eos_token_id": None}, ()),
        ({"temperature": 0.6}, (2,)),  # names no stop: config.json's stay
    ],
)
def test_generation_config_names_the_stop_ids(saved, generation, expected):
    (saved / "config.json").write_text(json.dumps(SMALL | {"eos_token_id": 2}))
    path = saved / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation is not None:
        path.write_text(json.dumps(generation))
    assert LlamaConfig.from_folder(saved).eos_token_ids == expected
    if generation is None or "eos_token_id" in generation:
        eos = AutoModelForCausalLM.from_pretrained(saved).generation_config.eos_token_id
        assert expected == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))


def test_a_generation_config_that_is_not_one_is_named(saved):
    path = saved / "generation_config.json"
    for text, message in (("{", "is not valid JSON"), ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"generation_config\.json.* " + message):
            LlamaConfig.from_folder(saved)
    path.unlink()


def test_llama_1_and_2_default_to_the_values_they_were_trained_with():
    config = LlamaConfig.from_dict(CONFIGS["llama-1"])
    assert (config.rope_theta, config.num_key_value_heads, config.head_dim) == (10000.0, 32, 128)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (0, (1,), None)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}

REFUSED = [
    ({"model_type": "mixtral"}, 'model_type is "mixtral", and fastweights implements only "llama" or "qwen2"'),
    ({"hidden_act": "relu"}, 'hidden_act is "relu", and fastweights implements only "silu" or "swish"'),
    ({"sliding_window": 64}, "sliding_window is 64, and a llama has no sliding windows"),
    ({"use_sliding_window": True}, "use_sliding_window is true, and a llama has no sliding windows"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"attention_chunk_size": 64}, "attention_chunk_size is 64, and fastweights implements only null"),
    ({"is_causal": False}, "is_causal is false, and fastweights implements only null or true"),
    ({"per_layer_config": {"0": {"rms_norm_eps": 1.0}}}, "per_layer_config is"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ between kinds of layers"),
    ({"rope_scaling": YARN}, "rope_type 'yarn' is not implemented, expected 'default', 'linear' or 'llama3'"),
    ({"rope_parameters": YARN}, "rope_type 'yarn' is not implemented"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not implemented"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [2]}}, "rope_type 'longrope'"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs factor, which is missing"),
    ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope factor is -2, expected a positive number"),
    ({"rope_scaling": "linear"}, 'rope_scaling is "linear", expected an object or null'),
    (
        {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
        "low_freq_factor 4.0 must be below high_freq_factor 4.0",
    ),
    (
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}},
        "rope_theta is 1000000.0, but rope_parameters says",
    ),
    ({"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
    ({"hidden_size": 0}, "hidden_size is 0, expected a positive whole number"),
    ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0, expected a positive whole number"),
    ({"num_attention_heads": "4"}, "num_attention_heads is '4', expected a positive whole number"),
    (
        {"hidden_size": 65},
        "hidden_size 65 is not a multiple of num_attention_heads 4, and head_dim is missing",
    ),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"head_dim": 15}, "head_dim is 15, expected an even number"),
    ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05, expected a positive number"),
    ({"attention_bias": "no"}, "attention_bias is 'no', expected true or false"),
    ({"torch_dtype": "int8"}, "dtype is 'int8', expected one of float64, float32, float16, bfloat16"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token id or null"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_dict(SMALL | change, "folder/config.json")
    assert message in str(error.value)
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps"])
def test_a_value_without_a_safe_default_is_required(key):
    with pytest.raises(ValueError, match=f"{key} is missing, and there is no safe default for it"):
        LlamaConfig.from_dict({k: v for k, v in SMALL.items() if k != key})


def test_a_file_that_is_no_config_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist, expected a Llama's config.json"):
        LlamaConfig.from_file(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        LlamaConfig.from_file(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list, expected an object of settings"):
        LlamaConfig.from_file(path)


def test_a_config_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="rope_type 'yarn' is not implemented"):
        RopeScaling("yarn", 2.0)
    llama = LlamaConfig.from_dict(SMALL)
    with pytest.raises(ValueError, match="use_parallel_residual is True, which the config"):
        replace(llama, use_parallel_residual=True).to_dict()
    with pytest.raises(ValueError, match="hidden_act is 'relu', expected one of silu, gelu, gelu_tanh"):
        replace(llama, hidden_act="relu")
    with pytest.raises(ValueError, match="final_logit_softcapping is 0, expected a positive number"):
        replace(llama, model_type="gemma2", final_logit_softcapping=0)
