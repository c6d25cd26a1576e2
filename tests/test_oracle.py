"""The oracle is right: against transformers, autograd on the dense weight, and arithmetic by hand.

transformers runs in float64 with its RMSNorm put into float64 too (it computes that in float32 whatever the
model's dtype), so everything here agrees to rounding.
"""

import math

import pytest
import torch
from oracle import LINEARS, FastLinear, Oracle, Plastic, silu, silu_derivative

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.llama.modeling_llama")

F64 = torch.float64
TOKENS = [3, 41, 7, 7, 19, 0, 52, 41, 30]
SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def float64_norm(monkeypatch):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(modeling.LlamaRMSNorm, "forward", forward)


def llama(seed=0, **changes):
    """A random transformers Llama in float64 and the config.json dict it came from."""
    config = {key: value for key, value in {**SMALL, **changes}.items() if value is not None}
    # sdpa: transformers' eager attention takes its softmax in float32
    hf_config = transformers.LlamaConfig(**config, attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(hf_config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=F64)
            p.copy_(1 + 0.1 * noise if "norm" in name else 0.25 * noise)
    return model, config


def oracle_of(model, config, plastic=None):
    # clones: state_dict() shares the parameters, which some tests change
    return Oracle({n: p.clone() for n, p in model.state_dict().items()}, config, plastic or {})


def hf_linear(model, key):
    return getattr(model.model.layers[key[0]].mlp, key[1])


@torch.no_grad()
def hf_run(model, ids):
    out = model(torch.tensor([ids]), output_hidden_states=True)
    return out.logits[0], out.hidden_states


def close(found, wanted, tolerance=1e-9):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# -- the frozen model ------------------------------------------------------------------------------------

VARIANTS = {
    "grouped attention": {},
    "full attention": {"num_key_value_heads": 4},
    "no num_key_value_heads": {"num_key_value_heads": None},
    "multi-query attention": {"num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim explicit": {"head_dim": 10},
    "tied embeddings": {"tie_word_embeddings": True},
    "no rope_theta": {"rope_theta": None},
    "linear rope, old key": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3 rope, old keys": {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 16},
    "llama3 rope, rope_parameters": {"rope_parameters": {**LLAMA3, "rope_theta": 300.0}, "head_dim": 16},
    "linear rope, rope_parameters": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0}},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_without_plastic_linears_it_is_transformers_llama(changes):
    model, config = llama(**changes)
    oracle = oracle_of(model, config)
    tokens = TOKENS * 2
    logits, hidden_states = hf_run(model, tokens)
    close(oracle.feed(tokens), logits)
    hidden = torch.stack(oracle.hiddens, dim=1)  # [L+1, T, D]
    for layer in range(oracle.L):  # transformers' last entry has been through the final norm
        close(hidden[layer], hidden_states[layer][0])
    cache = model(torch.tensor([tokens])).past_key_values
    for layer in range(oracle.L):
        close(torch.stack(oracle.cache_k[layer], dim=1), cache.layers[layer].keys[0].detach())
        close(torch.stack(oracle.cache_v[layer], dim=1), cache.layers[layer].values[0].detach())


def test_rope_frequencies_are_the_same_float32_bits_as_transformers_at_a_real_llama_3_1_shape():
    rope = {**LLAMA3, "original_max_position_embeddings": 8192}
    model, config = llama(head_dim=128, rope_theta=500000.0, rope_scaling=rope, max_position_embeddings=131072)
    oracle = oracle_of(model, config)
    assert torch.equal(oracle.inv_freq, model.model.rotary_emb.original_inv_freq.float())
    for position in (0, 1, 777, 131071):
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=F64), torch.tensor([[position]]))
        assert torch.equal(oracle.rope(position)[0], cos[0, 0])
        assert torch.equal(oracle.rope(position)[1], sin[0, 0])


def test_the_last_hidden_row_is_before_the_final_norm():
    model, config = llama()
    oracle = oracle_of(model, config)
    logits = oracle.feed(TOKENS)[-1]
    close(model.lm_head(model.model.norm(oracle.hidden[-1])).detach(), logits)


