"""A .gguf of each architecture, written as llama.cpp's converter writes it, is the model of transformers.

The names of tensors and keys are those of the gguf package; what the converter does to values is written out here.
"""

from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
import transformers

import fastweights as fw
from fastweights.gguf import GgufFile

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 48, "vocab_size": 96, "rms_norm_eps": 1e-5}
SHAPE |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager"}
NO_GROUPS = {key: value for key, value in SHAPE.items() if key not in ("num_key_value_heads", "rms_norm_eps")}
WINDOW = 4
IDS = torch.arange(24).reshape(2, 12) * 7 % 96
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


class Case(NamedTuple):
    """transformers' class and the keys of its config; llama.cpp's name; what the converter adds of this family."""

    kind: str
    keys: dict
    architecture: gguf.MODEL_ARCH
    meta: dict


ARCH = gguf.MODEL_ARCH
EPS = {"layer_norm_rms_eps": 1e-5, "head_count_kv": 2}
GEMMA = {**EPS, "key_length": 24, "value_length": 24, "sliding_window": WINDOW}
GEMMA_KEYS = {**SHAPE, "head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
CASES = {
    "qwen2": Case("Qwen2", {**SHAPE, "rope_theta": 1e6}, ARCH.QWEN2, {**EPS, "rope_freq_base": 1e6}),
    "gpt2": Case(
        "GPT2",
        {
            **{"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 48, "vocab_size": 96},
            **{"bos_token_id": None, "eos_token_id": None, "attn_implementation": "eager"},
        },
        ARCH.GPT2,
        {"feed_forward_length": 256, "layer_norm_eps": 1e-5},
    ),
    "gemma2": Case(
        "Gemma2",
        {**GEMMA_KEYS, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        ARCH.GEMMA2,
        {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": Case(
        "Gemma3",
        {**GEMMA_KEYS, "num_hidden_layers": 7, "rope_parameters": ROPES},
        ARCH.GEMMA3,
        {**GEMMA, "rope_freq_base": 1e6, "rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": 8.0},
    ),
    "gemma3 without windows": Case(
        "Gemma3",
        {
            **GEMMA_KEYS,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": ROPES | {"full_attention": ROPES["sliding_attention"]},
        },
        ARCH.GEMMA3,
        {key: value for key, value in GEMMA.items() if key != "sliding_window"},
    ),
    "qwen3": Case(
        "Qwen3",
        {**SHAPE, "head_dim": 24, "rope_theta": 1e6, "tie_word_embeddings": True},
        ARCH.QWEN3,
        {**EPS, "key_length": 24, "value_length": 24, "rope_freq_base": 1e6},
    ),
    "olmo2": Case("Olmo2", {**SHAPE, "rope_theta": 5e5}, ARCH.OLMO2, {**EPS, "rope_freq_base": 5e5}),
    "phi3": Case(
        "Phi3",
        {**SHAPE, "sliding_window": WINDOW, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 48},
        ARCH.PHI3,
        {
            **EPS,
            "rope_dimension_count": 8,
            "rope_freq_base": 1e4,
            "rope_scaling_orig_ctx_len": 48,
            "sliding_window": WINDOW,
        },
    ),
    "gptneox": Case(
        "GPTNeoX",
        {**NO_GROUPS, "rotary_pct": 0.25, "layer_norm_eps": 1e-5},
        ARCH.GPTNEOX,
        {"rope_dimension_count": 4, "layer_norm_eps": 1e-5, "parallel_residual": True},
    ),
    "gptneox, one after the other": Case(
        "GPTNeoX",
        {**NO_GROUPS, "rotary_pct": 1.0, "layer_norm_eps": 1e-5, "use_parallel_residual": False},
        ARCH.GPTNEOX,
        {"rope_dimension_count": 16, "layer_norm_eps": 1e-5, "parallel_residual": False},
    ),
}


def build(case):
    """transformers' model with random weights."""
    name = case.kind + ("LMHeadModel" if case.kind == "GPT2" else "ForCausalLM")
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**case.keys)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def all_q_all_k_all_v(rows, heads):
    """Rows of [q k v] of each head, one after the other, put where the converter puts them."""
    width = len(rows) // (3 * heads)
    order = [(head * 3 + part) * width + i for part in range(3) for head in range(heads) for i in range(width)]
    return rows[order]


def converted(model, architecture):
    """(llama.cpp's name, values) of every tensor, as the converter makes them."""
    config = model.config
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if architecture == ARCH.GPTNEOX:
            name = name.replace("lm_head", "embed_out")  # as in the files on the Hub
        if name in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == ARCH.GPT2 and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            values = np.ascontiguousarray(values.T)
        if architecture in (ARCH.GEMMA2, ARCH.GEMMA3) and name.endswith("norm.weight"):
            values = values + 1
        if architecture == ARCH.GPTNEOX and "query_key_value" in name:
            values = all_q_all_k_all_v(values, config.num_attention_heads)
        yield known.get_name(name, try_suffixes=(".weight", ".bias")), values


def write(path, case, tensors, kind="F32", **more):
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[case.architecture])
    keys = {**SHAPE, **case.keys}
    writer.add_context_length(keys["max_position_embeddings"])
    writer.add_embedding_length(keys["hidden_size"])
    writer.add_block_count(keys["num_hidden_layers"])
    writer.add_head_count(keys["num_attention_heads"])
    for key, value in ({"feed_forward_length": 96, "tokenizer_model": "none"} | case.meta | more).items():
        getattr(writer, f"add_{key}")(value)
    for name, values in tensors:
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 and "position" not in name else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def difference(ours, theirs):
    with torch.no_grad():
        wanted = theirs(IDS).logits
        return float((ours(IDS) - wanted).abs().max() / wanted.abs().max())


def checkpoint_name(name, case):
    return name.replace("lm_head", "embed_out") if case.kind == "GPTNeoX" else name


def lies_transposed(name, case):
    return case.kind == "GPT2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has no vocabulary"),
    pytest.mark.filterwarnings("ignore:.*has no tokenizer.json"),
]


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_of_each_architecture_is_the_model_of_transformers(tmp_path, name):
    case = CASES[name]
    theirs = build(case)
    model, _ = fw.load(write(tmp_path / "m.gguf", case, converted(theirs, case.architecture)))
    assert difference(model, theirs) <= 1e-5
    ours = model.state_dict()
    for key, tensor in theirs.state_dict().items():
        wanted = tensor.T if lies_transposed(key, case) else tensor
        # half a bit of 1 + w, where the file holds that
        assert (ours[checkpoint_name(key, case)] - wanted).abs().max() <= 1.2e-7, key
    fw.save(model, tmp_path / "saved")  # its config.json says everything that the file's metadata left to the reader
    saved = type(theirs).from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    assert difference(model, saved) <= 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if " " not in name])
