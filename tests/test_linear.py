"""The C helper for a few rows on a CPU: torch's product, and a warning where it cannot be built."""

import warnings

import pytest
import torch
from torch.autograd import forward_ad

from fastweights.kernels import cpu
from fastweights.kernels import linear as linear_file
from fastweights.kernels.linear import add_product_, c_library_for, linear, product


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """And the products of many rows in C, also where the processor has faster ones."""
    torch.manual_seed(0)
    monkeypatch.setattr(linear_file, "mkl_uses_avx512", lambda: False)


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 3), (8,), (9,), (2, 40)])
@pytest.mark.parametrize(("O", "I"), [(257, 300), (1536, 576), (3, 5)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_few_rows_equal_the_float64_product(rows, O, I, has_bias):
    generator = torch.Generator().manual_seed(0)
    h, W, b = (torch.randn(*size, generator=generator) for size in ((*rows, I), (O, I), (O,)))
    exact = h.double() @ W.double().T + (b.double() if has_bias else 0)
    found = linear(h, W, b if has_bias else None)
    assert found.shape == (*rows, O)
    assert float((found - exact).norm() / exact.norm()) < 4e-7


@pytest.mark.parametrize("rows", [(1,), (2, 3), (8,)])
@pytest.mark.parametrize(("O", "I"), [(257, 300), (1536, 576)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bfloat16_is_the_float64_product_rounded_once(rows, O, I, has_bias):
    h, W, b = (torch.randn(*size).bfloat16() for size in ((*rows, I), (O, I), (O,)))
    exact = h.double() @ W.double().T + (b.double() if has_bias else 0)
    found = linear(h, W, b if has_bias else None)
    assert found.dtype == torch.bfloat16
    step = 2.0 ** (exact.abs().log2().floor() - 7)  # between neighbours of bfloat16
    assert bool(((found.double() - exact).abs() <= 0.5 * step + 1e-5 * h.double().norm()).all())
    assert float((found == exact.bfloat16()).double().mean()) > 0.99


def test_bfloat16_nan_and_infinity_come_through():
    W, h = torch.ones(300, 300).bfloat16(), torch.ones(1, 300).bfloat16()
    W[7, 3], W[8, 299] = float("nan"), float("inf")
    y = linear(h, W, None)[0]
    assert y[7].isnan()
    assert y[8].isinf()
    assert y[0] == 300


def test_the_helper_is_built_where_there_is_a_compiler_and_takes_views():
    assert cpu.library() is not None
    W, h = torch.randn(300, 300), torch.randn(300, 2)
    torch.testing.assert_close(linear(h.T[:1], W, None), h.T[:1] @ W.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(linear(h[:, 0], W.T, None), h[:, 0] @ W, rtol=0, atol=1e-4)


def test_nan_and_infinity_come_through():
    W, h = torch.ones(300, 300), torch.ones(1, 300)
    W[7, 3], W[8, 4] = float("nan"), float("inf")
    y = linear(h, W, None)[0]
    assert y[7].isnan()
    assert y[8].isinf()
    assert y[[0, 299]].tolist() == [300.0, 300.0]


@pytest.mark.parametrize("rows", [1, 40])
def test_gradients_go_through_torch(rows):
    W, h, b = torch.randn(300, 300), torch.randn(rows, 300), torch.zeros(300)
    for asked in (W, h, b):
        asked.requires_grad_()
        linear(h, W, b).square().sum().backward()
        y = h.detach() @ W.detach().T
        wanted = {id(W): 2 * y.T @ h.detach(), id(h): 2 * y @ W.detach(), id(b): 2 * y.sum(0)}[id(asked)]
        torch.testing.assert_close(asked.grad, wanted, rtol=1e-4, atol=1e-2)
        asked.requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 40])
def test_function_transforms_and_forward_mode_see_the_product(rows):
    W, h, t = torch.randn(300, 300), torch.randn(rows, 300), torch.randn(rows, 300)
    torch.testing.assert_close(torch.func.jvp(lambda x: linear(x, W, None), (h,), (t,))[1], t @ W.T)
    torch.testing.assert_close(torch.func.grad(lambda x: linear(x, W, None).sum())(h)[0], W.sum(0))
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(h, t), W, None)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, t @ W.T)


# torch's own products, where there is no AVX-512, round more
ROUNDING = 4e-7 if hasattr(cpu.library(), "product_rows") else 1e-6
SHAPES = [(1, 300, 257), (24, 24, 2000), (9, 1000, 130), (45, 1536, 576), (128, 1536, 384), (61, 257, 300)]
SHAPES += [(48, 48, 512), (49, 49, 512), (47, 50, 512), (97, 71, 513), (200, 9, 700), (16, 575, 129), (5, 7, 3)]


@pytest.mark.parametrize(("rows", "O", "I"), SHAPES)
def test_a_product_of_any_shape_and_strides_rounds_no_more_than_its_blocks_do(rows, O, I):
    x = torch.randn(rows, I)
    for W in (torch.randn(O, I), torch.randn(I, O).T, torch.randn(O, 2 * I)[:, ::2], torch.randn(I, O + 3)[:, 3:].T):
        for h in (x, torch.randn(I, rows).T, torch.randn(rows, I + 5)[:, 5:]):
            exact = h.double() @ W.double().T
            assert float((product(h, W) - exact).norm() / exact.norm()) < ROUNDING
        twice = product(x.double(), W.double())
        torch.testing.assert_close(twice, x.double() @ W.double().T, rtol=0, atol=1e-11)
    b = torch.randn(O)
    exact = x.double() @ W.double().T + b
    assert float((linear(x[None], W.contiguous(), b)[0] - exact).norm() / exact.norm()) < ROUNDING


@pytest.mark.parametrize(("rows", "O", "I"), SHAPES)
def test_a_product_is_added_in_place_and_nowhere_else(rows, O, I):
    around, x, W = torch.full((rows + 2, O + 7), 3.0), torch.randn(rows, I), torch.randn(I, O)
    add_product_(around[1:-1, 4:-3], x, W)
    exact = 3 + x.double() @ W.double()
    assert float((around[1:-1, 4:-3] - exact).norm() / exact.norm()) < 2 * ROUNDING
    around[1:-1, 4:-3] = 3
    assert torch.equal(around, torch.full_like(around, 3))


@pytest.mark.parametrize("rows", [1, 40])
def test_a_wrong_width_is_torchs_error_not_a_look_past_the_end(rows):
    h, W = torch.randn(rows, 600), torch.randn(300, 300)
    for call in (lambda: linear(h, W, None), lambda: product(h, W)):
        with pytest.raises(RuntimeError, match=r"cannot be multiplied|size mismatch"):
            call()
    assert c_library_for(h, W) is not None
    assert c_library_for(h, W.to("meta")) is None


def test_nan_and_infinity_come_through_many_rows():
    W, h = torch.ones(300, 300), torch.ones(40, 300)
    W[7, 3], W[8, 4], h[5, 0] = float("nan"), float("inf"), float("nan")
    y = linear(h, W, None)
    assert y[:, 7].isnan().all()
    assert y[torch.arange(40) != 5, 8].isinf().all()
    assert y[5].isnan().all()
    assert y[4, 0] == 300


@pytest.fixture
def fresh_helper():
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


def test_without_a_compiler_a_warning_says_so_and_torch_computes(fresh_helper, monkeypatch):
    monkeypatch.setenv("FASTWEIGHTS_CC", "no-such-compiler")
    W, h = torch.randn(300, 300), torch.randn(1, 300)
    with pytest.warns(UserWarning, match="no C helper, .*there is no compiler 'no-such-compiler'"):
        y = linear(h, W, None)
    torch.testing.assert_close(y, h @ W.T, rtol=0, atol=1e-4)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(fresh_helper, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTWEIGHTS_CACHE", str(tmp_path))
    monkeypatch.setattr(cpu, "FLAGS", ("-no-such-flag",))
    with pytest.warns(UserWarning, match="no C helper, .*no-such-flag"):
        linear(torch.randn(1, 300), torch.randn(300, 300), None)
    assert list(tmp_path.iterdir()) == []


def test_the_helper_can_be_declined_in_silence(fresh_helper, monkeypatch):
    monkeypatch.setenv("FASTWEIGHTS_CC", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.library() is None
