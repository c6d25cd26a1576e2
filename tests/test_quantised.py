"""Packed checkpoints → the dense weights of the formats' formulas, to the bit; what is not read is refused by name."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_memory import Allocated
from test_weights import add_tokenizer, configured, drop, edit, put
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import fastweights as fw
from fastweights.__main__ import main

SHAPE = {"hidden_size": 32, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 32}
SHAPE |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 320}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
}
IDS = torch.arange(18).reshape(2, 9) * 11 % 320
LAYER = "model.layers.0."
LINEARS = [f"{LAYER}self_attn.{name}_proj" for name in "qkvo"] + [
    f"{LAYER}mlp.{n}_proj" for n in ("gate", "up", "down")
]
DOWN = f"{LAYER}mlp.down_proj"


# ---- the formats, written by loops


def packed(numbers, bits):
    """[N, C] → int32 [N · bits / 32, C]: bit by bit, down a column, the lowest bit of a number first."""
    words = np.zeros((len(numbers) * bits // 32, numbers.shape[1]), np.uint32)
    for n, row in enumerate(numbers):
        for bit in range(bits):
            place = n * bits + bit
            words[place // 32] |= ((row >> bit) & 1).astype(np.uint32) << np.uint32(place % 32)
    return torch.from_numpy(words.view(np.int32))


def product(q, zero, scale):
    """One weight: the difference is a whole number, and the product is rounded once."""
    return np.float16(int(q) - int(zero)) * scale


def gptq(rng, O, I, bits=4, group=32, version="gptq", order=False, g_idx=True):
    """The parts of one linear, and its dense weight [O, I] in float16."""
    size = I if group == -1 else group
    groups = np.arange(I) // size
    if order:
        groups = rng.permutation(groups)
    G = groups.max() + 1
    q, field = rng.integers(2**bits, size=(I, O)), rng.integers(2**bits, size=(G, O))
    field[:, ::5] = 2**bits - 1
    scales = (rng.random((G, O)) * 0.02 + 1e-3).astype(np.float16)
    zero = field + 1 if version == "gptq" else field
    dense = np.array([[product(q[i, o], zero[groups[i], o], scales[groups[i], o]) for i in range(I)] for o in range(O)])
    parts = {"qweight": packed(q, bits), "qzeros": packed(field.T, bits).T.contiguous()}
    parts |= {"scales": torch.from_numpy(scales)}
    parts |= {"g_idx": torch.from_numpy(groups.astype(np.int32))} if g_idx else {}
    return parts, torch.from_numpy(dense)


def awq(rng, O, I, group=32):
    def words(numbers):
        found = np.zeros((len(numbers), O // 8), np.uint32)
        for c in range(O // 8):
            for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                found[:, c] |= numbers[:, 8 * c + output].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(found.view(np.int32))

    size = I if group == -1 else group
    G = -(-I // size)
    q, zero = rng.integers(16, size=(I, O)), rng.integers(16, size=(G, O))
    scales = (rng.random((G, O)) * 0.02 + 1e-3).astype(np.float16)
    dense = np.array([[product(q[i, o], zero[i // size, o], scales[i // size, o]) for i in range(I)] for o in range(O)])
    return {"qweight": words(q), "qzeros": words(zero), "scales": torch.from_numpy(scales)}, torch.from_numpy(dense)


def fp8(rng, O, I, block=(128, 128), dtype=torch.float32):
    weight = torch.from_numpy(rng.standard_normal((O, I)).astype(np.float32) * 100).to(torch.float8_e4m3fn)
    scale = torch.from_numpy(rng.random((-(-O // block[0]), -(-I // block[1]))) * 1e-3 + 1e-4).to(dtype)
    w, s = weight.float().numpy(), scale.float().numpy()
    dense = np.array([[w[o, i] * s[o // block[0], i // block[1]] for i in range(I)] for o in range(O)])
    return {"weight": weight, "weight_scale_inv": scale}, torch.from_numpy(dense)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def checkpoint(folder, said, pack, family="llama", linears=LINEARS, **changes):
    """A random model whose `linears` are packed; the dense tensors that it stands for."""
    torch.manual_seed(0)
    kind, config, own = FAMILIES[family]
    theirs = kind(config(**SHAPE | own | changes)).half()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    add_tokenizer(folder)
    rng, path = np.random.default_rng(0), folder / "model.safetensors"
    dense, stored = load_file(path), load_file(path)
    for name in linears:
        parts, dense[f"{name}.weight"] = pack(rng, *stored.pop(f"{name}.weight").shape)
        stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, path, metadata={"format": "pt"})
    configured(quantization_config=said)(folder)
    return dense


def cast(dense, dtype):
    return {key: tensor.to(dtype) for key, tensor in dense.items()}


def assert_same(model, tensors):
    assert model.state_dict().keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(model.state_dict()[key], tensor), key


CASES = {
    "2 bits": ({"bits": 2}, {"bits": 2}),
    "3 bits, act order": ({"bits": 3, "desc_act": True}, {"bits": 3, "order": True}),
    "3 bits, one group, v2": (
        {"bits": 3, "group_size": -1, "checkpoint_format": "gptq_v2"},
        {"bits": 3, "group": -1, "version": "gptq_v2"},
    ),
    "4 bits": ({"checkpoint_format": "gptq"}, {}),
    "4 bits, act order": ({"desc_act": True}, {"order": True}),
    "4 bits, act order, v2": ({"desc_act": True, "format": "gptq_v2"}, {"order": True, "version": "gptq_v2"}),
    "4 bits, a last group that is short": ({"group_size": 64}, {"group": 64}),
    "4 bits, no g_idx": ({"group_size": 64}, {"group": 64, "g_idx": False}),
    "4 bits, one group, no g_idx": ({"group_size": -1}, {"group": -1, "g_idx": False}),
    "8 bits": ({"bits": 8}, {"bits": 8}),
    "8 bits, act order, v2": (
        {"bits": 8, "desc_act": True, "checkpoint_format": "gptq_v2"},
        {"bits": 8, "order": True, "version": "gptq_v2"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gptq_is_the_formula_to_the_bit(tmp_path, name):
    said, numbers = CASES[name]
    dense = checkpoint(tmp_path, GPTQ | said, lambda rng, O, I: gptq(rng, O, I, **numbers))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_same(fw.load(tmp_path, dtype)[0], cast(dense, dtype))


@pytest.mark.parametrize("group", [16, 64, -1])
def test_awq_is_the_formula_to_the_bit(tmp_path, group):
    dense = checkpoint(tmp_path, AWQ | {"group_size": group}, lambda rng, O, I: awq(rng, O, I, group))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_same(fw.load(tmp_path, dtype)[0], cast(dense, dtype))


@pytest.mark.parametrize(("block", "scales"), [((128, 128), torch.float32), ((48, 20), torch.bfloat16)])
def test_fp8_is_the_formula_to_the_bit(tmp_path, block, scales):
    said = FP8 | {"weight_block_size": list(block)}
    dense = checkpoint(tmp_path, said, lambda rng, O, I: fp8(rng, O, I, block, scales))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert_same(fw.load(tmp_path, dtype)[0], cast(dense, dtype))


def test_a_zero_of_15_in_the_older_gptq_is_16(tmp_path):
    """W = (q - 16) · scale there: not masked to four bits again."""
    dense = checkpoint(tmp_path, GPTQ, gptq)[f"{DOWN}.weight"]
    parts = load_file(tmp_path / "model.safetensors")
    q, scale = int(parts[f"{DOWN}.qweight"][0, 0]) & 15, parts[f"{DOWN}.scales"][0, 0]
    assert int(parts[f"{DOWN}.qzeros"][0, 0]) & 15 == 15
    assert float(dense[0, 0]) == float((q - 16) * scale)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_the_logits_of_the_dense_model(tmp_path, family):
    """q, k and v of Qwen2 keep their biases; the biases of zeros that AutoGPTQ wrote for all linears are dropped."""

    def with_bias(rng, O, I):
        parts, dense = gptq(rng, O, I, order=True)
        return parts | {"bias": torch.zeros(O, dtype=torch.float16)}, dense

    dense = checkpoint(tmp_path, GPTQ | {"desc_act": True}, with_bias, family)
    biases = {f"{name}.bias": torch.zeros_like(dense[f"{name}.bias"]) for name in LINEARS if f"{name}.bias" in dense}
    assert len(biases) == (3 if family == "qwen2" else 0)
    if biases:  # real ones, which checkpoint() wrote zeros over
        edit(lambda tensors: tensors.update({key: dense[key] for key in biases}))(tmp_path)
        assert min(float(dense[key].abs().max()) for key in biases) > 0.05
    model, _ = fw.load(tmp_path, "float32")
    assert_same(model, cast(dense, torch.float32))
    kind, config, own = FAMILIES[family]
    theirs = kind(config(**SHAPE | own)).eval()
    theirs.load_state_dict(cast(dense, torch.float32))
    torch.testing.assert_close(model(IDS), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_linears_that_are_stored_dense_stay_dense(tmp_path, capsys):
    said = AWQ | {"modules_to_not_convert": ["down_proj"]}
    dense = checkpoint(tmp_path, said, awq, linears=LINEARS[:-1])
    capsys.readouterr()
    assert_same(fw.load(tmp_path)[0], dense)
    assert capsys.readouterr().err.startswith("fastweights: 6 linears in 4 bits (AWQ, groups of 32) become float16")
    dense = checkpoint(tmp_path, GPTQ | {"lm_head": True}, gptq, linears=[DOWN, "lm_head"])
    capsys.readouterr()
    assert_same(fw.load(tmp_path)[0], dense)
    assert capsys.readouterr().err.startswith("fastweights: 2 linears in 4 bits (GPTQ, groups of 32) become float16")


def test_names_with_another_prefix_are_found(tmp_path):
    dense = checkpoint(tmp_path, GPTQ, gptq)
    path = tmp_path / "model.safetensors"
    save_file({f"module.{key}": tensor for key, tensor in load_file(path).items()}, path)
    assert_same(fw.load(tmp_path)[0], dense)


# ---- what is said, and in which dtype


@pytest.mark.parametrize(
    ("said", "pack", "line"),
    [
        (GPTQ | {"desc_act": True}, gptq, "4 bits (GPTQ, groups of 32, act order) become bfloat16: 0.1 MB"),
        (GPTQ, gptq, "4 bits (GPTQ, groups of 32) become bfloat16: 0.1 MB"),
        (AWQ, awq, "4 bits (AWQ, groups of 32) become bfloat16: 0.1 MB"),
        (FP8, fp8, "8 bits (FP8, blocks of 128 x 128) become bfloat16: 0.1 MB"),
    ],
)
def test_one_line_says_what_became_of_it_and_the_dtype_is_that_of_config_json(tmp_path, capfd, said, pack, line):
    checkpoint(tmp_path, said, pack)
    configured(dtype=None, torch_dtype="bfloat16")(tmp_path)
    capfd.readouterr()
    model, _ = fw.load(tmp_path)
    assert capfd.readouterr() == ("", f"fastweights: 7 linears in {line}\n")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_without_a_dtype_in_config_json_it_is_that_of_the_scales(tmp_path):
    checkpoint(tmp_path, GPTQ, gptq)
    configured(dtype=None)(tmp_path)
    edit(lambda tensors: tensors.update({k: t.float() for k, t in tensors.items() if "norm" in k}))(tmp_path)
    assert fw.load(tmp_path)[0].dtype == torch.float16


def test_old_folders_say_it_in_quantize_config_json(tmp_path, capsys):
    dense = checkpoint(tmp_path, None, gptq)
    said = {"bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": False, "model_file_base_name": "model"}
    (tmp_path / "quantize_config.json").write_text(json.dumps(said))
    assert_same(fw.load(tmp_path)[0], dense)
    assert "7 linears in 4 bits" in capsys.readouterr().err
    (tmp_path / "quantize_config.json").write_text(json.dumps(said | {"bits": 5}))
    with pytest.raises(
        ValueError, match=r"quantize_config\.json: bits is 5, and fastweights reads gptq with 2, 3, 4, 8"
    ):
        fw.load(tmp_path)


def test_what_is_saved_is_dense_and_says_nothing_of_packing(tmp_path, capsys):
    dense = checkpoint(tmp_path, None, gptq)
    (tmp_path / "quantize_config.json").write_text(json.dumps(GPTQ))
    model, tokenizer = fw.load(tmp_path)
    capsys.readouterr()
    for folder in (tmp_path / "new", tmp_path):  # also onto the folder that it came from
        fw.save(model, folder, tokenizer)
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        assert not (folder / "quantize_config.json").exists()
        assert_same(fw.load(folder)[0], dense)
        assert_same(AutoModelForCausalLM.from_pretrained(folder), dense)
    assert capsys.readouterr().err.count("linears") == 0


def test_anatomy_and_info_tell_the_dense_model(tmp_path, capsys):
    dense = checkpoint(tmp_path, FP8, fp8)
    count = sum(tensor.numel() for tensor in dense.values())
    (tmp_path / "weights").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "weights" / "model.safetensors")
    parts = fw.anatomy(tmp_path)  # from config.json alone
    assert (parts.parameters["total"], parts.bytes, parts.dtype) == (count, 2 * count, "float16")
    (tmp_path / "weights" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert main(["info", "--model", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["parameters"], facts["bytes"], facts["dtype"]) == (count, 2 * count, "float16")
    assert "quantization_config" not in facts


class Memory(Allocated):
    """Without what takes no memory: shapes, pages of a file, and the block that a new model frees untouched."""

    def made(self, storage):
        untouched = storage.nbytes() == (1 << 25) - (1 << 16)
        if storage.device.type != "meta" and storage.filename is None and not untouched:
            super().made(storage)


@pytest.mark.parametrize("said", [GPTQ | {"group_size": 128, "desc_act": True}, AWQ | {"group_size": 128}, FP8])
def test_the_peak_of_loading_is_the_dense_model_and_one_linear(tmp_path, said):
    """Storages of torch alone; a process of its own, with files, was measured by hand."""
    config = LlamaConfig(
        **SHAPE | {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 32, "num_key_value_heads": 4}
    )
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in LlamaForCausalLM(config).state_dict().items()}
    generator, tensors = torch.Generator().manual_seed(0), {}
    for key, shape in shapes.items():
        base = key.removesuffix(".weight")
        if base in LINEARS:
            sizes = {"qweight": (shape[1] // 8, shape[0]), "qzeros": (shape[1] // 128, shape[0] // 8)}
            if said is FP8:
                tensors[key] = torch.ones(shape, dtype=torch.float8_e4m3fn)
                tensors[f"{base}.weight_scale_inv"] = torch.ones(shape[0] // 128, shape[1] // 128)
                continue
            if said["quant_method"] == "awq":
                sizes["qweight"] = (shape[1], shape[0] // 8)
            else:
                tensors[f"{base}.g_idx"] = torch.randperm(shape[1], generator=generator).int() // 128
            for part, size in sizes.items():
                tensors[f"{base}.{part}"] = torch.randint(2**31 - 1, size, generator=generator, dtype=torch.int32)
            tensors[f"{base}.scales"] = torch.ones(shape[1] // 128, shape[0], dtype=torch.float16)
        else:
            tensors[key] = torch.ones(shape, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    configured(quantization_config=said)(tmp_path)
    add_tokenizer(tmp_path)
    with Memory() as allocated:
        model, _ = fw.load(tmp_path, "bfloat16")
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size <= allocated.now
    assert allocated.peak <= 1.15 * size + 2 * 1024 * 3072


# ---- what is refused


def refusal(folder):
    with pytest.raises((ValueError, OSError)) as error:
        fw.load(folder)
    text = str(error.value)
    assert "\n" not in text
    assert str(folder) in text
    return text


ORIGINAL = "load the model that it was made from instead"
REFUSED = {
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        'its weights are quantised as "bitsandbytes", and fastweights reads gptq, awq and fp8 only: load it in '
        "transformers, and save what model.dequantize() gives",
    ),
    "bitsandbytes before it had a name": ({"load_in_8bit": True}, 'quantised as "bitsandbytes"'),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        'quantised as "compressed-tensors", and fastweights reads gptq, awq and fp8 only: load it in transformers '
        "with CompressedTensorsConfig(run_compressed=False), and save that",
    ),
    "gguf": ({"quant_method": "gguf"}, 'quantised as "gguf", and fastweights reads gptq, awq and fp8 only: pass the'),
    "hqq": ({"quant_method": "hqq"}, f'quantised as "hqq", and fastweights reads gptq, awq and fp8 only: {ORIGINAL}'),
    "aqlm": (
        {"quant_method": "aqlm"},
        f'quantised as "aqlm", and fastweights reads gptq, awq and fp8 only: {ORIGINAL}',
    ),
    "no method": ({"bits": 4}, "its weights are quantised as null"),
    "no object": ("gptq", 'quantization_config is "gptq", expected an object'),
    "gptq, 5 bits": (GPTQ | {"bits": 5}, f"bits is 5, and fastweights reads gptq with 2, 3, 4, 8 only: {ORIGINAL}"),
    "gptq, no group_size": (
        {"quant_method": "gptq", "bits": 4},
        "group_size is null, and fastweights reads gptq with a",
    ),
    "gptq, groups of 0": (GPTQ | {"group_size": 0}, "group_size is 0, and fastweights reads gptq with a positive"),
    "marlin": (
        GPTQ | {"checkpoint_format": "marlin"},
        'checkpoint_format is "marlin", and fastweights reads gptq with null or "gptq" or "gptq_v2" only',
    ),
    "marlin, older": (GPTQ | {"is_marlin_format": True}, "is_marlin_format is true, and fastweights reads gptq with"),
    "two formats": (
        GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"},
        'format is "gptq_v2", and fastweights reads gptq with the same value in checkpoint_format ("gptq") only',
    ),
    "numbers by layer": (
        GPTQ | {"dynamic": {"-:.*down": {}, "+:.*up.*": {"bits": 8}}},
        "and fastweights reads gptq with the same numbers for every linear only",
    ),
    "adapter": (
        GPTQ | {"adapter": {"name": "lora"}},
        'adapter is {"name": "lora"}, and fastweights reads gptq with null',
    ),
    "awq gemv": (AWQ | {"version": "gemv"}, 'version is "gemv", and fastweights reads awq with null or "gemm"'),
    "awq gemv_fast": (AWQ | {"version": "GEMV_FAST"}, 'version is "GEMV_FAST", and fastweights reads awq with'),
    "llm-awq": (AWQ | {"backend": "llm-awq"}, 'backend is "llm-awq", and fastweights reads awq with AutoAWQ'),
    "awq without zeros": (
        AWQ | {"zero_point": False},
        "zero_point is false, and fastweights reads awq with null or true",
    ),
    "awq, 8 bits": (AWQ | {"bits": 8}, "bits is 8, and fastweights reads awq with 4 only"),
    "fp8, one scale": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        f"weight_block_size is null, and fastweights reads fp8 with blocks, such as [128, 128], only: {ORIGINAL}",
    ),
    "fp8, static": (FP8 | {"activation_scheme": "static"}, 'activation_scheme is "static", and fastweights reads fp8'),
    "fp8, e5m2": (FP8 | {"fmt": "e5m2"}, 'fmt is "e5m2", and fastweights reads fp8 with null or "e4m3" only'),
    "fp8, ue8m0": (
        FP8 | {"scale_fmt": "ue8m0"},
        'scale_fmt is "ue8m0", and fastweights reads fp8 with null or "float"',
    ),
}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("quantization", 'quantised as "mlx", and fastweights reads gptq, awq and fp8 only: make it dense with mlx_lm'),
        (
            "compression_config",
            'quantised as "compressed-tensors", and fastweights reads gptq, awq and fp8 only: load it',
        ),
    ],
)
def test_other_keys_of_config_json_that_say_quantised_are_refused(tmp_path, key, message):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path)
    configured(**{key: {"group_size": 64, "bits": 4}})(tmp_path)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name_from_config_json_alone(tmp_path, name):
    said, message = REFUSED[name]
    LlamaConfig(**SHAPE, quantization_config={}).save_pretrained(tmp_path)
    configured(quantization_config=said)(tmp_path)
    assert message in refusal(tmp_path)
    assert str(tmp_path / "config.json") in refusal(tmp_path)
    with pytest.raises(ValueError) as error:
        fw.anatomy(tmp_path)
    assert message in str(error.value)


def ones(key, *shape, dtype=torch.int32):
    return put(key, torch.ones(*shape).to(dtype))


Q = f"{LAYER}self_attn.q_proj"
BROKEN = {
    "no scales": (
        GPTQ,
        drop(f"{Q}.scales"),
        f"the tensor {Q}.scales is missing, expected beside {Q}.qweight for a linear in 4 bits (GPTQ, groups of 32)",
    ),
    "no qweight": (GPTQ, drop(f"{Q}.qweight"), f"the tensor {Q}.qweight is missing, expected beside {Q}.qzeros"),
    "no linear": (
        GPTQ,
        drop(*(f"{Q}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx"))),
        f"the tensor {Q}.weight is missing, expected by config.json",
    ),
    "of another number of bits": (
        GPTQ | {"bits": 8},
        lambda folder: None,
        f"the tensor {Q}.qweight is I32 [4, 64], expected I32 [8, 64] for a linear of 32 inputs and 64 outputs in",
    ),
    "of other groups": (
        GPTQ | {"group_size": 16},
        lambda folder: None,
        f"the tensor {Q}.qzeros is I32 [1, 8], expected I32 [2, 8] for a linear of 32 inputs",
    ),
    "of another dtype": (
        GPTQ,
        ones(f"{Q}.qweight", 4, 64, dtype=torch.int16),
        f"the tensor {Q}.qweight is I16 [4, 64], expected I32 [4, 64]",
    ),
    "act order without the order": (
        GPTQ | {"desc_act": True},
        drop(f"{Q}.g_idx"),
        f"the tensor {Q}.g_idx is missing, expected beside {Q}.qweight for a linear in 4 bits (GPTQ, groups of 32, act",
    ),
    "a group that is not there": (
        GPTQ,
        ones(f"{Q}.g_idx", 32),
        f"{Q}.g_idx holds groups from 1 to 1, expected 0 to 0: fetch the file again",
    ),
    "a bias that config.json does not know": (
        GPTQ,
        ones(f"{Q}.bias", 64, dtype=torch.float16),
        f"the tensor {Q}.bias is not zero, and config.json says that this linear has no bias: set attention_bias or",
    ),
    "packed and dense": (
        GPTQ,
        ones(f"{Q}.weight", 64, 32, dtype=torch.float16),
        f"the tensor {Q}.g_idx (and 3 more) is not part of the Llama in config.json",
    ),
    "dense, of whole numbers": (
        GPTQ,
        ones("model.norm.weight", 32),
        "model.norm.weight is stored as I32, expected one of F64, F32, F16, BF16",
    ),
    "nothing said": (
        None,
        lambda folder: None,
        "is a packed weight, and config.json has no quantization_config that says how: add the one of its repository",
    ),
    "awq as gptq": (AWQ, lambda folder: None, f"the tensor {Q}.qweight is I32 [4, 64], expected I32 [32, 8]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_parts_that_do_not_make_a_linear_are_refused_by_name(tmp_path, name):
    said, change, message = BROKEN[name]
    checkpoint(tmp_path, said, gptq)
    change(tmp_path)
    assert message in refusal(tmp_path)


BROKEN_FP8 = {
    "no scales": (
        drop(f"{Q}.weight_scale_inv"),
        f"the tensor {Q}.weight_scale_inv is missing, expected beside {Q}.weight",
    ),
    "scales that are exponents": (
        ones(f"{Q}.weight_scale_inv", 1, 1, dtype=torch.uint8),
        f"the tensor {Q}.weight_scale_inv is U8 [1, 1], expected F16 or BF16 or F32 [1, 1]",
    ),
    "scales that are e8m0": (
        ones(f"{Q}.weight_scale_inv", 1, 1, dtype=torch.float8_e8m0fnu),
        f"the tensor {Q}.weight_scale_inv is F8_E8M0 [1, 1], expected F16 or BF16 or F32 [1, 1]",
    ),
    "another float of 8 bits": (
        ones(f"{Q}.weight", 64, 32, dtype=torch.float8_e5m2),
        f"the tensor {Q}.weight is F8_E5M2 [64, 32], expected F8_E4M3 [64, 32]",
    ),
    "one scale": (
        ones(f"{Q}.weight_scale_inv", 1, dtype=torch.float32),
        f"the tensor {Q}.weight_scale_inv is F32 [1], expected F16 or BF16 or F32 [1, 1]",
    ),
    "static scales": (
        ones(f"{Q}.input_scale", 1, dtype=torch.float32),
        f"the tensor {Q}.input_scale is not part of the Llama in config.json",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FP8)
def test_fp8_parts_that_do_not_make_a_linear_are_refused_by_name(tmp_path, name):
    change, message = BROKEN_FP8[name]
    checkpoint(tmp_path, FP8, fp8)
    change(tmp_path)
    assert message in refusal(tmp_path)


def test_fp8_without_a_word_about_it_never_becomes_a_model_in_fp8(tmp_path):
    checkpoint(tmp_path, None, fp8)
    assert f"{DOWN}.weight_scale_inv is a packed weight" in refusal(tmp_path)
    drop(*(f"{name}.weight_scale_inv" for name in LINEARS))(tmp_path)
    assert "is stored as F8_E4M3, expected one of F64, F32, F16, BF16" in refusal(tmp_path)


def test_loading_packed_linears_imports_nothing_heavy(tmp_path):
    checkpoint(tmp_path, GPTQ, gptq)
    code = (
        "import sys, fastweights as fw; fw.load(sys.argv[1]); "
        "print([m for m in ('transformers', 'rich', 'torch._inductor', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
