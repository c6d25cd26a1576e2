"""Every family: tiny random models of transformers, read from their folders, run, written to, probed and saved."""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from family_models import MODELS, SHAPE, pairs
from safetensors.torch import load_file, save_file
from test_weights import add_tokenizer
from transformers import AutoModelForCausalLM, Starcoder2Config, Starcoder2ForCausalLM

import fastweights as fw
from fastweights.config import LlamaConfig
from fastweights.families import FAMILIES

T = 13
IDS = torch.arange(2 * T).reshape(2, T) * 11 % 131
PHI = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda a: torch.nn.functional.gelu(a, approximate="tanh"),
}
FUSED = {"gate_up_proj"}  # φ on the first half of the outputs
GATES = {"gate_proj", "c_fc", "dense_h_to_4h"}  # φ on all of them


def saved(name, folder):
    """Transformers' model, and its folder as transformers writes it."""
    _, theirs = pairs(name)
    theirs.save_pretrained(folder)
    add_tokenizer(folder)
    return theirs


def close(found, wanted, share=1e-5):
    torch.testing.assert_close(found, wanted, rtol=share, atol=share * float(wanted.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_folder_of_transformers_gives_its_logits_whole_in_pieces_and_ragged(name, tmp_path):
    theirs = saved(name, tmp_path)
    model, _ = fw.load(tmp_path)
    assert model.config.model_type == MODELS[name].model_type
    wanted = theirs(IDS).logits
    close(model(IDS), wanted)
    episode = fw.Episode(model, 2)
    pieces = [episode.feed(ids) for ids in IDS.split([5, 1, 1, 6], dim=1)]
    close(torch.cat(pieces, 1), wanted)
    mask = torch.ones_like(IDS)
    mask[1, :3] = mask[1, 7] = 0
    ragged = fw.Episode(model, 2).feed(IDS, attention_mask=mask)
    real = mask[1].bool()
    close(ragged[1][real], theirs(IDS[1:, real]).logits[0])


def looped(theirs, name, layer, rate, mu, ids):
    """Logits of token after token, and ΔW [O, I] by name: k = h / (‖h‖² + mu), u = rate · z, dense, by hooks."""
    mlp = next(module for path, module in theirs.named_modules() if re.fullmatch(rf".*\.{layer}\.mlp", path))
    linears = {path: module for path, module in mlp.named_children() if hasattr(module, "weight")}
    conv = name == "gpt2"  # whose linears lie as [I, O]
    phi, seen, cache, logits = PHI[MODELS[name].ours.get("hidden_act", "silu")], {}, None, []
    before = {path: linear.weight.clone() for path, linear in linears.items()}
    for path, linear in linears.items():
        linear.register_forward_hook(lambda _m, args, a, path=path: seen.update({path: (args[0][0, 0], a[0, 0])}))
    for t in range(ids.shape[1]):
        out = theirs(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        for path, linear in linears.items():
            h, a = seen[path]
            z = phi(a) if path in GATES else a
            if path in FUSED:
                z = torch.cat((phi(a[: len(a) // 2]), a[len(a) // 2 :]))
            delta = torch.outer(rate * z, h / (h @ h + mu))
            linear.weight += delta.T if conv else delta
    moved = {path: linear.weight - before[path] for path, linear in linears.items()}
    return torch.cat(logits, 1), {path: delta.T if conv else delta for path, delta in moved.items()}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hebbian_writes_are_those_of_a_loop_of_hooks_and_so_is_every_moment_of_them(name, tmp_path):
    theirs = saved(name, tmp_path).double()
    model, _ = fw.load(tmp_path, dtype=torch.float64)
    fast = fw.attach(model, [1], fw.Hebbian(rate=0.05, mu=0.1))
    episode = fw.Episode(model)
    found = episode.feed(IDS[:1])
    half, _ = looped(saved(name, tmp_path).double(), name, 1, 0.05, 0.1, IDS[:1, :6])
    wanted, moved = looped(theirs, name, 1, 0.05, 0.1, IDS[:1])
    close(found, wanted)  # transformers normalises in float32 even in a float64 model
    close(half, wanted[:, :6])
    assert sorted(linear for _, linear in fast.linears) == sorted(moved) == sorted(model.config.family.linears)
    for path, delta in moved.items():
        assert float((fast.delta_weight(1, path) - delta).norm() / delta.norm()) < 1e-5
    moments = episode.probe(IDS[1:], at=[0, 6]).logits
    close(moments[0, 0], AutoModelForCausalLM.from_pretrained(tmp_path).double()(IDS[1:]).logits[0])
    again = fw.Episode(model)
    again.feed(IDS[:1, :6])
    close(moments[1], again.probe(IDS[1:]).logits, 1e-9)
    fw.detach(model)
    assert torch.equal(model(IDS[1:]), fw.load(tmp_path, dtype=torch.float64)[0](IDS[1:]))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_gradient_event_is_the_gradient_of_autograd_through_transformers(name, tmp_path):
    theirs = saved(name, tmp_path).double()
    model, _ = fw.load(tmp_path, dtype=torch.float64)
    down = list(model.config.family.linears)[-1]
    fast = fw.attach(model, [0], fw.GradientAscent(rate=1.0), [down])
    episode = fw.Episode(model)
    episode.feed(IDS[:1, :2], update=[0])
    weight = dict(theirs.named_modules())[dict_path(theirs, 0, down)].weight
    with torch.enable_grad():
        weight.requires_grad_()
        logprob = theirs(IDS[:1, :1]).logits[0, 0].log_softmax(-1)[IDS[0, 1]]
        (slope,) = torch.autograd.grad(logprob, weight)
    wanted = slope.T if name == "gpt2" else slope
    assert float((fast.delta_weight(0, down) - wanted).norm() / wanted.norm()) < 1e-5


def dict_path(theirs, layer, linear):
    return next(path for path, _ in theirs.named_modules() if re.fullmatch(rf".*\.{layer}\.mlp\.{linear}", path))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_in_bfloat16_it_is_no_farther_from_float64_than_transformers(name, tmp_path):
    theirs = saved(name, tmp_path)
    exact, _ = fw.load(tmp_path, dtype=torch.float64)
    model, _ = fw.load(tmp_path, dtype=torch.bfloat16)
    wanted, ids = exact.to(torch.float64)(IDS), IDS
    rounded = {key: t.to(torch.bfloat16).double() for key, t in exact.state_dict().items()}
    exact.load_state_dict(rounded)
    wanted = exact(ids)
    ours, other = model(ids).double() - wanted, theirs.to(torch.bfloat16)(ids).logits.double() - wanted
    assert float(ours.norm() / other.norm()) < 1.1


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_one_that_transformers_loads_and_the_same(name, tmp_path):
    theirs = saved(name, tmp_path / "theirs")
    model, _ = fw.load(tmp_path / "theirs")
    fw.save(model, tmp_path / "ours")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for (key, one), (other_key, other) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(one, other)
    with torch.no_grad():
        close(again(IDS).logits, theirs(IDS).logits)
    (tmp_path / "ours" / "tokenizer.json").write_text((tmp_path / "theirs" / "tokenizer.json").read_text())
    assert fw.load(tmp_path / "ours")[0].config == model.config


SPELLINGS = {
    "gpt2, as on the Hub": ("gpt2", "transformer.", "", [(f"h.{n}.attn.bias", (1, 1, 64, 64)) for n in range(3)]),
    "gpt2, with old masks": ("gpt2", "", "", [(f"transformer.h.{n}.attn.masked_bias", ()) for n in range(3)]),
    "gpt_neox, with old buffers": (
        "gpt_neox",
        "",
        "",
        [(f"gpt_neox.layers.{n}.attention.{leftover}", (3,)) for n in range(3) for leftover in ("bias", "masked_bias")]
        + [(f"gpt_neox.layers.{n}.attention.rotary_emb.inv_freq", (2,)) for n in range(3)],
    ),
    "gpt_neox, a head named as in transformers 5": ("gpt_neox", "embed_out.", "lm_head.", []),
    "gemma2, without its prefix": ("gemma2", "model.", "", []),
    "qwen3, wrapped": ("qwen3", "model.", "base_model.model.", []),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@torch.no_grad()
def test_other_spellings_of_a_checkpoint_give_the_same_model(spelling, tmp_path):
    name, prefix, instead, more = SPELLINGS[spelling]
    theirs = saved(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    changed = {(instead + key.removeprefix(prefix) if key.startswith(prefix) else key): t for key, t in tensors.items()}
    assert changed != tensors or more
    save_file(changed | {key: torch.zeros(shape) for key, shape in more}, tmp_path / "model.safetensors")
    close(fw.load(tmp_path)[0](IDS), theirs(IDS).logits)


@mock.patch.dict(FAMILIES)
@torch.no_grad()
def test_the_readmes_row_of_a_family_of_ones_own_is_starcoder2(tmp_path):
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"```python\n(from fastweights\.families.*?)```", page, re.S)
    exec(row, {})
    sizes = {key: value for key, value in SHAPE.items() if key not in ("rms_norm_eps", "rope_theta", "head_dim")}
    torch.manual_seed(0)
    theirs = Starcoder2ForCausalLM(Starcoder2Config(**sizes, bos_token_id=0, eos_token_id=1, sliding_window=5)).eval()
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    model, _ = fw.load(tmp_path, strict=True)
    fast, episode = fw.attach(model, [1], fw.Hebbian()), fw.Episode(model, 2)
    close(torch.cat([episode.feed(ids, update="none") for ids in IDS.split([12, 1], 1)], 1), theirs(IDS).logits)
    assert (episode.path, [name for _, name in fast.linears]) == ("cpu", ["c_fc", "c_proj"])
    trace = episode.probe(IDS, sites=["act", "model.layers.2.mlp.c_fc"])
    close(trace["act", 2], torch.nn.functional.gelu(trace["up", 2], approximate="tanh"))
    with pytest.raises(ValueError, match="did you mean 'mlp_out'"):
        episode.probe(IDS, sites="mlp_outt")
    fw.save(model, tmp_path / "ours")
    close(Starcoder2ForCausalLM.from_pretrained(tmp_path / "ours")(IDS).logits, theirs(IDS).logits)


def test_stop_ids_come_from_generation_config(tmp_path):
    saved("gemma3", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 106]}))
    assert fw.load(tmp_path)[0].config.eos_token_ids == (1, 106)


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_a_linear_that_the_family_does_not_have_is_refused_and_those_it_has_are_named(name):
    model, _ = pairs(name)
    names = ", ".join(model.config.family.linears)
    with pytest.raises(ValueError, match=f"linear 'gate_proj' does not exist: an MLP has {names}"):
        fw.attach(model, [0], fw.Hebbian(), ["gate_proj"])


def test_parts_are_found_by_a_llamas_names_too():
    model, _ = pairs("gpt2")
    assert model.model is model.transformer
    assert model.model.layers is model.transformer.h
    block = model.model.layers[1]
    assert block.mlp.up_proj is block.mlp.c_fc
    assert block.self_attn.o_proj is block.attn.c_proj
    assert block.mlp.gate_proj is None
    with pytest.raises(AttributeError, match="no attribute 'experts'"):
        block.mlp.experts  # noqa: B018


def test_what_a_family_fills_in_for_absent_keys():
    base = {**SHAPE, "num_attention_heads": 8, "hidden_size": 64}
    del base["max_position_embeddings"], base["num_key_value_heads"]
    qwen = LlamaConfig.from_dict({**base, "model_type": "qwen2", "max_window_layers": 2, "sliding_window": 64})
    assert (qwen.attention_bias, qwen.output_bias, qwen.mlp_bias) == (True, False, False)
    assert (qwen.max_position_embeddings, qwen.bos_token_id, qwen.eos_token_ids) == (32768, None, ())
    mistral = LlamaConfig.from_dict({**base, "model_type": "mistral", "sliding_window": None})
    assert (mistral.attention_bias, mistral.num_key_value_heads, mistral.bos_token_id) == (False, 8, 1)
    llama = LlamaConfig.from_dict({**base, "model_type": "llama", "attention_bias": True})
    assert (llama.attention_bias, llama.output_bias) == (True, True)


def test_a_key_that_the_family_does_not_read_is_named():
    config = {**SHAPE, "rms_norm_eps": 1e-6, "model_type": "qwen2", "attention_bias": False, "qk_norm": True}
    with pytest.warns(UserWarning, match="ignoring attention_bias, qk_norm, which transformers' Qwen2 does not read"):
        assert LlamaConfig.from_dict(config).attention_bias
    with pytest.raises(ValueError, match="asks for attention_bias, qk_norm, which fastweights does not implement"):
        LlamaConfig.from_dict(config, strict=True)
