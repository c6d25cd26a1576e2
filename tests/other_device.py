"""A device that is not the CPU, for tests without a GPU: `torch.device("other")`.

Its tensors are computed by the CPU, bit for bit, and refuse what a CUDA device refuses:

- An operation that is given tensors of both devices raises torch's RuntimeError. As on CUDA there are four exceptions:
  `copy_` and `.to`; CPU numbers of no dimension in an elementwise operation, where they count as numbers; CPU indices
  into a tensor of the device; and one CPU number that is put at such indices.
- `.numpy()` raises. `is_cpu` is False. `data_ptr()` tells tensors apart and is no address: C that is given it fails.
- A generator must be of the device, and there is none.
- safetensors does not know it.

`counting()` notes what a CUDA device would wait for: `looks` of the host at what was computed, and `uploads` of the
host's numbers. A size that depends on values is a look too: `nonzero`, indices that are a mask.

What it cannot show: kernels of Triton and C, CUDA graphs, generators and pinned memory of a device, what moves without
the host waiting for it, and whether the numbers of CUDA's own kernels agree.

    from other_device import OTHER, counting, moved

    model = moved(tiny())
    with counting() as seen:
        fw.Episode(model).feed([[1, 2, 3]])
    assert seen.looks == []
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch

NAME = "other"
backend_registration._setup_privateuseone_for_python_backend(NAME)
OTHER = torch.device(NAME, 0)
# torch.library's own checks keep the random state of every device that there is
getattr(torch, NAME).get_rng_state = lambda device=None: torch.zeros(1, dtype=torch.uint8)
getattr(torch, NAME).set_rng_state = lambda state, device=None: None
NO_ADDRESS = 1 << 62  # added to every data_ptr()

aten = torch.ops.aten
# factories that torch would build of an empty tensor and an operation that resizes it
FACTORIES = [
    *("arange", "arange.start", "arange.start_step", "linspace", "logspace", "eye", "eye.m", "tril_indices"),
    *("full", "ones", "zeros", "rand", "randn", "randint", "randint.low", "randperm", "scalar_tensor", "triu_indices"),
    *("empty.memory_format", "empty_strided"),
]
BY_INDEX = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
LOOKS = {  # the host must know what was computed
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.allclose.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}


@dataclass
class Counts:
    """What happened while it was counted, by the names of the operations."""

    looks: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)


_counts: list[Counts] = []


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Notes the looks and uploads of every thread while it runs."""
    counts = Counts()
    _counts.append(counts)
    try:
        yield counts
    finally:
        _counts.remove(counts)


def moved(module: nn.Module, device: torch.device = OTHER) -> nn.Module:
    """`module.to(device)` that keeps every Parameter the same object, as a move to CUDA and back does."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.to(device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class OtherTensor(Tensor):
    """A tensor of the device; `raw` holds its numbers on the CPU."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> OtherTensor:
        where = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "device": OTHER}
        made = Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, layout=raw.layout, **where)
        made.raw = raw
        return made

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.data_ptr:
            return args[0].raw.data_ptr() | NO_ADDRESS
        if function is Tensor.tolist:
            return args[0].cpu().tolist()
        if function in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert {OTHER} device type tensor to numpy. Use Tensor.cpu() first.")
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            if function is Tensor.data.__set__:
                args[0].raw = args[1].raw
        return result

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    def __repr__(self, **_):
        return f"{self.raw!r} on {NAME!r}"


def run(operation: Any, args: tuple, kwargs: dict) -> Any:
    """Runs an operation that is given tensors of the device, or is to make one."""
    given: list[Tensor] = []
    raw = [_each(x, lambda t: given.append(t) or getattr(t, "raw", t)) for x in args]
    raw_kwargs = {name: _each(x, lambda t: given.append(t) or getattr(t, "raw", t)) for name, x in kwargs.items()}
    ours = [x for x in given if isinstance(x, OtherTensor)]
    device = kwargs.get("device")
    to_other = device is None or torch.device(device).type == NAME
    if operation is aten.copy_.default:
        _moves(operation, isinstance(args[1], OtherTensor), isinstance(args[0], OtherTensor))
    elif operation is aten._to_copy.default:
        _moves(operation, bool(ours), to_other)
    else:
        _check(operation, args, kwargs, given, ours)
        masks = operation in BY_INDEX and any(x.dtype in (torch.bool, torch.uint8) for x in _indices(args))
        if operation in LOOKS or masks:
            _note("looks", operation)
    if device is not None:
        raw_kwargs["device"] = "cpu"
    result = operation(*raw, **raw_kwargs)
    if torch.Tag.inplace_view in operation.tags:  # its own shape, behind which are no numbers
        with no_dispatch():
            operation(*args, **kwargs)
    for x in ours:
        if x.shape != x.raw.shape or x.stride() != x.raw.stride():
            raise NotImplementedError(f"{operation} changes the shape of a tensor in place, which {NAME!r} has not")
    if not to_other:
        return result
    wrapped = {id(x.raw): x for x in ours}  # what is changed in place stays the same object
    return _each(result, lambda x: wrapped[id(x)] if id(x) in wrapped else OtherTensor(x))


def _each(x: Any, change: Any) -> Any:
    """What is given to an operation or comes from it, with each tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)([_each(y, change) for y in x]) if type(x) in (list, tuple) else x


def _note(kind: str, operation: Any) -> None:
    for counts in _counts:
        getattr(counts, kind).append(str(operation))


def _moves(operation: Any, from_other: bool, to_other: bool) -> None:
    if from_other != to_other:
        _note("looks" if from_other else "uploads", operation)


def _indices(args: tuple) -> list[Tensor]:
    return [x for x in args[1] if x is not None]


def _check(operation: Any, args: tuple, kwargs: dict, given: list[Tensor], ours: list[OtherTensor]) -> None:
    """Refuses what a CUDA device refuses."""
    if (generator := kwargs.get("generator")) is not None:
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found {str(generator.device)!r}")
    strange = [x for x in given if not isinstance(x, OtherTensor)]
    if not ours or not strange:
        return
    if operation in BY_INDEX and isinstance(args[0], OtherTensor):
        indices = {id(x) for x in _indices(args)}
        if any(id(x) in indices for x in strange):
            _note("uploads", operation)
        strange = [x for x in strange if id(x) not in indices and not (x is args[2] and x.dim() == 0)]
    elif torch.Tag.pointwise in operation.tags or "fill" in operation.name():
        strange = [x for x in strange if x.dim() or (operation._schema.is_mutable and x is args[0])]
    if strange:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
            f"{strange[0].device}! ({operation})"
        )


def _made(name: str) -> Any:
    operation = getattr(getattr(aten, name.partition(".")[0]), name.partition(".")[2] or "default")
    return lambda *args, **kwargs: run(operation, args, {**kwargs, "device": kwargs.get("device") or OTHER})


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return run(aten.copy_.default, (target, source), {})


_library = torch.library.Library("aten", "IMPL")
# `torch.tensor` works below the class of its tensors: its copy to a device, and numbers of the device that it is given
_library.impl("_copy_from", _copy_from, "PrivateUse1")
_library.impl("_local_scalar_dense", lambda x: run(aten._local_scalar_dense.default, (x,), {}), "PrivateUse1")
for _name in FACTORIES:
    _library.impl(_name, _made(_name), "PrivateUse1")
_others = torch.library.Library("_", "IMPL")
_others.fallback(lambda operation, *args, **kwargs: run(operation, args, kwargs), "PrivateUse1")
