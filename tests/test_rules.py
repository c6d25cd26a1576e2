"""The rules as functions: key and value put together, and the form in which kernels know them."""

from dataclasses import replace

import pytest
import torch

import fastweights as fw
from fastweights import rules
from fastweights.activations import PHI, SILU
from fastweights.rules import Local, event, event_value, key_of, twin_event, twin_of, value_of

F64 = torch.float64
RULES = {
    "hebbian": fw.Hebbian(rate=0.3, mu=0.1, gate="derivative", clip=0.05, bias=True),
    "positive": fw.Hebbian(rate=(0.2, 0.7, 0.4), mu=None, gate="positive"),
    "self": fw.LocalLeastSquares(gamma=0.4, mu=0.2, gate="positive", rate=0.7),
    "slow": fw.LocalLeastSquares(gamma=0.4, mu=0.05, target="slow", gate="derivative", rate=(0.3, 0.1, 0.9)),
    "delta": fw.Delta(beta=0.6, target=torch.linspace(-1, 1, 7, dtype=F64), clip=0.2),
}


def case(rows=3, O=7, I=5):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, size, generator=g, dtype=F64) for size in (O, O, I)]


@pytest.mark.parametrize("mu", [None, 0.0, 0.3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_event_is_the_definition_written_out(mu, clip):
    rule = fw.Hebbian(rate=0.3, mu=mu, clip=clip, bias=True)
    value, _, h = case()
    made = event(rule, h, value)
    for row in range(3):
        scale = 1.0 if mu is None else 1 / (float(h[row] @ h[row]) + mu)
        k, u = h[row] * scale, 0.3 * value[row]
        if clip is not None:
            u = torch.stack([x * min(1.0, clip / float(x.abs() * k.norm())) for x in u])
        torch.testing.assert_close(made.k[row], k, rtol=1e-14, atol=0)
        torch.testing.assert_close(made.u[row], u, rtol=1e-14, atol=0)
        torch.testing.assert_close(made.bias[row], torch.tensor(scale, dtype=F64), rtol=1e-14, atol=0)
    assert event(replace(rule, bias=False), h, value).bias is None


def test_an_event_of_tokens_of_rows_takes_each_rows_rate():
    rule, h, value = fw.Hebbian(rate=(0.1, 0.4), mu=0.2), torch.randn(2, 4, 5), torch.randn(2, 4, 7)
    made = event(rule, h, value)
    torch.testing.assert_close(made.u, torch.tensor([0.1, 0.4])[:, None, None] * value)
    row = torch.tensor([[1, 0, 1, 0]])  # rows that share one ΔW stand side by side
    beside = event(rule, h[:1], value[:1], row)
    torch.testing.assert_close(beside.u[0], torch.tensor([0.4, 0.1, 0.4, 0.1])[:, None] * value[0])


def test_an_input_of_zeros_without_mu_is_no_finite_event_and_with_mu_a_zero_key():
    h, value = torch.zeros(1, 5), torch.ones(1, 7)
    assert event(fw.Hebbian(mu=0.0), h, value).k.isnan().all()
    made = event(fw.Hebbian(mu=0.1, clip=0.5, rate=1.0), h, value)
    assert not made.k.any()
    assert torch.equal(made.u, value)


@pytest.mark.parametrize("activation", PHI.values(), ids=PHI)
@pytest.mark.parametrize("name", RULES)
def test_the_form_that_kernels_know_is_the_rule_itself(name, activation):
    rule, (a, frozen, h) = RULES[name], case()
    norm = key_of(rule, h.square().sum(-1)).norm
    at = Local(frozen, activation, torch.zeros(3, dtype=torch.int64))
    wanted = event_value(rule, value_of(rule, a, activation, at), norm)
    twin, target = twin_of(rule), getattr(rule, "target", None)
    numbers = (torch.tensor(x, dtype=F64) for x in (twin.rate, twin.gamma))
    found = twin_event(twin.name, activation, rule.clip, a, frozen, norm, *numbers, target)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-15)


def test_a_name_without_an_event_in_torch_is_refused():
    one = torch.ones(1, 2)
    with pytest.raises(ValueError, match="rule 'mine' has no event in torch; there are delta, ones, positive"):
        twin_event("mine", SILU, None, one, one, one[:, 0], one[0, 0], one[0, 0], None)


def test_rules_without_kernels_have_no_twin():
    assert twin_of(fw.GradientAscent(rate=0.1)) is None
    assert twin_of(fw.Hebbian(rate=0.2)) == rules.Twin("ones", 0.2, 1.0)
