"""Attention in C for causal passes of many queries, against a softmax written out in float64."""

import pytest
import torch

from fastweights.kernels import attention as module
from fastweights.kernels.attention import attention


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def slow(q, k, v, start):
    """z [B, T, H, E], query by query."""
    B, H, T, E = q.shape
    z = torch.empty(B, T, H, E, dtype=torch.float64)
    for h in range(H):
        K, V = (x[:, h // (H // k.shape[1])].double() for x in (k, v))
        for t in range(T):
            seen = start + t + 1
            score = (K[:, :seen] @ q[:, h, t].double()[..., None])[..., 0] / E**0.5
            z[:, t, h] = (score.softmax(-1)[:, None] @ V[:, :seen])[:, 0]
    return z


def case(B, H, KH, T, start, E, slots=3):
    """Queries as a projection lays them out, keys and values as a cache with room does."""
    q = torch.randn(B, T, H, E).transpose(1, 2)
    k, v = (torch.randn(B, KH, start + T + slots, E)[:, :, : start + T] for _ in range(2))
    return q, k, v


SHAPES = [(1, 9, 3, 45, 0, 64), (2, 4, 2, 8, 0, 16), (1, 2, 2, 48, 17, 64), (1, 3, 1, 49, 0, 8), (3, 2, 1, 130, 0, 20)]
SHAPES += [
    (1, 4, 4, 100, 1, 128),
    (2, 2, 1, 9, 200, 32),
    (1, 1, 1, 64, 64, 11),
    (1, 2, 1, 200, 0, 64),
    (1, 3, 3, 8, 56, 9),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention_is_the_softmax_written_out(shape):
    q, k, v = case(*shape)
    exact = slow(q, k, v, shape[4])
    visible = torch.ones(shape[3], shape[4] + shape[3], dtype=torch.bool).tril(shape[4])[None, None]
    for mask in (visible, *([None] if shape[4] == 0 else [])):
        z = attention(q, k, v, mask, shape[4])
        assert float((z - exact).abs().max()) < 2e-6
    for start, mask in ((None, visible), (shape[4], visible)):
        twice = attention(q.double(), k.double(), v.double(), mask, start)
        assert float((twice - exact).abs().max()) < 1e-13


def test_scores_of_hundreds_neither_overflow_nor_lose_the_largest():
    q, k, v = case(1, 2, 1, 100, 0, 64)
    q *= 300
    assert float((attention(q, k, v, None, 0) - slow(q, k, v, 0)).abs().max()) < 1e-4


def test_a_row_does_not_depend_on_the_rows_and_queries_beside_it():
    q, k, v = case(3, 4, 2, 60, 0, 64)
    together = attention(q, k, v, None, 0)
    for row in range(3):
        alone = attention(q[row : row + 1], k[row : row + 1], v[row : row + 1], None, 0)
        assert torch.equal(alone[0], together[row])
    first = attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], None, 0)
    assert float((first - together[:, :20]).abs().max()) < 1e-6


def test_a_key_that_is_not_finite_is_seen_by_every_query_that_sees_it():
    q, k, v = case(1, 2, 1, 100, 0, 64)
    k[0, 0, 70, 3] = float("nan")
    z = attention(q, k, v, None, 0)
    assert z[0, 70:].isnan().all()
    assert not z[0, :70].isnan().any()


def test_gradients_and_masks_go_to_torch(monkeypatch):
    q, k, v = case(1, 2, 1, 20, 0, 64)
    exact, seen = slow(q, k, v, 0), []
    monkeypatch.setattr(module, "_torch", lambda *given, original=module._torch: seen.append(1) or original(*given))
    q.requires_grad_()
    z = attention(q, k, v, None, 0)
    z.sum().backward()
    assert q.grad.isfinite().all()
    q = q.detach()
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(attention(q, k, v, mask, None).double(), exact, rtol=0, atol=1e-5)
    assert len(seen) == 2
    attention(q, k, v, None, 0)
    helper = module.c_library_for(q)
    assert len(seen) == (2 if hasattr(helper, "attention") else 3)


def test_without_a_mask_the_last_query_sees_everything():
    q, k, v = case(1, 4, 2, 5, 7, 16)
    assert float((attention(q.double(), k.double(), v.double(), None, 7) - slow(q, k, v, 7)).abs().max()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(2, 6, 2, 5, 7, 16), (2, 6, 2, 5, 0, 16), (2, 4, 4, 5, 3, 10), (3, 6, 1, 1, 6, 8)])
def test_the_forms_for_a_gpu_give_the_same(shape, masked, dtype, monkeypatch):
    T, start = shape[3:5]
    q, k, v = case(*shape)
    exact = slow(q, k, v, start)
    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(module, "c_library_for", lambda *tensors: None)
    visible = torch.ones(T, start + T, dtype=torch.bool).tril(start)[None, None] if masked else None
    z = attention(q.to(dtype), k.to(dtype), v.to(dtype), visible, None if masked else start)
    assert z.shape == exact.shape
    assert float((z - exact).abs().max()) < (2e-6 if dtype == torch.float32 else 1e-13)


def test_flash_attention_is_asked_for_tokens_after_others_and_never_given_a_mask(monkeypatch):
    seen = []

    def flash(q, k, v, scale):
        assert scale == 0.25  # 1 / √16
        seen.append(q.shape[2])
        return slow(q, k, v, k.shape[2] - q.shape[2]).transpose(1, 2)

    monkeypatch.setattr(module, "on_gpu", lambda x: True)
    monkeypatch.setattr(module, "c_library_for", lambda *tensors: None)
    monkeypatch.setattr(module, "can_use_flash_attention", lambda params: True)
    monkeypatch.setattr(module, "_flash", flash)
    for start, T in ((7, 5), (0, 5), (7, 1)):
        q, k, v = case(2, 6, 2, T, start, 16)
        visible = torch.ones(T, start + T, dtype=torch.bool).tril(start)[None, None]
        exact = slow(q, k, v, start)
        for mask in (visible, None) if start and T > 1 else (None,):
            torch.testing.assert_close(attention(q, k, v, mask, start).double(), exact, rtol=0, atol=2e-6)
        torch.testing.assert_close(attention(q, k, v, visible, None).double(), exact, rtol=0, atol=2e-6)
    assert seen == [5, 5]
    q, k, v = case(1, 2, 2, 5, 7, 12)  # heads of 12: the kernel wants multiples of 8
    attention(q, k, v, None, 7)
    monkeypatch.setattr(torch.version, "hip", "7")
    q, k, v = case(1, 2, 2, 5, 7, 16)
    attention(q, k, v, None, 7)
    assert seen == [5, 5]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize(
    "shape", [(2, 8, 2, 45, 0, 64), (2, 8, 2, 45, 300, 64), (1, 4, 4, 5, 77, 128), (1, 9, 3, 1, 60, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention_on_a_gpu(shape, dtype):
    T, start = shape[3:5]
    q, k, v = (x.to("cuda", dtype) for x in case(*shape))
    exact = slow(q.cpu(), k.cpu(), v.cpu(), start)
    visible = torch.ones(T, start + T, dtype=torch.bool, device="cuda").tril(start)[None, None]
    for mask, where in ((visible, start), (None, start), (visible, None)):
        z = attention(q, k, v, mask, where)
        assert float((z.double().cpu() - exact).abs().max()) < (2e-3 if dtype == torch.float16 else 2e-5)