# -- local rules on the whole model ----------------------------------------------------------------------

FEW = [(0, "up_proj"), (1, "gate_proj"), (1, "up_proj"), (1, "down_proj"), (2, "gate_proj")]


@pytest.mark.parametrize("gate", ["ones", "positive", "derivative"])
def test_hebbian_agrees_with_hooks_on_transformers_that_change_its_weights_after_every_token(gate):
    """The notebook this library replaces: capture h and a, update the weight in place, next token."""
    rate, mu, decay, clip = 0.7, 0.3, 0.1, 0.05
    model, config = llama()
    plastic = {key: Plastic("hebbian", rate, mu=mu, gate=gate, decay=decay, clip=clip) for key in FEW}
    oracle = oracle_of(model, config, plastic)
    write = [True, True, False, True, True, False, True, True, True]
    found = oracle.feed(TOKENS, write)

    base = {key: hf_linear(model, key).weight.detach().clone() for key in FEW}
    seen = {}
    for key in FEW:

        def hook(module, inputs, output, key=key):
            seen[key] = inputs[0][0, 0], output[0, 0]

        hf_linear(model, key).register_forward_hook(hook)
    cache, wanted = transformers.DynamicCache(), []
    with torch.no_grad():
        for token, is_written in zip(TOKENS, write, strict=True):
            wanted.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0])
            for key in FEW if is_written else []:
                h, a = seen[key]
                z, slope = a, torch.ones_like(a)
                if key[1] == "gate_proj":
                    z = torch.nn.functional.silu(a)
                    slope = torch.func.vmap(torch.func.grad(torch.nn.functional.silu))(a)
                u = rate * {"ones": 1.0, "positive": (z > 0).double(), "derivative": slope}[gate] * z
                step = torch.outer(u, h) / (h.dot(h) + mu)
                # each row of a rank-1 step has norm |u_i| ‖k‖
                step *= (clip / step.norm(dim=1, keepdim=True)).clamp(max=1)
                W = hf_linear(model, key).weight
                W.copy_(base[key] + (1 - decay) * (W - base[key]) + step)
    close(found, torch.stack(wanted))
    assert (found[-1] - oracle_of_base(model, config, base).feed(TOKENS)[-1]).abs().max() > 1e-3
    for key in FEW:
        close(oracle.dW[key], hf_linear(model, key).weight.detach() - base[key])
        assert oracle.events[key] == sum(write)


def oracle_of_base(model, config, base):
    tensors = dict(model.state_dict())
    tensors.update({f"model.layers.{key[0]}.mlp.{key[1]}.weight": W for key, W in base.items()})
    return Oracle(tensors, config, {})


def test_a_probe_equals_transformers_with_the_weights_merged_and_leaves_the_oracle_as_it_was():
    model, config = llama()
    plastic = {key: Plastic("hebbian", 0.5, mu=0.1) for key in FEW} | {(0, "down_proj"): GRADIENT}
    oracle = oracle_of(model, config, plastic)
    undisturbed = oracle_of(model, config, plastic)
    logits = []
    for token in TOKENS:
        logits.append(oracle.step(token))
        probe_logits, probe_hidden = oracle.frozen_probe([5, 9, 5])
        oracle.frozen_probe([8], fresh=False)
    assert torch.equal(torch.stack(logits), undisturbed.feed(TOKENS))
    assert all(torch.equal(oracle.dW[key], undisturbed.dW[key]) for key in plastic)
    assert oracle.events == undisturbed.events
    assert oracle.length == len(TOKENS)
    with torch.no_grad():
        for key, dW in oracle.dW.items():
            hf_linear(model, key).weight.add_(dW)
    wanted, hidden_states = hf_run(model, [5, 9, 5])
    close(probe_logits, wanted)
    close(probe_hidden[:, 1], hidden_states[1][0])


def test_a_probe_behind_the_context_is_the_next_step_without_its_write():
    model, config = llama()
    oracle = oracle_of(model, config, {(1, "up_proj"): Plastic("hebbian", 0.5, mu=0.1)})
    oracle.feed(TOKENS)
    probe, _ = oracle.frozen_probe([8], fresh=False)
    assert torch.equal(probe[0], oracle.step(8))


