"""The test device refuses what CUDA refuses, takes what it takes, and counts what the host waits for."""

import copy

import pytest
import torch
from other_device import OTHER, OtherTensor, counting, moved
from torch import nn

X = torch.arange(12.0).reshape(3, 4)
INDEX = torch.tensor([2, 0])


def there():
    return X.to("other")


def put(target, index, value):
    target = target.clone()
    target[index] = value
    return target


MIXED = {
    "sum": lambda: there() + X,
    "CPU tensor and a number of the device": lambda: X + there()[0, 0],
    "in place": lambda: X.clone().add_(there()),
    "a number of the CPU changed in place": lambda: torch.tensor(1.0).add_(there()[0, 0]),
    "product": lambda: there() @ X.T,
    "product with a number": lambda: torch.dot(there()[0], X[0]),
    "cat": lambda: torch.cat([there(), X]),
    "stack": lambda: torch.stack([X, there()]),
    "where": lambda: torch.where(there() > 3, X, there()),
    "mask": lambda: there().masked_fill(X > 3, 0.0),
    "gather": lambda: there().gather(0, INDEX[None].expand(1, 2)),
    "index_select": lambda: there().index_select(0, INDEX),
    "embedding": lambda: torch.embedding(there(), INDEX),
    "isin": lambda: torch.isin(there(), X),
    "CPU tensor by indices of the device": lambda: X[INDEX.to("other")],
    "values of the CPU put by indices": lambda: put(there(), INDEX, X[:2]),
    "values of the device put into the CPU": lambda: put(X, INDEX, there()[:2]),
    "equal": lambda: torch.equal(there(), X),
    "linear": lambda: nn.functional.linear(there(), X),
}


@pytest.mark.parametrize("name", MIXED)
def test_it_refuses_tensors_of_both_devices(name):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXED[name]()


TAKEN = {
    "number of the CPU": (lambda x: x * torch.tensor(2.0), 0),
    "number of the CPU in front": (lambda x: torch.tensor(2.0) - x, 0),
    "number of the CPU under a mask": (lambda x: torch.where(x > 3, torch.tensor(1.0), x), 0),
    "CPU indices": (lambda x: x[INDEX], 1),
    "CPU indices put": (lambda x: put(x, INDEX, torch.tensor(9.0)), 1),
    "copy_": (lambda x: torch.zeros_like(x).copy_(X), 1),
    "slice from the CPU": (lambda x: put(x, slice(0, 1), X[1:2]), 1),
    "list": (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device), 1),
    "factories": (lambda x: x + torch.arange(4.0, device=x.device) + x.new_ones(1), 0),
    "factories of two sizes": (lambda x: x + torch.eye(3, 4, device=x.device), 0),
    "in place": (lambda x: x.clone().mul_(2).clamp_(min=3), 0),
    "views": (lambda x: put(x.view(4, 3).T.unflatten(0, (3, 1)).flatten(0, 1), 0, 7.0), 0),
    "sorted": (lambda x: x.topk(2).values @ x.sort(descending=True).values[:2, :2], 0),
    "attention": (lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_it_takes_what_cuda_takes_and_counts_uploads(name):
    run, uploads = TAKEN[name]
    x = there()
    with counting() as seen:
        found = run(x)
    assert found.device == OTHER
    torch.testing.assert_close(found.cpu(), run(X), rtol=1e-6, atol=0)
    assert seen.looks == []
    assert len(seen.uploads) == uploads


LOOKS = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 3).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu().sum().item(),
    "to": lambda x: x.to("cpu", torch.float64)[0, 1].item(),
    "copy into the CPU": lambda x: torch.zeros(3, 4).copy_(x)[0, 1].item(),
    "nonzero": lambda x: x.nonzero().shape[0],
    "mask as index": lambda x: x[x > 3].shape[0],
    "number as index": lambda x: INDEX.to(x.device)[0].__index__(),
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("name", LOOKS)
def test_it_counts_a_look_of_the_host(name):
    x = there()
    with counting() as seen:
        found = LOOKS[name](x)
    assert found == LOOKS[name](X)
    assert len(seen.looks) == 1


def test_numpy_and_generators_are_refused_and_addresses_are_none():
    x = there()
    for refused in (x.numpy, lambda: torch.Tensor.__array__(x)):
        with pytest.raises(TypeError, match="can't convert other:0 device type tensor to numpy"):
            refused()
    with pytest.raises(RuntimeError, match="Expected a 'other' device type for generator but found 'cpu'"):
        torch.rand(3, device="other", generator=torch.Generator())
    assert not x.is_cpu
    assert not x.is_cuda
    assert x.data_ptr() == x[:].data_ptr() != x.clone().data_ptr()
    assert x.data_ptr() != x.raw.data_ptr()


def test_gradients_are_those_of_the_cpu():
    def gradient(x):
        w = x.clone().requires_grad_()
        y = nn.functional.silu(w @ w.T)[:, :2].log_softmax(-1) * w[:, 1:2]
        return torch.autograd.grad(y.sum(), w)[0]

    found = gradient(X.double().to("other"))
    assert found.device == OTHER
    torch.testing.assert_close(found.cpu(), gradient(X.double()), rtol=1e-12, atol=1e-12)


def test_a_module_moves_there_and_back_with_the_same_parameters():
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    second.weight = first.weight
    both, weight, kept = nn.Sequential(first, second), first.weight, first.weight.detach().clone()
    moved(both)
    assert first.weight is second.weight is weight
    assert isinstance(weight, OtherTensor)
    assert isinstance(weight, nn.Parameter)
    assert first(there()).device == OTHER
    with pytest.raises(RuntimeError, match="same device"):
        first(X)
    other = copy.deepcopy(both)
    with torch.no_grad():
        other[0].weight.zero_()
    both.to("cpu")
    assert type(first.weight) is nn.Parameter
    assert torch.equal(first.weight, kept)
