"""config.json of every family and in every spelling: the numbers of the model that transformers makes of it."""

import json
import math
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.activations import ACT2FN

from fastweights.config import LlamaConfig
from fastweights.config_json import ACTIVATIONS
from fastweights.families import FAMILIES

CLASSES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "mistral": transformers.MistralConfig,
    "gpt2": transformers.GPT2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gemma2": transformers.Gemma2Config,
    "qwen3": transformers.Qwen3Config,
    "olmo2": transformers.Olmo2Config,
    "gpt_neox": transformers.GPTNeoXConfig,
    "phi3": transformers.Phi3Config,
}

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 56, "num_hidden_layers": 7}
SIZES |= {"num_attention_heads": 4}
LEAST = {name: SIZES | {"rms_norm_eps": 1e-6, "model_type": name} for name in CLASSES}
LEAST["gpt2"] = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 64, "n_layer": 7, "n_head": 4}
for name in ("qwen2", "mistral", "qwen3"):  # their own defaults are more heads than these have
    LEAST[name] |= {"num_key_value_heads": 2}
for name in ("gemma3_text", "gemma2", "qwen3", "olmo2", "gpt_neox", "phi3"):
    del LEAST[name]["rms_norm_eps"]

FULL, SLIDING = "full_attention", "sliding_attention"
ODD = [FULL, SLIDING, SLIDING, FULL, FULL, SLIDING, FULL]
LINEAR = {"rope_type": "linear", "factor": 8.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

PHI = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}

SPELLINGS = {
    "gpt2": [
        {"n_inner": 100, "n_positions": 32, "n_ctx": 32, "layer_norm_epsilon": 1e-3},
        {"n_inner": None, "activation_function": "gelu", "tie_word_embeddings": False},
        {"scale_attn_weights": False, "activation_function": "gelu_pytorch_tanh"},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "activation_function": "silu"},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_fast"},
        {"hidden_size": 64, "num_hidden_layers": 7, "num_attention_heads": 4, "max_position_embeddings": 40},
        {"bos_token_id": 3, "eos_token_id": [4, 5], "pad_token_id": 6, "dtype": "float16"},
        {"bos_token_id": None, "eos_token_id": None, "n_head": 16},
    ],
    "gemma3_text": [
        {"sliding_window": 8, "sliding_window_pattern": 2},
        {"sliding_window": 8, "_sliding_window_pattern": 3, "layer_types": ODD},
        {"sliding_window": 8, "layer_types": [FULL] * 7},
        {"sliding_window": 8, "layer_types": [SLIDING] * 7, "sliding_window_pattern": 9},
        {"sliding_window": 500, "max_position_embeddings": 200},
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {"rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": LINEAR},
        {"rope_scaling": LLAMA3},
        {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 3e5}, SLIDING: {"rope_theta": 2e3}}},
        {"rope_parameters": {FULL: LINEAR | {"rope_theta": 3e5}}},
        {"rope_parameters": {FULL: None, SLIDING: {"rope_type": "default"}}, "rope_theta": 4e5},
        {"rope_parameters": {FULL: {"type": "linear", "factor": 2.0}}, "rope_local_base_freq": 7e3},
        {"head_dim": 16, "num_key_value_heads": 1, "attention_bias": True, "query_pre_attn_scalar": 168},
        {"final_logit_softcapping": 20.0, "hidden_activation": "silu", "tie_word_embeddings": False},
        {"attn_logit_softcapping": None, "cache_implementation": "hybrid", "use_bidirectional_attention": False},
        {"eos_token_id": [1, 106], "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"},
    ],
    "gemma2": [
        {"sliding_window": 8, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
        {"sliding_window": 8, "layer_types": ODD, "cache_implementation": "hybrid"},
        {"sliding_window": 8, "layer_types": [FULL] * 7, "use_bidirectional_attention": None},
        {"sliding_window": 4096, "max_position_embeddings": 4096, "sliding_window_size": 4096},
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 144},
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "hidden_activation": "gelu", "head_dim": 12},
        {"rope_theta": 5e5, "rope_scaling": LINEAR, "attention_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}, "tie_word_embeddings": False},
    ],
    "qwen3": [
        {"head_dim": 12, "rope_theta": 1e6, "rope_scaling": None, "attention_bias": True},
        {"num_key_value_heads": None, "tie_word_embeddings": True, "bos_token_id": 151643, "eos_token_id": 151645},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ODD},
        {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "layer_types": [FULL] * 7},
        {"rope_parameters": LLAMA3 | {"rope_theta": 3e4}, "hidden_act": "gelu"},
    ],
    "olmo2": [
        {"num_key_value_heads": 2, "rope_theta": 5e5, "rms_norm_eps": 1e-6, "attention_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e4}, "pad_token_id": None},
        {"tie_word_embeddings": True, "bos_token_id": 5, "eos_token_id": 6, "max_position_embeddings": 4096},
    ],
    "gpt_neox": [
        {"num_attention_heads": 1, "rotary_pct": 0.5, "rotary_emb_base": 25000},
        {"num_attention_heads": 2, "rotary_emb_base": 10000, "rope_theta": 10000, "partial_rotary_factor": 0.25},
        {"rotary_pct": 1.0, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new"},
        {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 4.0}, "layer_norm_eps": 1e-4},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e3}, "rotary_pct": 0.5},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.4}, "hidden_act": "gelu_fast"},
        {"tie_word_embeddings": True, "eos_token_id": 0, "torch_dtype": "float16", "head_dim": 16, "rotary_pct": 0.5},
    ],
    "phi3": [
        {"sliding_window": 7, "original_max_position_embeddings": 4096, "rope_scaling": None},
        {"sliding_window": 4096, "num_key_value_heads": 2, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        {"partial_rotary_factor": 0.5, "rope_theta": 250000.0, "tie_word_embeddings": True},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 2e4, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 2e4}, "partial_rotary_factor": 0.5, "hidden_act": "gelu"},
        {"eos_token_id": [200020, 199999], "attention_bias": False, "head_dim": 16},
    ],
}  # fmt: skip
CASES = [(name, {}) for name in CLASSES] + [(name, keys) for name, many in SPELLINGS.items() for keys in many]


