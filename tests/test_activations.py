"""φ and its derivative in torch: the definition that the kernels are held against in test_kernels."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from fastweights.activations import GELU_TANH, IDENTITY, PHI, SILU, halves

EXACT = {
    "identity": lambda a: a,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_derivative_is_autograds(name):
    a = torch.cat((torch.linspace(-40, 40, 4001), torch.tensor([1e-9, -1e-9, 700.0, -700.0]))).double()
    z = EXACT[name](a.requires_grad_())
    assert torch.equal(PHI[name](a), z)
    slope = torch.autograd.grad(z.sum(), a)[0]
    torch.testing.assert_close(PHI[name].derivative(a.detach()), slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_of_float32_a_derivative_is_exact_to_rounding_finite_everywhere_and_nan_where_a_is(name):
    a = torch.linspace(-20, 20, 4001)
    exact = PHI[name].derivative(a.double())
    torch.testing.assert_close(PHI[name].derivative(a).double(), exact, rtol=0, atol=1e-6)
    ends = PHI[name].derivative(torch.tensor([3e38, -3e38]))
    assert ends.tolist() == pytest.approx([1.0, 1.0 if name == "identity" else 0.0], abs=1e-20)
    assert PHI[name](torch.tensor([float("nan")])).isnan().all()


def test_halves_are_two_activations_side_by_side():
    phi, a = halves(SILU, IDENTITY), torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    assert phi.name == "silu|identity"
    assert torch.equal(phi(a), torch.cat((F.silu(a[..., :4]), a[..., 4:]), dim=-1))
    slope = torch.autograd.grad(phi(a).sum(), a)[0]
    torch.testing.assert_close(phi.derivative(a.detach()), slope, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="unflatten"):
        phi(torch.ones(3, 7))


def test_an_activation_is_one_object_copied_and_pickled_as_well():
    for phi in (*PHI.values(), halves(SILU, IDENTITY), halves(IDENTITY, GELU_TANH)):
        assert copy.deepcopy(phi) is pickle.loads(pickle.dumps(phi)) is phi
    assert halves(SILU, IDENTITY) is not halves(IDENTITY, SILU)
