"""Whether a model is as it was: asked before every token by the two steps that do not run its modules from Python."""

from __future__ import annotations

import operator
from itertools import repeat

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def touched(module: nn.Module) -> bool:
    """Whether hooks, or somebody's own `forward`, are to run when this module is called."""
    own = module.__dict__
    return any(own[name] for name in HOOKS) or "forward" in own or _global()


def _global() -> bool:
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


class Watch:
    """A model's modules, weights and where they lie, as found now; all looks are loops in C over lists made once.

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
        self.unhooked_at = -1  # how many hooks torch had ever made when there was none here

    def stands(self) -> bool:
        """Whether modules and weights are where they were."""
        there = map(operator.is_, map(dict.get, self.registries, self.names), self.parts)
        return all(there) and list(map(Tensor.data_ptr, self.weights)) == self.pointers

    def hooked(self) -> bool:
        """Whether hooks, or somebody's own `forward`, are to run at every token."""
        made = RemovableHandle.next_id
        if made != self.unhooked_at:
            if any(self.hooks) or _global():
                return True
            self.unhooked_at = made
        return any(map(operator.contains, self.attributes, repeat("forward")))
