"""Families beside Llama: tiny random models of transformers, read from their folders, run on every path, and saved."""

import pytest
import torch
from test_weights import add_tokenizer
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import fastweights as fw
from fastweights.config import LlamaConfig

SHAPE = {"hidden_size": 60, "intermediate_size": 92, "num_hidden_layers": 3, "num_attention_heads": 6}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 131}
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen2, untied": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 1}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 16}),
    "mistral, a window as long as any text": (MistralForCausalLM, MistralConfig, {"sliding_window": 64}),
}
IDS = torch.arange(18).reshape(2, 9) * 11 % 131


def saved(name, folder):
    torch.manual_seed(0)
    kind, config, changes = FAMILIES[name]
    theirs = kind(config(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(folder)
    add_tokenizer(folder)
    return theirs


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers_in_one_pass_and_token_by_token(name, tmp_path):
    theirs = saved(name, tmp_path)
    model, _ = fw.load(tmp_path)
    wanted = theirs(IDS).logits
    close = dict(rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(model(IDS), wanted, **close)
    episode = fw.Episode(model, 2)
    pieces = [episode.feed(IDS[:, :4])]
    assert episode.path == "modules"
    pieces += [episode.feed(IDS[:, t : t + 1]) for t in range(4, 9)]
    assert episode.path == "cpu"
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, **close)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    ragged = fw.Episode(model, 2).feed(IDS, attention_mask=mask)
    torch.testing.assert_close(ragged[1, 3:], theirs(IDS[1:, 3:]).logits[0], **close)


@pytest.mark.parametrize("name", FAMILIES)
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
    assert fw.load(tmp_path / "ours")[0].config == model.config


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_hebbian_writes_are_those_of_a_loop_of_hooks_on_transformers(name, tmp_path):
    """k = h / (‖h‖² + mu), u = rate · z, dense, token by token, in float64."""
    theirs = saved(name, tmp_path).double()
    model, _ = fw.load(tmp_path, dtype=torch.float64)
    rate, mu = 0.05, 0.1
    fast = fw.attach(model, [1], fw.Hebbian(rate=rate, mu=mu))
    episode = fw.Episode(model)
    found = episode.feed(IDS[:1])
    mlp = theirs.model.layers[1].mlp
    linears = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj, "down_proj": mlp.down_proj}
    before = {site: linear.weight.clone() for site, linear in linears.items()}
    seen, cache, logits = {}, None, []
    for site, linear in linears.items():
        linear.register_forward_hook(lambda _m, args, a, site=site: seen.update({site: (args[0][0, 0], a[0, 0])}))
    for t in range(9):
        out = theirs(IDS[:1, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        for site, linear in linears.items():
            h, a = seen[site]
            z = torch.nn.functional.silu(a) if site == "gate_proj" else a
            linear.weight += torch.outer(rate * z, h / (h @ h + mu))
    # transformers normalises in float32 even in a float64 model
    torch.testing.assert_close(found, torch.cat(logits, 1), rtol=1e-5, atol=1e-5)
    for site, linear in linears.items():
        delta = linear.weight - before[site]
        assert float((fast.delta_weight(1, site) - delta).norm() / delta.norm()) < 1e-5


def test_what_a_family_fills_in_for_absent_keys():
    base = {**SHAPE, "rms_norm_eps": 1e-6, "num_attention_heads": 8, "hidden_size": 64}
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
