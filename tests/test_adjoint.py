"""The adjoint of the scan, in torch, in C and by Triton, against a loop over tokens in float64 written here.

Without a GPU the Triton kernels run in Triton's interpreter, in a process of its own, as in test_kernels.
"""

import os
import warnings

import pytest
import torch
import triton.language as tl  # noqa: F401  the interpreter looks for it in the module of every kernel
from interpreted import nan_filled_outputs, run_interpreted  # noqa: F401

from fastweights.kernels import adjoint, cpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
WAYS = ["torch", "c", "float64"] + (["triton"] if INTERPRETED or ON_GPU else [])
SHAPES = [(1, 1, 5), (2, 7, 48), (1, 35, 70), (1, 128, 33), (2, 131, 17), (1, 300, 18)]  # B, T, O
NAN = float("nan")

warnings.filterwarnings("ignore", module="triton.runtime.interpreter")


def way(name, monkeypatch):
    """The backend, dtype and device of one way; any other way would fail."""
    if name == "c" and (cpu.library() is None or not hasattr(cpu.library(), "adjoint_block")):
        pytest.skip("the C library has no adjoint on this processor")
    if name == "torch":
        monkeypatch.setattr(adjoint, "c_library_for", lambda *tensors: None)
    if name != "triton":
        monkeypatch.setattr(adjoint, "launch_", None)
    if name == "c":
        monkeypatch.setattr(adjoint, "_solve", None)
    dtype = torch.float64 if name == "float64" else torch.float32
    return "triton" if name == "triton" else "torch", {"dtype": dtype, "device": DEVICE if name == "triton" else "cpu"}


def example(B, T, O):
    """c, d, slope and G in float64: a fifth of the tokens is not written, and above its diagonal G is NaN."""
    make = torch.Generator().manual_seed(B + T + O)
    c, d, slope = (torch.randn(B, T, O, generator=make, dtype=torch.float64) for _ in range(3))
    G = torch.randn(B, T, T, generator=make, dtype=torch.float64) / T**0.5
    G = G.masked_fill(torch.rand(B, 1, T, generator=make) < 0.2, 0)
    above = torch.ones(T, T, dtype=torch.bool).triu()
    return c, d, slope, G.masked_fill(above, NAN)


def token_by_token(c, d, slope, G):
    above, b = torch.zeros_like(c), torch.zeros_like(c)
    for t in reversed(range(c.shape[1])):
        b[:, t] = d[:, t] + torch.einsum("br,bro->bo", G[:, t + 1 :, t], above[:, t + 1 :])
        above[:, t] = c[:, t] + slope[:, t] * b[:, t]
    return above, b


def check(name, found, wanted):
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        error = (x.double().cpu() - y).abs().max() / y.abs().max().clamp(min=1)
        assert error < (1e-13 if name == "float64" else 1e-5)  # a NaN is not below it


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_is_the_loop_over_tokens(shape, name, monkeypatch):
    backend, to = way(name, monkeypatch)
    given = example(*shape)
    check(name, adjoint.adjoint(*(x.to(**to) for x in given), backend), token_by_token(*given))


@pytest.mark.parametrize("name", WAYS)
def test_strides_are_free_and_what_nothing_comes_from_may_be_none(name, monkeypatch):
    backend, to = way(name, monkeypatch)
    c, d, slope, G = example(2, 37, 33)
    c, zero = c[..., :1].expand_as(c), torch.zeros_like(c)  # what the gradient of a sum looks like
    mine = (c.to(**to), d.mT.contiguous().mT.to(**to), slope.to(**to), G.mT.contiguous().to(**to).mT)
    check(name, adjoint.adjoint(*mine, backend), token_by_token(c, d, slope, G))
    check(name, adjoint.adjoint(None, *mine[1:], backend), token_by_token(zero, d, slope, G))
    check(name, adjoint.adjoint(mine[0], None, *mine[2:], backend), token_by_token(c, zero, slope, G))


@pytest.mark.parametrize("name", WAYS)
def test_what_is_given_stays_as_it_is(name, monkeypatch):
    backend, to = way(name, monkeypatch)
    given = [x.to(**to) for x in example(1, 40, 32)]
    before = [x.clone() for x in given]
    adjoint.adjoint(*given, backend)
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 130, 60), (1, 300, 33)])
def test_the_gradient_of_G_is_a_product_below_its_diagonal(shape):
    above, u, *_ = example(*shape)
    wanted = torch.einsum("bto,bso->bts", above, u).tril(-1)
    check("float64", [adjoint.products_below(above.to(DEVICE), u.to(DEVICE))], [wanted])
    check("torch", [adjoint.products_below(above.to(DEVICE).float(), u.to(DEVICE).float())], [wanted])


def test_threads_give_the_same_bits():
    given, threads = [x.float() for x in example(1, 200, 300)], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = adjoint.adjoint(*given)
        torch.set_num_threads(3)
        assert all(map(torch.equal, one, adjoint.adjoint(*given)))
    finally:
        torch.set_num_threads(threads)


def test_a_backend_that_there_is_not_and_float64_by_triton_are_refused():
    given = example(1, 4, 8)
    with pytest.raises(ValueError, match='got backend \'cuda\', expected "torch" or "triton"'):
        adjoint.adjoint(*given, "cuda")
    with pytest.raises(ValueError, match="computes in float32, but got float64"):
        adjoint.adjoint(*given, "triton")


VALUES = {
    "hebbian": lambda a, rate: rate * a * a.sigmoid(),
    "no look at a": lambda a, rate: rate * torch.ones_like(a),
    "delta": lambda a, rate: rate * (0.3 - a),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize(("B", "T", "width"), [(2, 5, 1), (1, 37, 1), (1, 8, 2)])
def test_gradients_of_the_scan_are_its_central_differences(B, T, width, value):
    """In a, h, keys, bias, rate and decay, with tokens that are not written."""
    make = torch.Generator().manual_seed(T)
    a, h, k, bias = (0.5 * torch.randn(B, T, *n, generator=make, dtype=torch.float64) for n in ((2,), (3,), (3,), ()))
    rate, decay = (torch.tensor(x, dtype=torch.float64) for x in ([0.4, -0.3], 0.1))
    write = torch.rand(B, T, generator=make) < 0.7

    def run(a, h, k, bias, rate, decay):
        G = adjoint.gram(h, k, bias, write, decay, width)
        return adjoint.scan_with_graph(a, G, h, write, lambda a, t0, t1: value(a, rate), None, "torch")

    given = [x.requires_grad_() for x in (a, h, k, bias, rate, decay)]
    assert torch.autograd.gradcheck(run, given, fast_mode=T > 10)


if not INTERPRETED and not ON_GPU:

    def test_triton_interpreted():
        run_interpreted(__file__, "-k", "triton")