def test_a_quantised_gguf_of_each_architecture_is_the_dequantised_values(tmp_path, name):
    case = CASES[name]
    theirs = build(case)
    exact = theirs(IDS).logits
    path = write(tmp_path / "m.gguf", case, converted(theirs, case.architecture), "Q8_0")
    for key, tensor in theirs.named_parameters():  # tied weights once
        if tensor.ndim == 2 and "wpe" not in key:
            rows = tensor.T if lies_transposed(key, case) else tensor  # the 32 weights of a block lie along the inputs
            q8 = gguf.GGMLQuantizationType.Q8_0
            rows.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(rows.numpy(), q8), q8)))
    assert difference(fw.load(path)[0], theirs) <= 1e-5
    assert (theirs(IDS).logits - exact).abs().max() > 1e-3 * exact.abs().max()


def config_of(path, name, **more):
    """The configuration that a file with no tensor but the embedding has; None leaves a key of the case out."""
    case = CASES[name]
    changed = {key: value for key, value in (case.meta | more).items() if value is not None}
    table = [("token_embd.weight", np.zeros((96, 64), np.float32))]
    return GgufFile(write(path, case._replace(meta=changed), table)).config


def test_what_gemma_files_leave_out_is_as_in_llama_cpp(tmp_path):
    path = tmp_path / "m.gguf"
    bare = {"sliding_window": None, "attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = config_of(path, "gemma2", context_length=8192, **bare)
    assert config.windows == (4096, None, 4096)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config_of(path, "gemma2", block_count=46, key_length=24).query_pre_attn_scalar == 64 // 4  # the 27B model
    assert config_of(path, "gemma2", block_count=42, key_length=24).query_pre_attn_scalar == 24
    assert config_of(path, "gemma3", block_count=62, key_length=24).query_pre_attn_scalar == 64 // 4
    config = config_of(path, "gemma3", block_count=34)
    assert config.query_pre_attn_scalar == 24
    assert config.windows == ((4,) * 5 + (None,)) * 5 + (4,) * 4
    assert (config.rope_theta, config.rope_local_base_freq) == (1e6, 1e4)
    assert (config.ropes[0].scaling, config.ropes[5].scaling.factor) == (None, 8.0)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (None, None)


def test_which_layers_have_a_window_and_their_rope_may_stand_in_the_file(tmp_path):
    path = tmp_path / "m.gguf"
    assert config_of(path, "gemma3", block_count=4, sliding_window_pattern=2).windows == (4, None, 4, None)
    pattern = [False, True, True]
    assert config_of(path, "gemma3", block_count=3, sliding_window_pattern=pattern).windows == (None, 4, 4)
    assert config_of(path, "gemma3", rope_freq_base_swa=500.0).rope_local_base_freq == 500.0
    assert config_of(path, "gemma3", sliding_window=0).windows == (None,) * 7
    assert config_of(path, "phi3", sliding_window=0).windows == (None,) * 3  # Phi-4
    assert config_of(path, "phi3", sliding_window=2047, context_length=4096).windows == (2047,) * 3
    assert config_of(path, "qwen2", sliding_window=4).windows == (None,) * 3  # llama.cpp reads none there


def test_the_activation_of_gpt_neox_20b_is_the_tanh_form(tmp_path):
    assert config_of(tmp_path / "m.gguf", "gptneox", block_count=44).hidden_act == "gelu_tanh"
    assert config_of(tmp_path / "m.gguf", "gptneox", block_count=32).hidden_act == "gelu"  # Pythia


def test_rope_turns_the_channels_that_the_file_counts(tmp_path):
    for head_dim, channels in ((44, 30), (96, 24), (128, 96), (64, 16), (90, 26)):  # int(44 · (30 / 44)) is 29
        config = config_of(tmp_path / "m.gguf", "gptneox", key_length=head_dim, rope_dimension_count=channels)
        assert config.rotary_dim == channels


def test_an_older_gpt2_file_has_its_head_twice(tmp_path):
    case = CASES["gpt2"]
    theirs = build(case)
    tensors = dict(converted(theirs, case.architecture))
    tensors["output.weight"] = tensors["token_embd.weight"]
    model, _ = fw.load(write(tmp_path / "m.gguf", case, tensors.items()))
    assert difference(model, theirs) <= 1e-5


REFUSED = [
    ("olmo2", {"sliding_window": 4096}, r"olmo2\.attention\.sliding_window is 4096, and fastweights implements only 0"),
    ("phi3", {"rope_scaling_attn_factors": 1.19}, r"phi3\.rope\.scaling\.attn_factor is 1\.19"),
    ("phi3", {"rope_scaling_type": gguf.RopeScalingType.LONGROPE}, r"phi3\.rope\.scaling\.type is 'longrope', and"),
    ("gemma2", {"rope_freq_base_swa": 500.0}, r"gemma2\.rope\.freq_base_swa is 500\.0, expected the 10000\.0 of"),
    ("gemma3", {"sliding_window_pattern": [True]}, r"sliding_window_pattern has 1 entries, expected one for each of 7"),
    ("gemma3", {"value_length": 32}, r"gemma3\.attention\.value_length is 32, expected the head width 24"),
    (
        "gemma3",
        {"causal_attention": False},
        r"gemma3\.attention\.causal is False, and fastweights implements only True",
    ),
    ("qwen3", {"expert_count": 8}, r"qwen3\.expert_count is 8, and fastweights implements only 0"),
    ("qwen3", {"rope_dimension_count": 12}, r"qwen3\.rope\.dimension_count is 12, expected the head width 24"),
    ("qwen3", {"layer_norm_rms_eps": None}, r"the key qwen3\.attention\.layer_norm_rms_epsilon is missing"),
    ("gpt2", {"layer_norm_eps": None}, r"the key gpt2\.attention\.layer_norm_epsilon is missing"),
    ("gpt2", {"block_count": 0}, r"gpt2\.block_count is 0, expected a positive whole number"),
    ("gptneox", {"parallel_residual": None}, r"the key gptneox\.use_parallel_residual is missing"),
    ("gptneox", {"rope_dimension_count": 3}, r"turns 3 of 16 channels, expected an even number"),
    ("gptneox", {"head_count": 0}, r"gptneox\.attention\.head_count is 0, expected a positive whole number"),
]


@pytest.mark.parametrize(("name", "meta", "message"), REFUSED)
def test_metadata_that_is_not_implemented_or_missing_is_refused_by_name(tmp_path, name, meta, message):
    with pytest.raises(ValueError, match=r"^\S*/m\.gguf: .*" + message) as error:
        config_of(tmp_path / "m.gguf", name, **meta)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("phi3", {"rope_factors_long.weight": (4,)}, r"rope_factors_long\.weight is of the rope scaling longrope"),
        ("phi3", {"blk.0.attn_q.weight": (64, 64)}, r"the tensor blk\.0\.attn_q\.weight is not part of a Phi3"),
        ("qwen3", {"cls.output.weight": (2, 64)}, r"the tensor cls\.output\.weight is not part of a Qwen3"),
        ("qwen3", {"attn_q.weight": (64, 64)}, r"the tensor attn_q\.weight is not part of a Qwen3"),
        ("gemma2", {"blk.1.attn_q_norm.weight": (24,)}, r"blk\.1\.attn_q_norm\.weight is not part of a Gemma2"),
        ("gpt2", {"position_embd.weight": None}, r"the tensor transformer\.wpe\.weight is missing"),
        ("gpt2", {"token_embd.weight": None}, r"the tensor token_embd\.weight is missing"),
        (
            "gptneox",
            {"blk.0.attn_qkv.weight": (190, 64)},
            r"query_key_value\.weight has shape \[190, 64\], .*\[192, 64\]",
        ),
        ("gemma3", {"blk.2.attn_k_norm.weight": (12,)}, r"layers\.2\.self_attn\.k_norm\.weight has shape \[12\]"),
    ],
)
def test_tensors_that_are_foreign_missing_or_misshapen_are_refused_by_name(tmp_path, name, change, message):
    case = CASES[name]
    tensors = dict(converted(build(case), case.architecture))
    tensors |= {key: shape and np.ones(shape, np.float32) for key, shape in change.items()}
    path = write(tmp_path / "m.gguf", case, [(key, values) for key, values in tensors.items() if values is not None])
    with pytest.raises(ValueError, match=r"^\S*/m\.gguf: .*" + message) as error:
        fw.load(path)
    assert "\n" not in str(error.value)
