"""PlasticLinear against the naive dense oracle, and attach/detach."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import described, oracle_of, prompt, tiny

import fastweights as fw
from fastweights.attach import _backends
from fastweights.config import LlamaConfig
from fastweights.plastic import PlasticLinear, plastic_linears
from fastweights.rules import Twin, twin_of

ALL = ("gate_proj", "up_proj", "down_proj")
GAPS = [True, True, False, True, False, False, True, True, True, False, True, True, True]

RULES = {
    "hebbian": fw.Hebbian(rate=0.3, mu=0.1),
    "hebbian-positive-decay": fw.Hebbian(rate=0.3, mu=0.1, gate="positive", decay=0.2),
    "hebbian-derivative-clip-bias": fw.Hebbian(rate=0.5, mu=0.0, gate="derivative", clip=0.02, bias=True),
    "least-squares-self": fw.LocalLeastSquares(gamma=0.3, mu=0.1, gate="positive", decay=0.05, bias=True),
    "least-squares-slow": fw.LocalLeastSquares(gamma=0.5, mu=0.01, target="slow", gate="derivative"),
    "least-squares-slow-decay": fw.LocalLeastSquares(gamma=0.5, mu=0.01, target="slow", decay=0.1, clip=0.1),
    "gradient-ascent": fw.GradientAscent(rate=0.2),
    "gradient-ascent-mu-decay-clip-bias": fw.GradientAscent(rate=3.0, mu=0.1, decay=0.1, clip=0.05, bias=True),
}


def relative(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-12))


def agrees_with_oracle(model, handles, oracle, ids, write, tolerance):
    """One feed of all tokens = the oracle's loop: logits, ΔW, Δb, and a probe's hidden states."""
    episode = fw.Episode(model)
    logits_TV = episode.feed(ids, update=torch.tensor([write]))[0]
    assert relative(logits_TV, oracle.feed(ids[0].tolist(), write)) <= tolerance
    for handle in handles:
        for layer, linear in handle.linears:
            assert relative(handle.delta_weight(layer, linear), oracle.dW[layer, linear]) <= tolerance
            if handle.linears[layer, linear].rule.bias:
                assert relative(handle.delta_bias(layer, linear), oracle.db[layer, linear]) <= tolerance
    assert episode.event_counts == {site: [count] for site, count in oracle.events.items()}
    question = prompt(1, 5, seed=9)
    trace = episode.probe(question, sites=["resid_post"])
    logits, hidden_TLD = oracle.frozen_probe(question[0].tolist())
    assert relative(trace.logits[0], logits) <= tolerance
    assert relative(trace.hidden_states[:, 0], hidden_TLD.transpose(0, 1)) <= tolerance


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_every_rule_equals_the_dense_oracle_with_gaps(name, dtype, tolerance):
    model = tiny(dtype)
    fast = fw.attach(model, [1, 2], RULES[name], ALL, rank=4, overflow="grow")
    agrees_with_oracle(model, [fast], oracle_of(model, fast), prompt(1, len(GAPS)), GAPS, tolerance)


def test_delta_moves_towards_targets_given_per_linear():
    model = tiny()
    oracles, handles = {}, []
    for linear, width in (("gate_proj", 52), ("down_proj", 24)):
        rule = fw.Delta(beta=0.4, target=torch.linspace(-1, 1, width, dtype=torch.float64), mu=0.1, decay=0.05)
        handles.append(fw.attach(model, [0, 3], rule, [linear]))
        oracles |= {site: described(rule) for site in handles[-1].linears}
    agrees_with_oracle(model, handles, oracle_of(model, handles), prompt(1, 13), GAPS, 1e-9)


def test_delta_takes_a_target_for_every_position():
    model, ids = tiny(), prompt(1, 6)
    target_PO = torch.randn(6, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fw.attach(model, [1], fw.Delta(beta=1.0, target=target_PO, mu=0.0), ["down_proj"])
    episode = fw.Episode(model)
    episode.feed(ids[:, :4])
    log = episode.logs[1, "down_proj"]
    # β = 1 and mu = 0 solve the last token's regression exactly: ΔW h + W h = v*
    h = log.K_BRI[0, 3] / log.K_BRI[0, 3].square().sum()
    W = model.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close((W + episode.delta_weight(1, "down_proj")) @ h, target_PO[3])
    with pytest.raises(ValueError, match=r"target has shape \[6, 24\], but position 6 of 1 rows is to be written"):
        episode.feed(ids[:, :3])
    assert episode.length == 4


def test_two_rules_in_one_model_local_and_gradient():
    model = tiny()
    handles = [
        fw.attach(model, [0], fw.Hebbian(rate=0.2, decay=0.1), ["up_proj"]),
        fw.attach(model, [0, 2], fw.GradientAscent(rate=0.3), ["down_proj"]),
        fw.attach(model, [3], fw.LocalLeastSquares(gamma=0.4, target="slow")),
    ]
    agrees_with_oracle(model, handles, oracle_of(model, handles), prompt(1, 13), GAPS, 1e-9)


def test_gradient_event_is_one_step_of_ascent_on_the_dense_weight():
    model, ids = tiny(), prompt(1, 2)
    fw.attach(model, [2], fw.GradientAscent(rate=0.7), ["gate_proj"])
    episode = fw.Episode(model)
    episode.feed(ids)  # token 0 is written once token 1 is known, token 1 waits
    assert episode.events == 1
    plastic = model.model.layers[2].mlp.gate_proj
    fw.detach(model)
    weight = model.model.layers[2].mlp.gate_proj.weight
    weight.requires_grad_()
    logprob = model(ids[:, :1])[0, -1].log_softmax(-1)[ids[0, 1]]
    (gradient,) = torch.autograd.grad(logprob, weight)
    weight.requires_grad_(False)
    assert plastic.weight is weight
    torch.testing.assert_close(episode.delta_weight(2, "gate_proj"), 0.7 * gradient, rtol=1e-12, atol=1e-14)


def test_a_rule_of_the_users_own_runs_in_one_pass():
    class Oja:
        """Oja 1982, on the row itself: u = rate (z − z² a)."""

        rate, mu, decay, clip, bias, neuron_local = 0.1, 0.1, 0.01, None, False, True

        def value(self, a, z, at):
            return z - z**2 * a

    model, ids = tiny(), prompt(1, 20)
    fw.attach(model, [1, 3], Oja())
    whole, steps = fw.Episode(model), fw.Episode(model)
    logits = whole.feed(ids)
    stepped = torch.cat([steps.feed(ids[:, t : t + 1]) for t in range(20)], dim=1)
    torch.testing.assert_close(logits, stepped, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_what_a_rule_of_ones_own_gives_is_looked_at(tokens, dtype):
    def given(value):
        rule = type("Own", (fw.Hebbian,), {"value": lambda self, a, z, at: value(z)})(rate=0.1)
        model = tiny(dtype=dtype)
        fast = fw.attach(model, [1], rule, ["up_proj"])
        episode = fw.Episode(model)
        episode.feed(prompt(1, tokens))
        return fast.delta_weight(1, "up_proj"), episode

    exact, _ = given(lambda z: z)
    for value in (torch.Tensor.double, torch.Tensor.half):
        torch.testing.assert_close(given(value)[0], exact, rtol=2e-3, atol=1e-3)
    for value in (lambda z: z[..., :12], lambda z: z[..., :1], lambda z: z.sum(-1), lambda z: torch.cat([z, z], -1)):
        with pytest.raises(
            ValueError, match=r"Own.value gave shape \[.*\], expected a tensor like a, of shape \[.*52\]"
        ):
            given(value)
    with pytest.raises(ValueError, match=r"Own.value gave a float, expected a tensor like a"):
        given(lambda z: 1.0)


def test_numpy_numbers_are_numbers_and_a_rule_of_ones_own_is_checked_as_ours_are():
    model = tiny()
    fw.attach(model, np.array([1, 2]), fw.Hebbian(rate=np.float32(0.1), mu=np.float64(0.1)), rank=np.int64(8))
    assert len(plastic_linears(model)) == 6
    fw.detach(model)
    fw.attach(model, np.int64(1), fw.Hebbian())
    fw.detach(model)
    for attribute, value in {"rate": [0.1, 0.2], "decay": 2, "clip": 0, "mu": float("nan"), "bias": "yes"}.items():
        own = SimpleNamespace(rate=0.1, mu=0.1, decay=0.0, clip=None, bias=False, neuron_local=True, value=max)
        setattr(own, attribute, value)
        with pytest.raises(ValueError, match=rf"SimpleNamespace\({attribute}="):
            fw.attach(model, [1], own)
    with pytest.raises(ValueError, match="layers=None"):
        fw.attach(model, None, fw.Hebbian())


class Half(fw.Hebbian):
    """What a class changes counts, not the twin that its base has in the kernels."""

    def value(self, a, z, at):
        return 0.5 * z


class HalfWithTwin(Half):
    @property
    def twin(self):
        return Twin("ones", self.rate / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_value_of_a_subclass_is_not_its_bases_twin(dtype):
    ids = prompt(1, 40)
    found = []
    for rule in (Half(rate=0.1), HalfWithTwin(rate=0.1), fw.Hebbian(rate=0.05)):
        model = tiny(dtype=dtype)
        fw.attach(model, [1, 3], rule)
        found.append(fw.Episode(model).feed(ids))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])
    with pytest.raises(ValueError, match="Half has no Triton twin"):
        fw.attach(tiny(dtype=torch.float32), [1], Half(), backend="triton")
    assert twin_of(Half()) is None
    assert twin_of(HalfWithTwin(rate=0.1)) == ("ones", 0.05, 1.0)
    none = type("None_", (fw.Hebbian,), {"twin": None})(rate=0.05)
    model = tiny(dtype=dtype)
    fw.attach(model, [1, 3], none)
    torch.testing.assert_close(fw.Episode(model).feed(ids), found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_factors_in_float32(dtype):
    model, ids = tiny(dtype), prompt(1, 12)
    fast = fw.attach(model, [1], fw.Hebbian(rate=0.2, mu=0.1))
    oracle = oracle_of(model, fast)
    episode = fw.Episode(model)
    logits = episode.feed(ids)
    assert logits.dtype == dtype
    assert episode.logs[1, "up_proj"].U_BRO.dtype == torch.float32
    assert relative(logits[0], oracle.feed(ids[0].tolist())) < 0.03


@pytest.mark.parametrize("rule", [fw.Hebbian(rate=0.0), fw.LocalLeastSquares(gamma=0.0), fw.GradientAscent(rate=0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rate_zero_is_bit_identical_to_the_frozen_model(rule, dtype):
    model, ids = tiny(dtype), prompt(2, 17)
    frozen = model(ids)
    fw.attach(model, [0, 2], rule)
    episode = fw.Episode(model, batch_size=2)
    assert torch.equal(episode.feed(ids), frozen)
    assert episode.events == 17
    again = fw.Episode(model, batch_size=2)
    assert torch.equal(again.feed(ids, update="none"), frozen)
    assert again.events == 0


def test_attach_then_detach_leaves_the_identical_objects_and_bits():
    model = tiny()
    before = [getattr(block.mlp, name) for block in model.model.layers for name in ALL]
    names, checksum = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    fw.attach(model, [0, 1], fw.Hebbian(rate=0.5), ("gate_proj", "down_proj"))
    fw.attach(model, [1], fw.GradientAscent(rate=0.5), "up_proj")
    assert list(model.state_dict()) == names
    fw.Episode(model).feed(prompt(1, 9))
    fw.detach(model)
    after = [getattr(block.mlp, name) for block in model.model.layers for name in ALL]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert all(torch.equal(value, checksum[key]) for key, value in model.state_dict().items())


def test_outside_an_episode_a_plastic_model_is_the_frozen_one():
    model, ids = tiny(), prompt(1, 9)
    frozen = model(ids)
    fw.attach(model, [0, 1], fw.Hebbian(rate=0.5))
    fw.Episode(model).feed(ids)
    assert torch.equal(model(ids), frozen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [4]}, "layer 4 does not exist: this model has layers 0 to 3"),
        ({"layers": [-5]}, "layer -5 does not exist"),
        ({"layers": ["1"]}, "layer '1' does not exist"),
        ({"layers": []}, "names no linear"),
        ({"linears": ["q_proj"]}, "linear 'q_proj' does not exist: an MLP has gate_proj, up_proj, down_proj"),
        ({"rule": "hebbian"}, "rule='hebbian' is not a rule"),
        ({"rule": fw.Hebbian}, "is not a rule"),
        ({"rank": 0}, "rank=0: expected a whole number"),
        ({"overflow": "forget"}, "overflow='forget': expected one of"),
        ({"backend": "numpy"}, "backend='numpy': expected"),
        ({"rule": fw.Delta(0.1, torch.zeros(7))}, r"has shape \[7\], but layers.0.mlp.down_proj needs a last"),
    ],
)
def test_attach_refuses_by_name_and_changes_nothing(arguments, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        fw.attach(model, **{"layers": [0], "rule": fw.Hebbian(), **arguments})
    assert not any(isinstance(module, PlasticLinear) for module in model.modules())


@pytest.fixture
def fused_gate(monkeypatch):
    """A gate whose φ no kernel knows."""
    phi = {"gate_proj": "silu|identity", "up_proj": "identity", "down_proj": "identity"}
    monkeypatch.setattr(LlamaConfig, "phi", property(lambda self: phi))


def test_a_linear_whose_activation_no_kernel_knows_runs_on_torch_and_says_so(fused_gate, monkeypatch):
    addresses = [(1, "gate_proj"), (1, "up_proj"), (3, "gate_proj")]
    with pytest.warns(
        UserWarning, match=r"activation 'silu\|identity' of gate_proj has no Triton twin: it runs on torch"
    ):
        chosen = _backends("auto", "triton", tiny(), addresses)
    assert chosen == dict(zip(addresses, ("torch", "triton", "torch"), strict=True))
    assert set(_backends("auto", "torch", tiny(), addresses).values()) == {"torch"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = tiny(torch.float32)
    with pytest.raises(ValueError, match=r"'silu\|identity' of gate_proj has no Triton twin, use 'torch'"):
        fw.attach(model, [1], fw.Hebbian(), backend="triton")
    assert not plastic_linears(model)


@pytest.mark.parametrize("gate", ["ones", "positive", "derivative"])
@pytest.mark.parametrize("target", ["self", "slow"])
def test_a_prompt_by_an_activation_that_no_kernel_knows_is_its_tokens_one_by_one(fused_gate, gate, target):
    ids, found = prompt(2, 12), []
    for width in (12, 1):
        model = tiny(torch.float32)
        fast = fw.attach(model, [1], fw.LocalLeastSquares(0.3, gate=gate, target=target), ["gate_proj"])
        episode = fw.Episode(model, 2)
        logits = [episode.feed(ids[:, t : t + width]) for t in range(0, 12, width)]
        found.append((torch.cat(logits, dim=1), fast.delta_weight(1, "gate_proj", row=1)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_attach_twice_to_one_linear_is_refused_and_the_second_changes_nothing():
    model = tiny()
    fw.attach(model, [1], fw.Hebbian(), ["up_proj"])
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj is already plastic"):
        fw.attach(model, [0, 1], fw.Hebbian(), ["up_proj"])
    assert not isinstance(model.model.layers[0].mlp.up_proj, PlasticLinear)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fw.Hebbian(rate=float("nan")), r"Hebbian\(rate=nan\): expected a finite number"),
        (lambda: fw.Hebbian(rate="0.1"), r"Hebbian\(rate='0.1'\): expected a finite number"),
        (lambda: fw.Hebbian(mu=-1.0), r"Hebbian\(mu=-1.0\): expected a number >= 0"),
        (lambda: fw.Hebbian(decay=1.5), r"Hebbian\(decay=1.5\): expected a number from 0 to 1"),
        (lambda: fw.Hebbian(clip=0.0), r"Hebbian\(clip=0.0\): expected a number > 0"),
        (lambda: fw.Hebbian(gate="relu"), r"Hebbian\(gate='relu'\): expected one of"),
        (lambda: fw.LocalLeastSquares(target="fast"), r"LocalLeastSquares\(target='fast'\): expected one of"),
        (lambda: fw.LocalLeastSquares(gamma=float("inf")), r"LocalLeastSquares\(gamma=inf\)"),
        (lambda: fw.Delta(0.1, target=[1.0]), r"Delta\(target=list\): expected a tensor"),
    ],
)
def test_rules_refuse_what_makes_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_delta_weight_of_a_row_that_is_not_there_is_refused():
    model = tiny()
    fast = fw.attach(model, [1], fw.Hebbian())
    episode = fw.Episode(model, 2)
    for row in (2, -1):
        with pytest.raises(ValueError, match=rf"row {row} of layers.1.mlp.up_proj does not exist: there are 2"):
            fast.delta_weight(1, "up_proj", row=row)
    with pytest.raises(ValueError, match=r"fork\(rows=0\): expected a list"):
        episode.fork(rows=0)
    with pytest.raises(ValueError, match=r"restore\(\) got a int, expected what episode.snapshot"):
        episode.restore(5)


def test_delta_weight_of_a_linear_that_is_not_plastic_lists_what_is():
    model = tiny()
    fast = fw.attach(model, [1], fw.Hebbian(), ["up_proj"])
    with pytest.raises(ValueError, match="layer 2 'up_proj' is not plastic here; plastic are 1 up_proj"):
        fast.delta_weight(2, "up_proj")
    with pytest.raises(ValueError, match="no episode of this model is alive"):
        fast.delta_weight(1, "up_proj")
