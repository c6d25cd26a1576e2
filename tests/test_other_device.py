"""The test device refuses what CUDA refuses, takes what it takes, and counts what the host waits for.

Where there is a GPU, what is said of both is asked of both.
"""

import copy

import pytest
import torch
from other_device import OTHER, OtherTensor, counting, moved
from torch import nn

X = torch.arange(12.0).reshape(3, 4)
INDEX = torch.tensor([2, 0])
DEVICES = [OTHER, *[torch.device("cuda", 0)] * torch.cuda.is_available()]
on_both = pytest.mark.parametrize("device", DEVICES, ids=str)


def there():
    return X.to(OTHER)


def put(target, index, value):
    target = target.clone()
    target[index] = value
    return target


MIXED = {
    "sum": lambda x: x + X,
    "CPU tensor and a number of the device": lambda x: X + x[0, 0],
    "in place": lambda x: X.clone().add_(x),
    "a number of the CPU changed in place": lambda x: torch.tensor(1.0).add_(x[0, 0]),
    "product": lambda x: x @ X.T,
    "product with a number": lambda x: torch.dot(x[0], X[0]),
    "cat": lambda x: torch.cat([x, X]),
    "stack": lambda x: torch.stack([X, x]),
    "where": lambda x: torch.where(x > 3, X, x),
    "mask": lambda x: x.masked_fill(X > 3, 0.0),
    "gather": lambda x: x.gather(0, INDEX[None].expand(1, 2)),
    "index_select": lambda x: x.index_select(0, INDEX),
    "embedding": lambda x: torch.embedding(x, INDEX),
    "isin": lambda x: torch.isin(x, X),
    "CPU tensor by indices of the device": lambda x: X[INDEX.to(x.device)],
    "values of the CPU put by indices": lambda x: put(x, INDEX, X[:2]),
    "values of the device put into the CPU": lambda x: put(X, INDEX, x[:2]),
    "equal": lambda x: torch.equal(x, X),
    "linear": lambda x: nn.functional.linear(x, X),
}


@on_both
@pytest.mark.parametrize("name", MIXED)
def test_it_refuses_tensors_of_both_devices(name, device):
    words = "Expected all tensors to be on the same device" if device == OTHER else "device|indices"
    with pytest.raises(RuntimeError, match=words):
        MIXED[name](X.to(device))


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


@on_both
@pytest.mark.parametrize("name", TAKEN)
def test_it_takes_what_cuda_takes_and_counts_uploads(name, device):
    run, uploads = TAKEN[name]
    x = X.to(device)
    with counting() as seen:
        found = run(x)
    assert found.device == device
    torch.testing.assert_close(found.cpu(), run(X), rtol=1e-5, atol=0)
    assert seen.looks == []
    assert len(seen.uploads) == (uploads if device == OTHER else 0)


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
