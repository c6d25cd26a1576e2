"""The path "cpu" of every family that the step in C knows, against the modules, float64, and transformers."""

import pytest
import torch
from family_models import MODELS, pairs
from tiny import prompt
from torch import nn

import fastweights as fw
from fastweights.config import LlamaConfig
from fastweights.engine import table
from fastweights.model import Llama, RMSNorm

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 37,
    "intermediate_size": 53,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
SOME, GELU_TANH = (7, None, 7, None), {"hidden_act": "gelu_tanh"}
EVERY_HEAD = {"num_key_value_heads": 6}
FAMILIES = {
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "windows": (None, None, 7, 7)},
    "mistral": {"model_type": "mistral", "windows": (7, 7, 7, 7)},
    "gpt2": {"model_type": "gpt2", "attention_bias": True, "mlp_bias": True, **EVERY_HEAD, **GELU_TANH},
    "gpt2 scaled by layer": {
        **{"model_type": "gpt2", "attention_bias": True, "mlp_bias": True, **EVERY_HEAD, "hidden_act": "gelu"},
        **{"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "tie_word_embeddings": True},
    },
    "gemma3": {
        **{"model_type": "gemma3_text", "windows": SOME, "rope_local_base_freq": 100.0, **GELU_TANH},
        **{"query_pre_attn_scalar": 7.0, "tie_word_embeddings": True, "num_key_value_heads": 1},
    },
    "gemma3 capped": {
        **{"model_type": "gemma3_text", "windows": SOME, "rope_local_base_freq": 100.0, "attention_bias": True},
        **{"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0, **GELU_TANH},
    },
    "gemma2": {
        **{"model_type": "gemma2", "windows": SOME, "query_pre_attn_scalar": 7.0, **GELU_TANH},
        **{"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    },
    "qwen3": {"model_type": "qwen3", "windows": (None, None, 7, 7)},
    "olmo2": {"model_type": "olmo2"},
    "neox": {
        **{"model_type": "gpt_neox", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", **EVERY_HEAD},
        **{"use_parallel_residual": True, "partial_rotary_factor": 0.4},
    },
    "neox, one after the other": {
        **{"model_type": "gpt_neox", "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", **EVERY_HEAD},
        **{"partial_rotary_factor": 0.8},
    },
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.4, "windows": (7, 7, 7, 7)},
}
EVERYTHING = fw.Hebbian(rate=0.1, mu=0.3, gate="derivative", decay=0.1, clip=0.02, bias=True)


def tiny(family: str, dtype=F32, **changes) -> Llama:
    """A random model whose logits and activations are of the order of 1, and whose norms are not all alike."""
    model = Llama(LlamaConfig(**{**SHAPE, **FAMILIES[family], **changes}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=F64)
        if parameter.dim() == 1:
            is_weight = name.endswith("weight")
            value = 0.2 * noise + float(is_weight and model.config.family.norm != "rms1")
        else:
            value = noise * (1.0 if isinstance(parameter, nn.Embedding) else parameter.shape[1] ** -0.5)
        parameter.data = value.to(dtype)
    model.tie_weights()
    return model


def by_the_modules(model: Llama) -> Llama:
    model.model.norm.register_forward_hook(lambda *_: None)
    return model


def steps(model: Llama, ids, path: str, **options):
    """An episode that has read the ids token by token, and its logits [B, T, V]."""
    episode, found = fw.Episode(model, len(ids)), []
    mask = options.pop("attention_mask", torch.ones_like(ids))
    for t in range(ids.shape[1]):
        found.append(episode.feed(ids[:, t : t + 1], attention_mask=mask[:, t : t + 1], **options))
        assert episode.path == path, episode.why
    return episode, torch.cat(found, dim=1)


def relative(found, exact) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.fixture(autouse=True)
def threads(request):
    """More of them than some shapes have heads or rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 3))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("rows", "threads"), [(1, 1), (1, 2), (3, 3)], indirect=["threads"])
def test_steps_in_c_are_those_of_the_modules_and_of_one_pass_in_float64(family, rows):
    ids, mask = prompt(rows, 40), torch.ones(rows, 40, dtype=torch.long)
    mask[0, 5:8] = mask[-1, 30:] = 0  # ragged rows, if there are some
    mask = mask if rows > 1 else torch.ones_like(mask)
    _, found = steps(tiny(family), ids, "cpu", attention_mask=mask)
    _, modules = steps(by_the_modules(tiny(family)), ids, "modules", attention_mask=mask)
    exact = tiny(family, F64)(ids, attention_mask=mask)
    real = mask.bool()
    assert relative(found[real], modules[real]) < 1e-5
    assert relative(found[real], exact[real]) < 4e-6
    assert float(found[real].std()) > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plastic", [False, True])
def test_bfloat16_steps_round_where_the_modules_do(family, plastic):
    """Sums of another order round to a neighbour now and then, and torch's attention rounds its scores: so neither has
    the other's bits, and C is no further from float64. With one token to look at they are nearly the same."""
    ids, runs = prompt(2, 40), []
    exact = tiny(family, F64)
    exact.load_state_dict({k: v.bfloat16() for k, v in exact.state_dict().items()})
    for model, path in (
        (tiny(family, BF16), "cpu"),
        (by_the_modules(tiny(family, BF16)), "modules"),
        (exact, "modules"),
    ):
        if plastic:
            fw.attach(model, [0, 2], EVERYTHING, rank=8)
        runs.append(steps(model, ids, path)[1])
    assert runs[0].dtype == runs[1].dtype == BF16
    assert relative(runs[0], runs[2]) < 1.25 * relative(runs[1], runs[2])
    assert relative(runs[0][:, 0], runs[1][:, 0]) < 0.005


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_in_c_are_those_of_the_modules(family):
    ids, runs = prompt(2, 30), []
    for path in ("cpu", "modules"):
        model = tiny(family) if path == "cpu" else by_the_modules(tiny(family))
        fast = fw.attach(model, [0, 2, 3], fw.Hebbian(rate=0.05, decay=0.05), rank=8)
        assert {linear for _, linear in fast.linears} == model.config.family.linears.keys()
        episode, logits = steps(model, ids, path)
        runs.append([logits, *(episode.delta_weight(*site, row) for site in fast.linears for row in (0, 1))])
    for found, exact in zip(*runs, strict=True):
        assert relative(found, exact) < 1e-5
        assert float(exact.norm()) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_loop_of_ones_own_takes_c_too(family, dtype, monkeypatch):
    model, ids, calls, real = tiny(family, dtype), prompt(2, 12), [], table.decode
    monkeypatch.setattr(table, "decode", lambda *given: (calls.append(1), real(*given))[1])
    cache = model.new_cache(2)
    found = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(12)], dim=1)
    assert len(calls) == 12
    assert torch.equal(found, steps(model, ids, "cpu")[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_changed_in_place_are_seen(family):
    """Norms above all: their 1 + w is in no table."""
    model, ids = tiny(family), prompt(1, 4)
    before = steps(model, ids, "cpu")[1]
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or "bias" in name:
            parameter.data.mul_(1.5)
    _, after = steps(model, ids, "cpu")
    assert relative(after, before) > 0.05
    assert relative(after, steps(by_the_modules(model), ids, "modules")[1]) < 1e-5


def test_what_c_does_not_know_is_refused_by_name(monkeypatch):
    for family in FAMILIES:
        for feature in LlamaConfig(**{**SHAPE, **FAMILIES[family]}).features:
            with monkeypatch.context() as patch:
                patch.setattr(table, "KNOWN", table.KNOWN - {feature})
                episode = fw.Episode(tiny(family))
                episode.feed([1])
                assert f"the step in C does not know {feature}" in str(episode.why)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3"])
def test_norms_of_ones_own_run_on_the_modules(family):
    def replace(block, norm):
        block.add("before_mlp", norm)

    for norm in (
        RMSNorm(37, 1e-5, "rms_once"),
        RMSNorm(37, 0.1, "rms"),
        nn.LayerNorm(37, 0.1),
        nn.LayerNorm(37, bias=False),
    ):
        model = tiny(family)
        replace(model.model.layers[1], norm)
        steps(model.requires_grad_(False), prompt(1, 2), "modules")


@pytest.mark.parametrize("name", MODELS)
def test_steps_in_c_are_one_pass_of_transformers(name):
    ours, theirs = pairs(name)
    ids = prompt(2, 20)
    assert relative(steps(ours, ids, "cpu")[1], theirs(ids).logits) < 1e-5