def test_a_waiting_gradient_event_is_in_no_probe_and_is_dropped_with_its_context():
    model, config = llama()
    oracle = oracle_of(model, config, {(0, "up_proj"): GRADIENT})
    plain = oracle_of(model, config)
    oracle.step(23)
    plain.step(23)
    for fresh in (True, False):
        assert torch.equal(oracle.frozen_probe([17, 4], fresh)[0], plain.frozen_probe([17, 4], fresh)[0])
    oracle.reset_context()
    oracle.step(17)
    assert oracle.events[0, "up_proj"] == 0


def test_rate_zero_or_no_write_is_the_plain_model_bit_for_bit():
    model, config = llama()
    plain = oracle_of(model, config).feed(TOKENS)
    for rate, write in ((0.0, True), (1.0, False)):
        for kind, mu in (("hebbian", 0.1), ("local-least-squares", 0.1), ("gradient-ascent", None)):
            plastic = {key: Plastic(kind, rate, mu=mu, bias=True, clip=0.1) for key in FEW}
            assert torch.equal(oracle_of(model, config, plastic).feed(TOKENS, write), plain)


def test_dW_is_the_decayed_sum_of_the_logged_events_and_decay_acts_per_event_not_per_token():
    model, config = llama()
    key, decay = (1, "down_proj"), 0.25
    oracle = oracle_of(model, config, {key: Plastic("hebbian", 0.5, mu=0.1, decay=decay)})
    oracle.feed(TOKENS[:4])
    oracle.feed(TOKENS, write=False)
    n = oracle.events[key]
    assert n == 4
    events = enumerate(zip(oracle.values[key], oracle.keys[key], strict=True))
    close(oracle.dW[key], sum((1 - decay) ** (n - 1 - j) * torch.outer(u, k) for j, (u, k) in events))


def test_reset_context_keeps_dW_and_starts_again_at_position_0():
    model, config = llama()
    oracle = oracle_of(model, config, {(1, "up_proj"): Plastic("hebbian", 0.5, mu=0.1)})
    oracle.feed(TOKENS)
    probe, _ = oracle.frozen_probe([1, 2])
    oracle.reset_context()
    assert torch.equal(oracle.feed([1, 2], write=False), probe)


# -- one linear, by hand ---------------------------------------------------------------------------------


def one_linear(plastic, has_silu=False, rows=3, columns=2):
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=F64)
    return FastLinear(W, None, plastic, has_silu)


def test_two_hebbian_events_with_decay_clip_and_bias_by_hand():
    fast = FastLinear(
        torch.tensor([[1.0, 2.0], [0.0, -1.0]]),
        torch.tensor([0.5, 0.0]),
        Plastic("hebbian", rate=0.1, mu=5.0, decay=0.5, clip=0.1, bias=True),
        has_silu=False,
    )
    # Event 1. ‖h‖² = 25, k = h/30, ‖k‖ = 1/6.
    h = torch.tensor([3.0, 4.0], dtype=F64)
    a = fast.read(h)
    close(a, torch.tensor([11.5, -4.0], dtype=F64))
    # u = 0.1 a = [1.15, -0.4]; |u_i| ‖k‖ = [0.191667, 0.066667], so row 0 is clipped to 0.1 · 6 = 0.6.
    fast.write(h, fast.value(h, a))
    close(fast.dW, torch.tensor([[0.06, 0.08], [-0.04, -4 / 75]], dtype=F64))
    close(fast.db, torch.tensor([0.02, -1 / 75], dtype=F64))
    # Event 2. ‖h‖² = 1, k = h/6, ‖k‖ = 1/6, and it reads event 1: a = [1 + 0.5 + 0.06 + 0.02, -0.04 - 1/75].
    h = torch.tensor([1.0, 0.0], dtype=F64)
    a = fast.read(h)
    close(a, torch.tensor([1.58, -4 / 75], dtype=F64))
    # u = [0.158, -4/750], nothing clipped; what was there is halved first.
    fast.write(h, fast.value(h, a))
    close(fast.dW, torch.tensor([[0.03 + 0.158 / 6, 0.04], [-0.02 - 4 / 4500, -2 / 75]], dtype=F64))
    close(fast.db, torch.tensor([0.01 + 0.158 / 6, -1 / 150 - 4 / 4500], dtype=F64))
    close(torch.stack(fast.values), torch.tensor([[0.6, -0.4], [0.158, -4 / 750]], dtype=F64))
    close(torch.stack(fast.keys), torch.tensor([[0.1, 4 / 30], [1 / 6, 0.0]], dtype=F64))


