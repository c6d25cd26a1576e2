"""Detects hooks, replaced modules and moved weights.

The step in C and the CUDA graph bypass the modules, so they ask before each token.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class ThreadHook:
    """A hook that runs in the thread that made it, and that no other thread sees.

    A probe hooks modules that other threads are running: their passes must neither reach it nor leave their fast path.

    Args:
        holds: whether it still has something to do: an interrupt may come before anybody can take it away.
    """

    def __init__(self, function: Callable, holds: Callable[[], bool] = lambda: True):
        self.function, self.holds, self.thread = function, holds, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs) if self.acts() else None

    def acts(self) -> bool:
        """Whether it would do anything in this thread."""
        return threading.get_ident() == self.thread and self.holds()


def _seen(hooks: Mapping[int, Callable]) -> bool:
    """True if one of these hooks would do anything in this thread."""
    return any(not isinstance(hook, ThreadHook) or hook.acts() for hook in list(hooks.values()))


def touched(module: nn.Module) -> bool:
    """True if calling this module runs hooks or a `forward` that somebody set on the object."""
    own = module.__dict__
    return any(own[name] and _seen(own[name]) for name in HOOKS) or "forward" in own or _global()


def _global() -> bool:
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


class Watch:
    """A model's modules, weights and where they lie, as found now. Every look is a loop in C over lists made once.

    more: anything else that must stay the same object: (dictionary, key, object).
    """

    def __init__(self, model: nn.Module, *more: tuple[dict, str, object]):
        modules = list(model.modules())
        found = [(r, name, part) for m in modules for r in (m._modules, m._parameters) for name, part in r.items()]
        self.registries, self.names, self.parts = zip(*found, *more, strict=True)
        self.weights = [part for part in self.parts if isinstance(part, Tensor)]
        self.pointers = list(map(Tensor.data_ptr, self.weights))
        self.attributes = [m.__dict__ for m in modules]
        self.hooks = [m.__dict__[name] for m in modules for name in HOOKS]  # filled and emptied in place
        # how many hooks torch had ever made when there was none here: at the last look, and at two looks in a row,
        # because another thread may have counted its hook and not yet set it
        self.looked_at = self.unhooked_at = -1
        self.table: Any = None  # what somebody knows of a model for as long as this stands

    def stands(self) -> bool:
        """True if modules and weights are where they were."""
        there = map(operator.is_, map(dict.get, self.registries, self.names), self.parts)
        return all(there) and list(map(Tensor.data_ptr, self.weights)) == self.pointers

    def hooked(self) -> bool:
        """True if hooks, or a `forward` that somebody set on a module, are to run at every token."""
        made = RemovableHandle.next_id
        if made != self.unhooked_at:
            if _global():
                return True
            filled = [hooks for hooks in self.hooks if hooks]
            if any(map(_seen, filled)):
                return True
            if not filled:  # if there is one, it belongs to another thread, which must find it
                self.unhooked_at = made if made == self.looked_at else -1
                self.looked_at = made
        return any(map(operator.contains, self.attributes, repeat("forward")))


def standing(model: Any) -> Watch:
    """The watch of a model, a new one if modules or weights have moved: the same object means that nothing has."""
    watch = model.binding.watch
    if watch is None or not watch.stands():
        watch = model.binding.watch = Watch(model)
    return watch
