"""What fastweights is measured against: transformers, and the seed experiment as a loop of hooks on it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastweights.model import Llama
from fastweights.rules import Hebbian
from fastweights.stored import lies_transposed

from .measure import Unavailable


def transformers_model(model: Llama) -> Any:
    """transformers' model with a copy of this model's weights, in memory of its own."""
    kind = getattr(_transformers(), model.config.family.architecture)
    config = kind.config_class.from_dict(model.config.to_dict())
    state = {
        name: (tensor.detach().mT if lies_transposed(model.config, name, tensor.shape) else tensor.detach()).clone()
        for name, tensor in model.state_dict().items()
    }
    peer = kind.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype, attn_implementation="sdpa")
    return peer.to(model.device).eval().requires_grad_(False)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise Unavailable("transformers is not installed: pip install 'fastweights[bench]'") from error


class Decoder:
    """Greedy decoding with transformers from a prompt that has been read; `rewind` goes back to its end.

    static: a StaticCache instead of the growing one; on CUDA the step is compiled with CUDA graphs then.
    """

    def __init__(self, peer: Any, prompt_BT: Tensor, steps: int, static: bool = False):
        transformers = _transformers()
        self.peer, self.static, self.length, self.steps = peer, static, prompt_BT.shape[1], steps
        self.cache: Any
        if static and getattr(peer.config, "sliding_window", None) is not None:
            raise Unavailable("a static cache of windows does not go back to the end of the prompt")
        if static:
            self.cache = transformers.StaticCache(config=peer.config, max_cache_len=self.length + steps)
        else:
            self.cache = transformers.DynamicCache(config=peer.config)
        self.step = peer.forward
        if static and prompt_BT.device.type == "cuda":
            self.step = torch.compile(peer.forward, mode="reduce-overhead", fullgraph=True)
        with torch.no_grad():
            out = peer(prompt_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first = out.logits[:, -1]
        self.kept: list[Any] = []
        if static:  # its layers count what they hold themselves
            self.kept = [(layer.keys.clone(), layer.values.clone(), self._count(layer)) for layer in self.cache.layers]

    @staticmethod
    def _count(layer: Any) -> Any:
        count = getattr(layer, "cumulative_length", None)
        return count.clone() if isinstance(count, Tensor) else count

    def rewind(self) -> None:
        if not self.static:
            if extra := self.cache.get_seq_length() - self.length:
                self.cache.crop(-extra)
            return
        for layer, (keys, values, count) in zip(self.cache.layers, self.kept, strict=True):
            layer.keys.copy_(keys)
            layer.values.copy_(values)
            if isinstance(count, Tensor):
                layer.cumulative_length.copy_(count)
            elif count is not None:
                layer.cumulative_length = count

    @torch.no_grad()
    def run(self, tokens: Sequence[int] | None = None) -> tuple[list[Tensor], Tensor]:
        """(the tokens chosen, the logits after the last); `tokens` are read instead of the best if given."""
        logits_BV, chosen = self.first, []
        for n in range(self.steps):
            best = logits_BV.argmax(-1)
            chosen.append(best if tokens is None else best.new_tensor([tokens[n]]))
            position = torch.tensor([[self.length + n]], device=logits_BV.device)
            out = self.step(chosen[-1][:, None], past_key_values=self.cache, position_ids=position, use_cache=True)
            logits_BV = out.logits[:, -1]
        return chosen, logits_BV


class HookLoop:
    """The seed experiment as one would write it on transformers: hooks, dense updates, a probe after every event.

    Reads the context token by token; after each, ΔW = η z hᵀ / (‖h‖² + μ) is added to the weights themselves,
    and the question is asked from position 0 with the activations of all layers captured.
    """

    def __init__(self, peer: Any, layers: Sequence[int], linears: Sequence[str], rule: Hebbian):
        assert (rule.gate, rule.decay, rule.clip, rule.bias) == ("ones", 0, None, False)
        self.peer, self.rule = peer, rule
        if linears != ("gate_proj", "up_proj", "down_proj"):
            raise Unavailable("the loop of hooks is written for the linears of a Llama")
        self.targets = [(getattr(peer.model.layers[n].mlp, name), name) for n in layers for name in linears]
        self.original = [linear.weight.detach().clone() for linear, _ in self.targets]
        self.device = peer.device

    def reset(self) -> None:
        for (linear, _), weight in zip(self.targets, self.original, strict=True):
            linear.weight.copy_(weight)

    @torch.no_grad()
    def hidden(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The residual stream after every layer at the last token [L+1, D], and its logits [V]."""
        seen: list[Tensor] = []
        blocks = self.peer.model.layers

        def before(_module: Any, args: Any) -> None:
            seen.append(args[0][0, -1].clone())

        handles = [block.register_forward_pre_hook(before) for block in (*blocks, self.peer.model.norm)]
        try:
            logits = self.peer(torch.tensor([list(ids)], device=self.device), use_cache=False).logits[0, -1]
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(seen), logits

    @torch.no_grad()
    def run(self, context: Sequence[int], question: Sequence[int], prompt: Sequence[int], answers: Sequence[int]):
        """Distances [N, L+1] and answer log-probabilities [N, A]; `prompt` is context and question together.

        The weights are the original ones afterwards.
        """
        try:
            return self._run(context, question, prompt, answers)
        finally:
            self.reset()  # other cases compare with these weights

    def _run(self, context: Sequence[int], question: Sequence[int], prompt: Sequence[int], answers: Sequence[int]):
        target, _ = self.hidden(prompt)
        rows, scores = [], []

        def ask() -> None:
            hidden, logits = self.hidden(question)
            rows.append((hidden - target).norm(dim=-1))
            scores.append(logits.log_softmax(-1)[list(answers)])

        ask()
        inputs: dict[Any, tuple[Tensor, Tensor]] = {}

        def after(module: Any, args: Any, out: Tensor) -> None:
            inputs[module] = (args[0][0, -1], out[0, -1])

        cache = _transformers().DynamicCache(config=self.peer.config)
        for token in context:
            handles = [linear.register_forward_hook(after) for linear, _ in self.targets]
            try:
                self.peer(torch.tensor([[token]], device=self.device), past_key_values=cache, use_cache=True)
            finally:
                for handle in handles:
                    handle.remove()
            for linear, name in self.targets:
                h, a = inputs[linear]
                z = torch.nn.functional.silu(a) if name == "gate_proj" else a
                linear.weight += torch.outer(
                    cast(float, self.rule.rate) * z, h / (h.square().sum() + (self.rule.mu or 0))
                )
            ask()
        return torch.stack(rows), torch.stack(scores)
