"""Small random Llamas for tests, and the way from a rule to the oracle's words for it."""

import pytest
import torch
from naive import Naive
from oracle import Oracle, Plastic

import fastweights as fw
from fastweights.attach import FastWeights
from fastweights.config import LlamaConfig
from fastweights.model import Llama

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny(dtype=torch.float64, seed=0, **changes) -> Llama:
    """A random model whose logits and activations are of the order of 1."""
    model = Llama(LlamaConfig.from_dict({**CONFIG, **changes}, "tiny"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            value = 1 + 0.1 * noise
        elif parameter.dim() == 1:
            value = 0.1 * noise
        else:
            value = noise * (1.0 if "embed" in name else parameter.shape[1] ** -0.5)
        parameter.data = value.to(dtype)
    model.tie_weights()
    return model


def prompt(rows: int, tokens: int, seed=1, vocabulary=CONFIG["vocab_size"]) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def least_bytes(episode, *asked, **options) -> int:
    """The smallest `max_bytes` that a probe takes: batches of one lane."""
    with pytest.raises(ValueError, match="this probe needs") as refused:
        episode.probe(*asked, **options, max_bytes=1)
    return int(str(refused.value).split()[3])


def described(rule) -> Plastic:
    """The oracle's words for one of our rules."""
    common = {"mu": rule.mu, "decay": rule.decay, "clip": rule.clip, "bias": rule.bias}
    match rule:
        case fw.Hebbian():
            return Plastic("hebbian", rule.rate, gate=rule.gate, **common)
        case fw.LocalLeastSquares():
            return Plastic("local-least-squares", rule.gamma, gate=rule.gate, target=rule.target, **common)
        case fw.Delta():
            return Plastic("delta", rule.beta, target=rule.target, **common)
        case fw.GradientAscent():
            return Plastic("gradient-ascent", rule.rate, **common)
    raise AssertionError(rule)


def oracle_of(model: Llama, fast: FastWeights | list = (), config: dict | None = None) -> Oracle:
    handles = fast if isinstance(fast, (list, tuple)) else [fast]
    plastic = {site: described(linear.rule) for handle in handles for site, linear in handle.linears.items()}
    return Oracle(model.state_dict(), config or CONFIG, plastic)


def naive_of(model, rule=None, layers=(1, 2), linears=("gate_proj", "up_proj"), config=CONFIG):
    plastic = {} if rule is None else {(layer, name): described(rule) for layer in layers for name in linears}
    return Naive(model.state_dict(), config, plastic)


def cached(episode, row=0):
    """[2, L, T, KH, E]."""
    cache = episode.cache
    pairs = [torch.stack([b[row, :, : episode.lengths[row]] for b in each]) for each in (cache.keys, cache.values)]
    return torch.stack(pairs).transpose(2, 3)


def naive_cache(naive):
    return torch.stack([torch.stack([torch.stack(x) for x in each]) for each in (naive.keys, naive.values)])


def fed(episode, split, ids, **options):
    """Logits [T, V] of a prompt in parts."""
    start, found = 0, []
    for length in split:
        found.append(episode.feed([ids[start : start + length]], **options)[0])
        start += length
    assert start == len(ids)
    return torch.cat(found)
