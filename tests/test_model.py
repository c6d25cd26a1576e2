"""The frozen model: transformers' numbers, the KV cache, padding."""

import subprocess
import sys

import pytest
import torch
from oracle import Oracle
from tiny import CONFIG, prompt, tiny
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "grouped": {},
    "full attention": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 10},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_parameters": {"rope_theta": 5000.0, "rope_parameters": {"rope_theta": 5000.0, **LLAMA3}},
}


def transformers_twin(model, changes):
    config = HFConfig(**{**CONFIG, **changes}, attn_implementation="eager")
    twin = LlamaForCausalLM(config).to(model.dtype)
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return twin.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name):
    model, ids = tiny(torch.float32, **VARIANTS[name]), prompt(2, 100)
    with torch.no_grad():
        theirs = transformers_twin(model, VARIANTS[name])(ids).logits
    torch.testing.assert_close(model(ids), theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_float64_logits_equal_the_naive_oracle(name):
    model, ids = tiny(torch.float64, **VARIANTS[name]), prompt(1, 80)
    theirs_TV = Oracle(model.state_dict(), {**CONFIG, **VARIANTS[name]}, {}).feed(ids[0].tolist(), write=False)
    torch.testing.assert_close(model(ids)[0], theirs_TV, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_transformers(dtype):
    model, ids = tiny(dtype), prompt(2, 40)
    exact = tiny(torch.float64)
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        theirs = transformers_twin(model, {})(ids).logits
    ours_error = (model(ids).double() - exact(ids)).norm()
    theirs_error = (theirs.double() - exact(ids)).norm()
    assert ours_error < 1.3 * theirs_error


@pytest.mark.parametrize("splits", [[1] * 12, [5, 7], [11, 1], [1, 4, 7], [12]])
def test_cached_decode_equals_the_full_forward(splits):
    model, ids = tiny(), prompt(3, 12)
    cache, parts = model.new_cache(3), []
    for part in ids.split(splits, dim=1):
        parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-12, atol=1e-12)
    assert cache.lengths == [12, 12, 12]


def test_a_cache_that_grows_gives_the_numbers_of_one_that_does_not():
    model, ids = tiny(max_position_embeddings=1024), prompt(1, 600)
    cache = model.new_cache(1)
    assert cache.capacity == 256
    parts = [model(part, cache=cache) for part in ids.split([250, 10, 1, 339], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("side", ["left", "right", "both", "inside"])
def test_a_padded_row_equals_the_row_alone_in_cache_and_continuation(side):
    model, ids = tiny(), prompt(2, 9)
    real = {"left": [0, 0, 1, 1, 1, 1, 1, 1, 1], "right": [1, 1, 1, 1, 1, 1, 0, 0, 0]}
    real |= {"both": [0, 1, 1, 1, 1, 1, 1, 0, 0], "inside": [1, 1, 0, 1, 1, 0, 0, 1, 1]}
    mask = torch.tensor([[1] * 9, real[side]])
    cache = model.new_cache(2)
    logits = model(ids, attention_mask=mask, cache=cache)
    more = model(ids[:, :3], cache=cache)
    last = model(ids[:, :4], attention_mask=torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]), cache=cache, logits="last")
    for row in range(2):
        alone = model.new_cache(1)
        kept = mask[row].bool()
        torch.testing.assert_close(logits[row, kept], model(ids[row, kept][None], cache=alone)[0])
        torch.testing.assert_close(more[row], model(ids[row : row + 1, :3], cache=alone)[0])
        some = ids[row : row + 1, : (1, 3)[row]]
        torch.testing.assert_close(last[row], model(some, cache=alone, logits="last")[0])
        assert cache.lengths[row] == alone.lengths[0]
    torch.testing.assert_close(model(ids, attention_mask=mask)[1, mask[1].bool()], logits[1, mask[1].bool()])


def test_a_pass_that_fails_does_not_move_the_cache():
    model, ids = tiny(), prompt(1, 5)
    cache = model.new_cache(1)
    model(ids, cache=cache)

    def broken(*_):
        raise RuntimeError("broken hook")

    handle = model.model.layers[2].register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="broken hook"):
        model(ids, cache=cache)
    handle.remove()
    assert cache.lengths == [5]


def test_a_full_cache_is_refused_with_both_numbers():
    model = tiny()
    cache = model.new_cache(1, max_length=8)
    model(prompt(1, 6), cache=cache)
    with pytest.raises(ValueError, match=r"9 tokens do not fit: the KV cache holds 8 per row \(6 are in use\)"):
        model(prompt(1, 3), cache=cache)
    assert cache.lengths == [6]


def test_the_first_angles_of_a_process_are_exact():
    """MKL sets its vector functions up in the first call, where two threads may meet: one in three processes did."""
    code = """if True:
        import torch, fastweights
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.randn(2048, 2048) @ torch.randn(2048, 2048)
        angles = torch.linspace(0, 107, 54784)
        print(float((angles.cos() - angles.double().cos()).abs().max()))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-6