def test_gates_on_a_silu_linear_by_hand():
    a = torch.tensor([math.log(3.0), -math.log(3.0)], dtype=F64)  # σ = 3/4 and 1/4
    z = torch.tensor([0.75, -0.25], dtype=F64) * math.log(3.0)
    slope = torch.tensor([0.75 + 0.1875 * math.log(3.0), 0.25 - 0.1875 * math.log(3.0)], dtype=F64)
    wanted = {"ones": z, "positive": z * torch.tensor([1.0, 0.0]), "derivative": slope * z}
    for gate, value in wanted.items():
        fast = one_linear(Plastic("hebbian", rate=2.0, mu=1.0, gate=gate), has_silu=True, rows=2)
        close(fast.value(torch.ones(2, dtype=F64), a), 2.0 * value)


def test_silu_and_its_derivative_are_torchs():
    a = torch.linspace(-9, 9, 37, dtype=F64, requires_grad=True)
    reference = torch.nn.functional.silu(a)
    close(silu(a), reference)
    close(silu_derivative(a), torch.autograd.grad(reference.sum(), a)[0])


@pytest.mark.parametrize("gate", ["ones", "positive", "derivative"])
def test_local_least_squares_on_itself_is_hebbian_with_rate_gamma(gate):
    model, config = llama()
    common = {"rate": 0.3, "mu": 0.2, "gate": gate, "decay": 0.05, "clip": 0.5, "bias": True}
    found, wanted = (
        oracle_of(model, config, {key: Plastic(kind, **common) for key in FEW})
        for kind in ("local-least-squares", "hebbian")
    )
    close(found.feed(TOKENS), wanted.feed(TOKENS))
    for key in FEW:
        close(found.dW[key], wanted.dW[key])
        close(found.db[key], wanted.db[key])


def responses(plastic, has_silu=False, times=6):
    """a at each of several presentations of the same input, each written."""
    fast, h = one_linear(plastic, has_silu), torch.tensor([0.6, -1.1], dtype=F64)
    out = []
    for _ in range(times):
        out.append(fast.read(h))
        fast.write(h, fast.value(h, out[-1]))
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["hebbian", "local-least-squares"])
def test_plain_rules_multiply_a_repeated_response_by_one_plus_rate_each_time(kind):
    a = responses(Plastic(kind, rate=0.5, mu=0.0))
    close(a, a[0] * 1.5 ** torch.arange(6, dtype=F64)[:, None])


@pytest.mark.parametrize("has_silu", [False, True])
def test_the_slow_target_converges_on_a_repeated_input_to_a0_plus_gamma_z0(has_silu):
    # mu = 0: the first event reaches the target exactly and later ones change nothing
    a = responses(Plastic("local-least-squares", rate=0.5, mu=0.0, target="slow"), has_silu)
    z0 = silu(a[0]) if has_silu else a[0]
    close(a[1:], (a[0] + 0.5 * z0).expand(5, -1))
    # mu > 0: the distance to it shrinks by mu / (‖h‖² + mu) each time, here ‖h‖² = 1.57
    a = responses(Plastic("local-least-squares", rate=0.5, mu=1.0, target="slow"), has_silu)
    close(a - (a[0] + 0.5 * z0), -0.5 * z0 * (1 / 2.57) ** torch.arange(6, dtype=F64)[:, None])


