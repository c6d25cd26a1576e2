"""The definition of DESIGN §2, as slowly and plainly as it can be said; the fast code is checked against it.

A Llama in float64, one token of one sequence at a time, keys and values in python lists, and a dense
ΔW [O, I] per plastic linear that every event changes by an outer product. Nothing is imported from
fastweights and nothing is shared with it: no factors, no Gram matrix, no scan, no buffers.

Shapes: I in, O out, D model width, V vocabulary, H heads, G key/value heads, E head width, L layers,
T tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64
LINEARS = ("gate_proj", "up_proj", "down_proj")
KINDS = ("hebbian", "local-least-squares", "delta", "gradient-ascent")


@dataclass
class Plastic:
    """What one linear does with a written token."""

    kind: str  # one of KINDS
    rate: float = 0.0  # γ of local-least-squares, β of delta
    mu: float | None = None  # k = h / (‖h‖² + mu); None only for gradient-ascent, and then k = h
    gate: str = "ones"  # "ones" | "positive" | "derivative"
    target: str | Tensor = "self"  # local-least-squares: "self" | "slow"; delta: v*, [O]
    decay: float = 0.0  # per event
    clip: float | None = None  # bound on |u_i| ‖k‖, per row
    bias: bool = False  # Δb as well

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {KINDS}")
        if self.gate not in ("ones", "positive", "derivative"):
            raise ValueError(f"gate is {self.gate!r}")
        if self.mu is None and self.kind != "gradient-ascent":
            raise ValueError(f"{self.kind} needs mu")
        if isinstance(self.target, Tensor) != (self.kind == "delta") or (
            self.kind != "delta" and self.target not in ("self", "slow")
        ):
            raise ValueError(f"{self.kind} cannot have target {self.target!r}")


def silu(a: Tensor) -> Tensor:
    return a / (1 + torch.exp(-a))


def silu_derivative(a: Tensor) -> Tensor:
    s = 1 / (1 + torch.exp(-a))
    return s * (1 + a * (1 - s))


class FastLinear:
    """One plastic linear: frozen W [O, I] and b [O], the dense fast dW and db, and the log of its events."""

    def __init__(self, W: Tensor, b: Tensor | None, plastic: Plastic, has_silu: bool):
        self.W, self.plastic, self.has_silu = W.to(F64), plastic, has_silu
        self.b = torch.zeros(len(W), dtype=F64) if b is None else b.to(F64)
        self.dW, self.db = torch.zeros_like(self.W), torch.zeros_like(self.b)
        self.keys: list[Tensor] = []  # k [I] of every event
        self.values: list[Tensor] = []  # u [O] of every event, after the clip

    def read(self, h: Tensor) -> Tensor:
        return self.W @ h + self.b + self.dW @ h + self.db

    def gated_activation(self, a: Tensor) -> Tensor:
        """m ⊙ z at the pre-activation `a`."""
        z = silu(a) if self.has_silu else a
        if self.plastic.gate == "ones":
            return z
        if self.plastic.gate == "positive":
            return (z > 0).to(F64) * z
        return (silu_derivative(a) if self.has_silu else torch.ones_like(a)) * z

    def value(self, h: Tensor, a: Tensor) -> Tensor:
        """u [O] of a neuron-local rule, before the clip."""
        rule = self.plastic
        if rule.kind == "hebbian":
            return rule.rate * self.gated_activation(a)
        if rule.kind == "delta":
            return rule.rate * (rule.target.to(F64) - a)
        start = a if rule.target == "self" else self.W @ h + self.b
        wanted = start + rule.rate * self.gated_activation(start)
        return wanted - a

    def write(self, h: Tensor, u: Tensor) -> None:
        """One event: decay what is there, then add u kᵀ."""
        rule = self.plastic
        scale = 1.0 if rule.mu is None else 1 / (float(h @ h) + rule.mu)
        k = h * scale
        if rule.clip is not None:
            u = u * torch.clamp(rule.clip / (u.abs() * k.norm()), max=1.0)
        # new tensors, never in place: a gradient still to be taken, or a fork, may hold the old ones
        self.dW = (1 - rule.decay) * self.dW + torch.outer(u, k)
        if rule.bias:
            self.db = (1 - rule.decay) * self.db + u * scale
        self.keys.append(k)
        self.values.append(u)


class Frozen:
    """A checkpoint in float64, and what its config.json says of it."""

    def __init__(self, weights: dict[str, Tensor], config: dict):
        self.weights = {name: t.detach().to("cpu", F64) for name, t in weights.items()}
        self.L, self.H = config["num_hidden_layers"], config["num_attention_heads"]
        self.G = config.get("num_key_value_heads") or self.H
        self.E = config.get("head_dim") or config["hidden_size"] // self.H
        self.eps = config.get("rms_norm_eps", 1e-6)
        self.inv_freq = inverse_frequencies(config, self.E)
        tied = config.get("tie_word_embeddings", False) or "lm_head.weight" not in self.weights
        self.unembedding = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def frozen(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self.weights[name + ".weight"], self.weights.get(name + ".bias")


class Oracle(Frozen):
    """One sequence read token by token.

    state_dict: a checkpoint's tensors under Hugging Face's names, any float dtype.
    config: the dict in its config.json. plastic: {(layer, linear): Plastic}.

    cache_k, cache_v: per layer the list of [G, E] of each token so far, keys after rope.
    hiddens: per token so far [L+1, D], the residual stream after l layers (0 = embedding, L = before the
    final norm).
    """

    def __init__(self, state_dict: dict[str, Tensor], config: dict, plastic: dict[tuple[int, str], Plastic]):
        super().__init__(state_dict, config)
        self.fast: dict[tuple[int, str], FastLinear] = {}
        for (layer, linear), rule in plastic.items():
            if not 0 <= layer < self.L or linear not in LINEARS:
                raise ValueError(f"no such linear: {(layer, linear)}")
            W, b = self.frozen(f"model.layers.{layer}.mlp.{linear}")
            self.fast[layer, linear] = FastLinear(W, b, rule, has_silu=linear == "gate_proj")
        self.by_gradient = [key for key, fast in self.fast.items() if fast.plastic.kind == "gradient-ascent"]
        self.reset_context()

    def reset_context(self) -> None:
        """Forgets tokens, positions, and a gradient event still waiting for its next token; keeps ΔW."""
        self.cache_k: list[list[Tensor]] = [[] for _ in range(self.L)]
        self.cache_v: list[list[Tensor]] = [[] for _ in range(self.L)]
        self.hiddens: list[Tensor] = []
        self.pending = None  # (logits, {linear: h}, {linear: nudge}) of the last token, with its graph

    # -- what it holds -----------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        return len(self.hiddens)

    @property
    def hidden(self) -> Tensor:
        """[L+1, D] of the last token."""
        return self.hiddens[-1]

    @property
    def dW(self) -> dict[tuple[int, str], Tensor]:
        return {key: fast.dW for key, fast in self.fast.items()}

    @property
    def db(self) -> dict[tuple[int, str], Tensor]:
        return {key: fast.db for key, fast in self.fast.items()}

    @property
    def keys(self) -> dict[tuple[int, str], list[Tensor]]:
        return {key: fast.keys for key, fast in self.fast.items()}

    @property
    def values(self) -> dict[tuple[int, str], list[Tensor]]:
        return {key: fast.values for key, fast in self.fast.items()}

    @property
    def events(self) -> dict[tuple[int, str], int]:
        return {key: len(fast.values) for key, fast in self.fast.items()}

    def fork(self) -> Oracle:
        """An oracle that goes on from here on its own."""
        twin = copy.copy(self)
        twin.cache_k = [list(k) for k in self.cache_k]
        twin.cache_v = [list(v) for v in self.cache_v]
        twin.hiddens = list(self.hiddens)
        twin.fast = {key: copy.copy(fast) for key, fast in self.fast.items()}
        for fast in twin.fast.values():
            fast.keys, fast.values = list(fast.keys), list(fast.values)
        return twin

    # -- running -----------------------------------------------------------------------------------------

    def step(self, token_id: int, write: bool = True) -> Tensor:
        """Logits [V] of this token at the next position. It reads ΔW as it was before its own write.

        A gradient event of this token is written by the next step, before that step's token is processed.
        """
        self.write_pending(token_id)
        with torch.set_grad_enabled(bool(write and self.by_gradient)):
            inputs: dict[tuple[int, str], Tensor] = {}  # h of every plastic linear
            outputs: dict[tuple[int, str], Tensor] = {}  # a of every plastic linear
            nudges: dict[tuple[int, str], Tensor] = {}  # zeros added to a: ∂L/∂nudge is ∂L/∂a

            def linear(layer: int, name: str, h: Tensor) -> Tensor:
                fast = self.fast.get((layer, name))
                if fast is None:
                    return affine(h, *self.frozen(f"model.layers.{layer}.mlp.{name}"))
                a = fast.read(h)
                if fast.plastic.kind == "gradient-ascent":
                    nudges[layer, name] = torch.zeros_like(a, requires_grad=True)
                    a = a + nudges[layer, name]
                inputs[layer, name], outputs[layer, name] = h.detach(), a.detach()
                return a

            x = self.weights["model.embed_tokens.weight"][int(token_id)]
            hidden = [x]
            cos, sin = self.rope(position=self.length)
            for layer in range(self.L):
                prefix = f"model.layers.{layer}."
                h = self.norm(prefix + "input_layernorm", x)
                x = x + self.attention(layer, h, cos, sin)
                h = self.norm(prefix + "post_attention_layernorm", x)
                gate, up = linear(layer, "gate_proj", h), linear(layer, "up_proj", h)
                x = x + linear(layer, "down_proj", silu(gate) * up)
                hidden.append(x)
            logits = self.unembedding @ self.norm("model.norm", x)

        self.hiddens.append(torch.stack(hidden).detach())
        if write:
            for key, fast in self.fast.items():
                if key not in nudges:
                    fast.write(inputs[key], fast.value(inputs[key], outputs[key]))
            if nudges:
                self.pending = logits, inputs, nudges
        return logits.detach()

    def feed(self, token_ids: Sequence[int], write: bool | Sequence[bool] = True) -> Tensor:
        """Logits [T, V]."""
        writes = [write] * len(token_ids) if isinstance(write, bool) else list(write)
        return torch.stack([self.step(i, bool(w)) for i, w in zip(token_ids, writes, strict=True)])

    def frozen_probe(self, token_ids: Sequence[int], fresh: bool = True) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and hidden states [T, L+1, D] under ΔW as it is now; nothing is written or moved.

        fresh: from position 0 with no context; otherwise behind the context so far.
        """
        twin = self.fork()
        twin.pending = None
        if fresh:
            twin.reset_context()
        logits = twin.feed(token_ids, write=False)
        return logits, torch.stack(twin.hiddens[-len(token_ids) :])

    def write_pending(self, next_token: int) -> None:
        """Gradient ascent: u = rate · ∂ log p(next token) / ∂a, for all linears from one forward."""
        if self.pending is None:
            return
        logits, inputs, nudges = self.pending
        self.pending = None
        with torch.enable_grad():
            log_p = torch.log_softmax(logits, dim=-1)[int(next_token)]
        # the graph is kept: a fork made while the event was waiting differentiates it again
        gradients = torch.autograd.grad(log_p, list(nudges.values()), retain_graph=True)
        for key, gradient in zip(nudges, gradients, strict=True):
            self.fast[key].write(inputs[key], self.fast[key].plastic.rate * gradient)

    # -- the parts of a Llama ----------------------------------------------------------------------------

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.weights[name + ".weight"] * x / torch.sqrt((x * x).mean() + self.eps)

    def rope(self, position: int) -> tuple[Tensor, Tensor]:
        """cos and sin [E]: angles, cosines and sines in float32, as in transformers; only then float64."""
        angles = torch.tensor(float(position), dtype=torch.float32) * self.inv_freq
        angles = torch.cat((angles, angles))
        return angles.cos().to(F64), angles.sin().to(F64)

    def attention(self, layer: int, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}.self_attn."
        q = rotate(affine(h, *self.frozen(prefix + "q_proj")).view(self.H, self.E), cos, sin)
        k = rotate(affine(h, *self.frozen(prefix + "k_proj")).view(self.G, self.E), cos, sin)
        v = affine(h, *self.frozen(prefix + "v_proj")).view(self.G, self.E)
        # earlier tokens are constants; this token's own k and v are not
        keys, values = torch.stack([*self.cache_k[layer], k]), torch.stack([*self.cache_v[layer], v])
        self.cache_k[layer].append(k.detach())
        self.cache_v[layer].append(v.detach())
        heads = []
        for head in range(self.H):
            group = head // (self.H // self.G)
            weights = torch.softmax(keys[:, group] @ q[head] / math.sqrt(self.E), dim=0)
            heads.append(weights @ values[:, group])
        return affine(torch.cat(heads), *self.frozen(prefix + "o_proj"))


def affine(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    return W @ x if b is None else W @ x + b


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope on [heads, E]: dimension i is paired with i + E/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def inverse_frequencies(config: dict, head_dim: int) -> Tensor:
    """[E/2] float32, as in transformers; from rope_parameters, or the older rope_theta and rope_scaling."""
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "default":
        return inv_freq
    if kind == "linear":
        return inv_freq / rope["factor"]
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not in the oracle")
    length = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi / inv_freq
    scaled = []
    for frequency, wave in zip(inv_freq, wavelength, strict=True):
        if wave < length / high:  # fast: as it is
            scaled.append(frequency)
        elif wave > length / low:  # slow: stretched
            scaled.append(frequency / factor)
        else:
            smooth = (length / wave - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return torch.stack(scaled)
