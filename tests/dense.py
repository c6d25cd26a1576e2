"""One sequence, one token at a time, ΔW dense, every line of it plain autograd: what the gradients of a life must be.

Float64. Nothing is imported from fastweights and nothing is shared with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64


@dataclass
class Spec:
    """What a linear writes: u = rate · value(a, a0, position), for one row; numbers and parameters may be leaves."""

    value: Callable[[Tensor, Tensor, int], Tensor]
    rate: Tensor | float = 1.0
    mu: Tensor | float | None = 1e-6
    decay: Tensor | float = 0.0
    clip: Tensor | float | None = None
    bias: bool = False


def silu(a: Tensor) -> Tensor:
    return a / (1 + torch.exp(-a))


def silu_slope(a: Tensor) -> Tensor:
    s = 1 / (1 + torch.exp(-a))
    return s + a * s * (1 - s)


def gelu_tanh(a: Tensor) -> Tensor:
    return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a * a * a)))


class Dense:
    """A life of one row. weights: the model's parameters by the checkpoint's names, leaves or not."""

    def __init__(self, weights: dict[str, Tensor], config: dict, plastic: dict[tuple[int, str], Spec]):
        self.w, self.config, self.plastic = weights, config, plastic
        self.L, self.H = config["num_hidden_layers"], config["num_attention_heads"]
        self.G = config.get("num_key_value_heads", self.H)
        self.E = config.get("head_dim") or config["hidden_size"] // self.H
        self.dW: dict[tuple[int, str], Tensor | float] = dict.fromkeys(plastic, 0.0)
        self.db: dict[tuple[int, str], Tensor | float] = dict.fromkeys(plastic, 0.0)
        self.keys: list[list[Tensor]] = [[] for _ in range(self.L)]
        self.values: list[list[Tensor]] = [[] for _ in range(self.L)]
        self.position = 0
        self.change: Callable[[str, int, Tensor], Tensor] = lambda site, layer, x: x

    def cut(self) -> None:
        def constant(x):
            return x.detach() if isinstance(x, Tensor) else x

        self.dW, self.db = ({key: constant(x) for key, x in each.items()} for each in (self.dW, self.db))
        self.keys, self.values = ([[x.detach() for x in layer] for layer in each] for each in (self.keys, self.values))

    def feed(self, ids, writes=True) -> Tensor:
        """Logits [T, V]."""
        writes = [writes] * len(ids) if isinstance(writes, bool) else writes
        return torch.stack([self.step(int(token), bool(write)) for token, write in zip(ids, writes, strict=True)])

    def linear(self, layer: int, name: str, prefix: str, h: Tensor, phi, write: bool) -> Tensor:
        W, b, spec = self.w[prefix + ".weight"], self.w.get(prefix + ".bias"), self.plastic.get((layer, name))
        a0 = W @ h if b is None else W @ h + b
        if spec is None:
            return a0
        dW, db = self.dW[layer, name], self.db[layer, name]
        read = a0 * 0 if isinstance(dW, float) else dW @ h
        a = a0 + self.change(name, layer, read + db)
        if write:
            scale = 1.0 if spec.mu is None else 1 / (h @ h + spec.mu)
            k, u = h * scale, spec.rate * spec.value(a, a0, self.position)
            if spec.clip is not None:
                norm = u.abs() * (h @ h).sqrt() * scale
                u = torch.where(norm > spec.clip, u * spec.clip / torch.where(norm > spec.clip, norm, 1.0), u)
            self.dW[layer, name] = (1 - spec.decay) * dW + u[:, None] * k[None]
            if spec.bias:
                self.db[layer, name] = (1 - spec.decay) * db + u * scale
        return a

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [H, E], k and v [G, E] of this token."""
        self.keys[layer].append(k)
        self.values[layer].append(v)
        keys, values = torch.stack(self.keys[layer], 1), torch.stack(self.values[layer], 1)  # [G, S, E]
        z = []
        for head in range(self.H):
            group = head // (self.H // self.G)
            z.append(torch.softmax(keys[group] @ q[head] / math.sqrt(self.E), 0) @ values[group])
        return torch.cat(z)


class DenseLlama(Dense):
    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / ((x * x).mean() + self.config["rms_norm_eps"]).sqrt() * self.w[name + ".weight"]

    def step(self, token: int, write: bool) -> Tensor:
        half = torch.arange(0, self.E, 2, dtype=torch.float32) / self.E
        angle = self.position * (1 / self.config["rope_theta"] ** half)
        cos, sin = torch.cat((angle, angle)).cos().to(F64), torch.cat((angle, angle)).sin().to(F64)

        def turned(x):
            one, other = x.chunk(2, -1)
            return x * cos + torch.cat((-other, one), -1) * sin

        x = self.w["model.embed_tokens.weight"][token]
        for layer in range(self.L):
            name = f"model.layers.{layer}."
            h = self.norm(name + "input_layernorm", x)
            q, k, v = ((self.w[f"{name}self_attn.{p}_proj.weight"] @ h).view(-1, self.E) for p in "qkv")
            x = x + self.w[name + "self_attn.o_proj.weight"] @ self.attend(layer, turned(q), turned(k), v)
            h = self.norm(name + "post_attention_layernorm", x)
            gate, up = (
                self.linear(layer, n, f"{name}mlp.{n}", h, phi, write)
                for n, phi in (("gate_proj", silu), ("up_proj", None))
            )
            x = x + self.linear(layer, "down_proj", f"{name}mlp.down_proj", silu(gate) * up, None, write)
        self.position += 1
        return self.w["lm_head.weight"] @ self.norm("model.norm", x)


class DenseGPT2(Dense):
    def norm(self, name: str, x: Tensor) -> Tensor:
        x = x - x.mean()
        return (
            x / ((x * x).mean() + self.config["rms_norm_eps"]).sqrt() * self.w[name + ".weight"]
            + self.w[name + ".bias"]
        )

    def affine(self, name: str, x: Tensor) -> Tensor:
        return self.w[name + ".weight"] @ x + self.w[name + ".bias"]

    def step(self, token: int, write: bool) -> Tensor:
        x = self.w["transformer.wte.weight"][token] + self.w["transformer.wpe.weight"][self.position]
        for layer in range(self.L):
            name = f"transformer.h.{layer}."
            qkv = self.affine(name + "attn.c_attn", self.norm(name + "ln_1", x)).view(3, self.H, self.E)
            x = x + self.affine(name + "attn.c_proj", self.attend(layer, *qkv))
            h = self.norm(name + "ln_2", x)
            act = gelu_tanh(self.linear(layer, "c_fc", name + "mlp.c_fc", h, gelu_tanh, write))
            x = x + self.linear(layer, "c_proj", name + "mlp.c_proj", act, None, write)
        self.position += 1
        return self.w["transformer.wte.weight"] @ self.norm("transformer.ln_f", x)