def test_the_slow_target_writes_gamma_m0_z0_minus_dW_h_at_the_actual_input():
    fast = one_linear(Plastic("local-least-squares", 0.4, mu=0.1, gate="derivative", target="slow"), True)
    fast.dW = torch.tensor([[0.3, -0.2], [1.0, 0.5], [0.0, 2.0]], dtype=F64)
    h = torch.tensor([0.7, 0.2], dtype=F64)
    a0 = fast.W @ h
    close(fast.value(h, fast.read(h)), 0.4 * silu_derivative(a0) * silu(a0) - fast.dW @ h)


def test_delta_with_beta_one_and_mu_zero_gives_the_wanted_value_at_once():
    target = torch.tensor([1.0, -2.0, 3.0])
    a = responses(Plastic("delta", rate=1.0, mu=0.0, target=target), times=3)
    close(a[1:], target.double().expand(2, -1))
    a = responses(Plastic("delta", rate=0.25, mu=0.0, target=target), times=5)
    close(a - target, (a[0] - target) * 0.75 ** torch.arange(5, dtype=F64)[:, None])


def test_clip_bounds_every_row_of_an_event_and_leaves_small_rows_alone():
    h = torch.tensor([3.0, -4.0], dtype=F64)
    for mu in (0.0, 2.0):
        fast = one_linear(Plastic("hebbian", rate=1.0, mu=mu, clip=0.5))
        u = torch.tensor([100.0, -1e-3, 0.0], dtype=F64)
        fast.write(h, u)
        assert fast.dW[0].norm() == pytest.approx(0.5)
        close(fast.dW[1:], torch.outer(u, h / (25 + mu))[1:])


# -- gradient ascent -------------------------------------------------------------------------------------

GRADIENT = Plastic("gradient-ascent", rate=0.8)
ALL = {(layer, linear): GRADIENT for layer in range(3) for linear in LINEARS}


def log_p_of_last(model, cache_of, token, next_token):
    """log p(next) at one token behind constant earlier keys and values, by transformers."""
    cache = transformers.DynamicCache()
    for layer in range(cache_of.L):
        k, v = (torch.stack(c[layer], dim=1)[None] for c in (cache_of.cache_k, cache_of.cache_v))
        cache.update(k, v, layer)
    logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0]
    return torch.log_softmax(logits, dim=-1)[next_token]


def model_before_the_last_token(config_changes=None):
    """(an oracle with several events behind it, a transformers model whose weights hold those events)"""
    model, config = llama(**(config_changes or {}))
    oracle = oracle_of(model, config, ALL)
    oracle.feed(TOKENS)
    # TOKENS[-1] still waits; give it its next token unwritten, so nothing waits behind it
    oracle.step(11, write=False)
    with torch.no_grad():
        for key, dW in oracle.dW.items():
            hf_linear(model, key).weight.add_(dW)
    return oracle, model


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}])
def test_the_gradient_event_is_autograds_gradient_of_the_dense_weight(changes):
    oracle, model = model_before_the_last_token(changes)
    weights = {key: hf_linear(model, key).weight for key in ALL}
    wanted = torch.autograd.grad(log_p_of_last(model, oracle, 23, 17), list(weights.values()))
    before = oracle.dW
    oracle.step(23)
    oracle.step(17)
    for key, gradient in zip(weights, wanted, strict=True):
        assert gradient.norm() > 1e-6
        close((oracle.dW[key] - before[key]) / GRADIENT.rate, gradient)


def test_the_gradient_event_is_the_finite_difference_of_one_weight():
    oracle, model = model_before_the_last_token()
    fork = oracle.fork()
    fork.step(23)
    fork.step(17)
    for key in ((0, "gate_proj"), (1, "down_proj"), (2, "up_proj")):
        W, values = hf_linear(model, key).weight, []
        with torch.no_grad():
            for change in (1e-5, -1e-5):
                W[4, 3] += change
                values.append(float(log_p_of_last(model, oracle, 23, 17)))
                W[4, 3] -= change
        wanted = (values[0] - values[1]) / 2e-5
        found = (fork.dW[key] - oracle.dW[key])[4, 3] / GRADIENT.rate
        assert float(found) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_a_small_gradient_event_raises_the_log_probability_of_the_token_that_came():
    model, config = llama()
    oracle = oracle_of(model, config, {key: Plastic("gradient-ascent", rate=1e-3) for key in ALL})
    oracle.step(23)
    before, _ = oracle.frozen_probe([23])
    oracle.step(17)
    after, _ = oracle.frozen_probe([23])
    assert torch.log_softmax(after[0], -1)[17] > torch.log_softmax(before[0], -1)[17] + 1e-4