def ours_of(hf):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LlamaConfig.from_dict(json.loads(json.dumps(hf)), strict=True)


def frequencies(rope):
    """Turns per token of each pair of channels, in float64."""
    free = rope.theta ** (-torch.arange(0, rope.channels, 2, dtype=torch.float64) / rope.channels)
    scaling = rope.scaling
    if scaling is None:
        return free
    if scaling.rope_type == "linear":
        return free / scaling.factor
    turns = free * scaling.original_max_position_embeddings / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return free * (kept + (1 - kept) / scaling.factor)


def theirs_of(hf):
    """The model that transformers makes of a config.json, without its numbers."""
    return AutoModelForCausalLM.from_config(
        CLASSES[hf["model_type"]].from_dict(json.loads(json.dumps(hf))), attn_implementation="eager"
    )


def compare(config, model):
    """Holds our configuration against the modules of transformers' model and their shapes."""
    family, theirs = config.family, model.config
    names = {role: name for role, name in family.names.items()}
    inner = getattr(model, names["model"])
    layers = getattr(inner, names["layers"])
    assert len(layers) == config.num_hidden_layers
    heads, keys, channels = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    width, mlp_width = config.hidden_size, config.intermediate_size
    assert getattr(inner, names["embed_tokens"]).weight.shape == (config.vocab_size, width)
    if "embed_positions" in names:
        assert getattr(inner, names["embed_positions"]).weight.shape == (config.max_position_embeddings, width)
    assert theirs.max_position_embeddings == config.max_position_embeddings
    head = model.get_output_embeddings()
    assert (head.weight is model.get_input_embeddings().weight) == config.tie_word_embeddings
    norms = [module for name, module in model.named_modules() if "norm" in name or ".ln_" in name]
    assert {getattr(norm, "eps", getattr(norm, "variance_epsilon", None)) for norm in norms} == {config.rms_norm_eps}

    for layer, module in enumerate(layers):
        attention, mlp = getattr(module, names["self_attn"]), module.mlp
        sizes = {"q_proj": heads, "k_proj": keys, "v_proj": keys, "qkv_proj": heads + 2 * keys}
        shapes = {role: (count * channels, width) for role, count in sizes.items()}
        shapes["o_proj"] = (width, heads * channels)
        for role, shape in shapes.items():
            if role in names:
                linear = getattr(attention, names[role])
                assert tuple(linear.weight.shape) == (shape[::-1] if family.transposed else shape), role
                bias = config.output_bias if role == "o_proj" else config.attention_bias
                assert (linear.bias is not None) == bias, role
        sizes = {"gate_proj": mlp_width, "up_proj": mlp_width, "gate_up_proj": 2 * mlp_width}
        for role, rows in sizes.items():
            if role in names:
                linear = getattr(mlp, names[role])
                assert tuple(linear.weight.shape) == ((width, rows) if family.transposed else (rows, width)), role
                assert (linear.bias is not None) == config.mlp_bias
        act = next(getattr(mlp, name) for name in ("act_fn", "act", "activation_fn") if hasattr(mlp, name))
        x = torch.linspace(-6, 6, 97, dtype=torch.float64)
        assert torch.allclose(act(x), PHI[config.hidden_act](x), rtol=0, atol=1e-10)
        assert attention.scaling == pytest.approx(config.scales[layer], rel=1e-12)
        assert window_of(theirs, layer) == config.windows[layer], layer
        expected = None if config.ropes[layer] is None else frequencies(config.ropes[layer])
        found = rope_of(inner, theirs, layer)
        if expected is None:
            assert found is None
        else:
            torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)

    caps = {key: getattr(theirs, key, None) for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if config.model_type == "gemma3_text":
        caps["attn_logit_softcapping"] = None  # its attention never asks for it
    for key, cap in caps.items():
        assert getattr(config, key) == cap, key
    assert config.use_parallel_residual == getattr(layers[0], "use_parallel_residual", False)
    eos = theirs.eos_token_id
    assert config.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    assert (config.bos_token_id, config.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert config.dtype == (None if theirs.dtype is None else str(theirs.dtype).removeprefix("torch."))


def window_of(theirs, layer):
    """The window of a layer as transformers' mask has it; None where it cuts no text of the model's length."""
    types = getattr(theirs, "layer_types", None)
    window = getattr(theirs, "sliding_window", None)
    if theirs.model_type not in ("phi3", "mistral") and (types is None or types[layer] == FULL):
        return None
    if theirs.model_type != "gemma3_text" and window is not None and window >= theirs.max_position_embeddings:
        return None
    return window


def rope_of(inner, theirs, layer):
    rope = getattr(inner, "rotary_emb", None)
    if theirs.model_type == "gemma3_text":
        return getattr(rope, f"{theirs.layer_types[layer]}_inv_freq")
    return None if rope is None else rope.inv_freq


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_every_spelling_is_the_model_that_transformers_makes_of_it(name, keys):
    hf = LEAST[name] | ({"pad_token_id": 0} if name == "phi3" else {}) | keys  # Phi-3's own is outside this vocabulary
    config = ours_of(hf)
    compare(config, theirs_of(hf))
    assert ours_of(json.loads(CLASSES[name](**hf).to_json_string())) == config  # as transformers 5 saves it
    written = json.loads(json.dumps(config.to_dict()))
    assert ours_of(written) == config
    compare(config, theirs_of(written))


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_left_out_is_what_transformers_fills_in(name):
    theirs = json.loads(CLASSES[name](**LEAST[name]).to_json_string())
    assert ours_of(LEAST[name]) == ours_of(theirs)
    assert set(LEAST) == set(FAMILIES)


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_that_transformers_can_write_is_known(name):
    everything = CLASSES[name](**LEAST[name]).to_dict() | GenerationConfig._get_default_generation_params()
    assert ours_of({**everything, "dtype": None}) == ours_of(LEAST[name])
    whole = json.loads(CLASSES[name]().to_json_string())
    assert ours_of(ours_of(whole).to_dict()) == ours_of(whole)


def test_every_name_of_an_activation_is_the_function_that_transformers_calls_so():
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    for name, ours in ACTIVATIONS.items():
        assert torch.allclose(ACT2FN[name](x), PHI[ours](x), rtol=0, atol=1e-10), name
    assert set(ACTIVATIONS.values()) == PHI.keys()
    for name in ("quick_gelu", "gelu_10", "mish", "relu"):
        assert not any(torch.allclose(ACT2FN[name](x), phi(x), rtol=0, atol=1e-10) for phi in PHI.values()), name


GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
GEMMA_2_9B = {
    "_name_or_path": "google/gemma-2-9b", "architectures": ["Gemma2ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 16,
    "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    "torch_dtype": "bfloat16", "transformers_version": "4.45.2", "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
PHI_3_MINI = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "bos_token_id": 1, "embd_pdrop": 0.0,
    "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3", "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "original_max_position_embeddings": 4096,
    "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0,
    "sliding_window": 2047, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "transformers_version": "4.40.2", "attention_bias": False, "vocab_size": 32064,
}  # fmt: skip


@pytest.mark.parametrize("hf", [GPT2, GEMMA_2_9B], ids=["gpt2", "gemma-2-9b"])
def test_a_published_file_is_read_without_a_word(hf):
    config = ours_of(hf)
    assert config == ours_of(json.loads(CLASSES[hf["model_type"]](**hf).to_json_string()))
    assert ours_of(json.loads(json.dumps(config.to_dict()))) == config


def test_code_in_a_repository_of_phi_3_is_named():
    with pytest.warns(UserWarning, match="ignoring auto_map, which transformers' Phi3 does not read"):
        config = LlamaConfig.from_dict(PHI_3_MINI)
    assert config.windows == (2047,) * 32
    assert config.features == {"q, k and v in one linear", "gate and up in one linear"}


UNREAD = [  # keys that the family does not read, and their names in the warning
    ("gpt2", {"rms_norm_eps": 1e-3, "intermediate_size": 9, "num_key_value_heads": 2}, None),
    ("gpt2", {"rope_theta": 5e5, "rope_scaling": LINEAR, "hidden_act": "relu"}, "hidden_act, rope_scaling, rope_theta"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0, "use_sliding_window": True}, None),
    ("gemma2", {"hidden_act": "gelu", "sliding_window_pattern": 3, "rope_local_base_freq": 1e3}, None),
    ("gpt_neox", {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}, None),
    ("gpt_neox", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.factor"),
    (
        "gemma3_text",
        {"rope_parameters": {FULL: {"rope_type": "default", "factor": 2.0}, SLIDING: {"factor": 3.0}}},
        "rope_parameters.full_attention.factor, rope_parameters.sliding_attention.factor",
    ),
    ("qwen3", {"max_sequence_length": 9, "query_pre_attn_scalar": 3, "rotary_pct": 0.5, "n_embd": 9}, None),
    ("phi3", {"mlp_bias": True, "lm_head_bias": False, "use_parallel_residual": True}, None),
]


@pytest.mark.parametrize(("name", "keys", "named"), UNREAD)
def test_keys_that_the_family_does_not_read_are_named_and_change_nothing(name, keys, named):
    named = named or ", ".join(sorted(keys))
    with pytest.warns(UserWarning, match=f"ignoring {named}, which transformers' ") as caught:
        config = LlamaConfig.from_dict(LEAST[name] | keys)
    assert len(caught) == 1
    assert config == ours_of(LEAST[name])
    with pytest.raises(ValueError, match=f"asks for {named}, which fastweights does not implement"):
        LlamaConfig.from_dict(LEAST[name] | keys, strict=True)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
WRAPPED = {"model_type": "gemma3", "text_config": LEAST["gemma3_text"], "vision_config": {}}
NESTED = {FULL: {"rope_theta": 1e4}, SLIDING: {"rope_theta": 1e4}}
REFUSED = [
    ("gpt2", {"activation_function": "relu"}, 'activation_function is "relu", and fastweights implements only "silu"'),
    ("gpt2", {"activation_function": "quick_gelu"}, 'activation_function is "quick_gelu", and'),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention is true, and fastweights implements only null or fa"),
    ("gpt2", {"hidden_size": 32}, "hidden_size is 32, but n_embd is 64"),
    ("gpt2", {"n_head": 5}, "n_embd 64 is not a multiple of n_head 5"),
    ("gpt2", {"n_embd": None}, "n_embd is missing, and there is no safe default for it"),
    ("gpt2", {"n_layer": None}, "n_layer is missing"),
    ("gpt2", {"n_inner": 0}, "n_inner is 0, expected a positive whole number"),
    ("gpt2", {"n_positions": 0}, "n_positions is 0, expected a positive whole number"),
    ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0, expected a positive number"),
    ("gpt2", {"scale_attn_weights": "yes"}, "scale_attn_weights is 'yes', expected true or false"),
    ("gpt2", {"head_dim": 32}, "head_dim is 32, but n_embd 64 is 4 heads of 16"),
    ("gpt2", {"sliding_window": 8}, "sliding_window is 8, and a gpt2 has no sliding windows"),
    (
        "gemma3_text",
        WRAPPED,
        'model_type is "gemma3", which holds a gemma3_text beside other models; fastweights reads',
    ),
    ("llama", {"model_type": "llava", "text_config": LEAST["llama"]}, "only the text model saved by itself (llama)"),
    ("gemma3_text", {"model_type": "gemma3", "text_config": {}}, "saved by itself (gemma3_text)"),
    ("gemma3_text", {"model_type": "gemma3n_text"}, 'model_type is "gemma3n_text", and fastweights implements only'),
    ("gemma3_text", {"model_type": ["gemma2"]}, "model_type is "),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true, and fastweights"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true, and fastweights"),
    ("gemma3_text", {"head_dim": None}, "head_dim is None, expected a positive whole number"),
    ("gemma3_text", {"hidden_activation": None}, "hidden_activation is null, and fastweights implements only"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a positive number"),
    ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0, expected a positive number"),
    ("gemma2", {"sliding_window": None}, "sliding_window is null, but layers of a gemma2 have one"),
    ("gemma3_text", {"sliding_window": None}, "sliding_window is null, but layers of a gemma3_text have one"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0, expected a positive whole number"),
    ("gemma3_text", {"_sliding_window_pattern": 2}, "_sliding_window_pattern is 2, but sliding_window_pattern is 6"),
    ("gemma3_text", {"layer_types": [FULL] * 3}, "layer_types has 3 entries, expected one for each of 7 layers"),
    ("gemma3_text", {"rope_parameters": LINEAR}, "expected an object for each of full_attention and sliding_attention"),
    ("gemma3_text", {"rope_parameters": {FULL: 3}}, "rope_parameters.full_attention is 3, expected an object or null"),
    ("gemma3_text", {"rope_parameters": {SLIDING: LINEAR}}, "implements only the default rope there"),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "expected rope_type in it"),
    ("gemma3_text", {"rope_scaling": YARN}, "rope_type 'yarn' is not implemented"),
    (
        "gemma3_text",
        {"rope_parameters": NESTED, "rope_theta": 1e6},
        "rope_theta is 1000000.0, but rope_parameters says",
    ),
    (
        "gemma3_text",
        {"rope_parameters": NESTED, "rope_local_base_freq": 5},
        "rope_local_base_freq is 5, but rope_param",
    ),
    ("gemma3_text", {"rope_parameters": NESTED, "rope_scaling": LINEAR}, "contradict each other"),
    ("gemma2", {"rope_parameters": NESTED}, "differ between kinds of layers, which is not implemented"),
    ("qwen3", {"head_dim": None}, "head_dim is None, expected a positive whole number"),
    ("qwen3", {"head_dim": 15}, "head_dim is 15, expected an even number"),
    (
        "qwen3",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5, and fastweights impl",
    ),
    ("gpt_neox", {"rope_theta": 5.0}, "rope_theta is 5.0, but transformers' GPTNeoXForCausalLM says 10000.0"),
    (
        "gpt_neox",
        {"partial_rotary_factor": 0.5, "rotary_pct": 1.0},
        "partial_rotary_factor is 0.5, but rotary_pct says",
    ),
    ("gpt_neox", {"rotary_pct": 0}, "rotary_pct is 0, expected a positive number"),
    (
        "gpt_neox",
        {"rotary_pct": 2.0},
        "partial_rotary_factor is 2.0, which turns 32 of 16 channels, expected an even n",
    ),
    ("gpt_neox", {"rotary_pct": 0.2}, "partial_rotary_factor is 0.2, which turns 3 of 16 channels"),
    ("gpt_neox", {"head_dim": 32}, "head_dim is 32, but hidden_size 64 is 4 heads of 16"),
    ("gpt_neox", {"use_parallel_residual": None}, "use_parallel_residual is None, expected true or false"),
    (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "rope_type 'longrope'",
    ),
    (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
        "rope_type 'su' is not impl",
    ),
    ("phi3", {"rope_parameters": YARN}, "rope_type 'yarn' is not implemented"),
    (
        "phi3",
        {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.75}},
        "partial_rotary_factor is 0.5, but rope_parameters says 0.75",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_is_not_implemented_is_refused_by_name_in_one_line(name, change, message):
    with pytest.raises(ValueError) as error:
        LlamaConfig.from_dict(LEAST[name] | change, "folder/config.json")
    assert message in str(error.value)
    assert str(error.value).startswith("folder/config.json: ")
    assert "\n" not in str(error.value)