def test_the_gradient_event_is_written_when_the_next_token_is_known_and_before_it_is_processed():
    model, config = llama()
    key = (1, "up_proj")
    oracle = oracle_of(model, config, {key: GRADIENT})
    oracle.step(23)
    assert oracle.events[key] == 0
    assert not oracle.dW[key].any()
    fork = oracle.fork()  # a fork of a waiting event sees another next token
    oracle.step(17)
    fork.step(30)
    assert oracle.events[key] == fork.events[key] == 1
    assert not torch.equal(oracle.dW[key], fork.dW[key])
    # token 17 was read with the event of token 23 in place
    with torch.no_grad():
        hf_linear(model, key).weight.add_(oracle.dW[key])
        cache = transformers.DynamicCache()
        for layer in range(oracle.L):
            cache.update(oracle.cache_k[layer][0][None, :, None], oracle.cache_v[layer][0][None, :, None], layer)
        model(torch.tensor([[17]]), past_key_values=cache)
    for layer in range(oracle.L):
        close(oracle.cache_k[layer][1], cache.layers[layer].keys[0, :, 1])


def test_an_unwritten_token_leaves_no_gradient_event():
    model, config = llama()
    oracle = oracle_of(model, config, {key: GRADIENT for key in FEW})
    oracle.feed(TOKENS, [True, False, True, False, False, True, True, False, True])
    assert set(oracle.events.values()) == {4}  # the last of the five still waits
    oracle.step(1, write=False)
    assert set(oracle.events.values()) == {5}


def test_gradient_decay_normalisation_clip_and_bias():
    model, config = llama()
    plain = oracle_of(model, config, {(1, "gate_proj"): Plastic("gradient-ascent", 0.8, bias=True)})
    rule = Plastic("gradient-ascent", 0.8, mu=0.5, decay=0.5, clip=0.01, bias=True)
    ruled = oracle_of(model, config, {(1, "gate_proj"): rule})
    for oracle in (plain, ruled):
        oracle.feed([23, 17])
    h, u = plain.keys[1, "gate_proj"][0], plain.values[1, "gate_proj"][0]
    close(plain.db[1, "gate_proj"], u)
    k = h / (h.dot(h) + 0.5)
    clipped = u.sign() * u.abs().clamp(max=0.01 / float(k.norm()))
    assert not torch.equal(clipped, u)
    close(ruled.dW[1, "gate_proj"], torch.outer(clipped, k))
    close(ruled.db[1, "gate_proj"], clipped / (h.dot(h) + 0.5))
    ruled.step(4)
    u, k = ruled.values[1, "gate_proj"][1], ruled.keys[1, "gate_proj"][1]
    close(
        ruled.dW[1, "gate_proj"],
        0.5 * torch.outer(clipped, ruled.keys[1, "gate_proj"][0]) + torch.outer(u, k),
    )


def test_local_and_gradient_rules_live_side_by_side():
    model, config = llama()
    local = {(1, "up_proj"): Plastic("hebbian", 0.5, mu=0.1)}
    oracle = oracle_of(model, config, local | {(2, "gate_proj"): GRADIENT})
    oracle.feed(TOKENS)
    assert oracle.events == {(1, "up_proj"): len(TOKENS), (2, "gate_proj"): len(TOKENS) - 1}
    # layers above do not reach below within a token: layer 1 of the first token is as without them
    alone = oracle_of(model, config, local)
    alone.feed(TOKENS)
    close(oracle.hiddens[0], alone.hiddens[0])
    assert torch.equal(oracle.dW[1, "up_proj"], alone.dW[1, "up_proj"])
