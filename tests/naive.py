"""Every site of DESIGN §7b, as slowly and plainly as it can be said; edits are a function of one token's numbers.

A Llama in float64, one token of one sequence at a time; keys and values in Python lists, ΔW dense. Nothing is imported
from fastweights and nothing is shared with it.

Shapes: D width, H heads, G key/value heads, E head width, S tokens so far, F neurons, V vocabulary, O out, I in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from oracle import F64, FastLinear, Frozen, Plastic, affine, rotate, silu
from torch import Tensor

# (site, layer or None, position, x of one token) → x
Change = Callable[[str, "int | None", int, Tensor], Tensor]
WIDE = ("resid_pre", "attn_norm", "attn_out", "resid_mid", "mlp_norm", "mlp_out", "resid_post")
HEADS = ("q", "k", "v", "q_rot", "k_rot", "z", "result")
SQUARE = ("scores", "pattern")
NEURONS = ("gate", "up", "act")
LAYERED = (*WIDE, *HEADS, *SQUARE, *NEURONS)
WHOLE = ("embedding", "final_norm", "logits")


def keep(site: str, layer: int | None, position: int, x: Tensor) -> Tensor:
    return x


class Naive(Frozen):
    """One sequence. `sites[site, layer]` is what each of its tokens held there, after the change.

    fast: the plastic linears of another sequence, where both read and write one ΔW. config["windows"]: of each layer,
    how many tokens it sees, with its own; None: all.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        config: dict,
        plastic: dict[tuple[int, str], Plastic] | None = None,
        fast: dict[tuple[int, str], FastLinear] | None = None,
    ):
        super().__init__(weights, config)
        self.windows = config.get("windows") or [None] * self.L
        self.fast = fast if fast is not None else {}
        for (layer, linear), rule in (plastic or {}).items():
            W, b = self.frozen(f"model.layers.{layer}.mlp.{linear}")
            self.fast[layer, linear] = FastLinear(W, b, rule, has_silu=linear == "gate_proj")
        self.restart()

    def restart(self) -> None:
        """No tokens; ΔW stays."""
        self.keys: list[list[Tensor]] = [[] for _ in range(self.L)]
        self.values: list[list[Tensor]] = [[] for _ in range(self.L)]
        self.sites: dict[tuple[str, int | None], list[Tensor]] = {}
        self.position = 0
        self.pending = None
        self.queue: list[tuple[FastLinear, Tensor, Tensor, Tensor]] = []  # linear, u, k, scale of Δb

    def stacked(self, site: str, layer: int | None = None) -> Tensor:
        """[T, …]; scores and pattern [H, T, S]."""
        tokens = self.sites[site, layer]
        if site not in SQUARE:
            return torch.stack(tokens)
        fill, count = 0.0 if site == "pattern" else -torch.inf, len(tokens)
        rows = []
        for position, x in enumerate(tokens):  # of the tokens up to this one, the last ones
            around = (position + 1 - x.shape[1], count - 1 - position)
            rows.append(torch.nn.functional.pad(x, around, value=fill))
        return torch.stack(rows, 1)

    # ---- running

    def feed(self, ids: Sequence[int], change: Change = keep, write: bool | Sequence[bool] = False) -> Tensor:
        """Logits [T, V]."""
        writes = [write] * len(ids) if isinstance(write, bool) else list(write)
        logits = []
        for token, writes_it in zip(ids, writes, strict=True):
            self.settle(token)
            self.flush()
            logits.append(self.step(token, change, writes_it))
            self.flush()
        return torch.stack(logits)

    def settle(self, token: int) -> None:
        """Makes the gradient events that waited for this token."""
        if self.pending is None:
            return
        logits, inputs, nudges = self.pending
        self.pending = None
        log_p = torch.log_softmax(logits, dim=-1)[int(token)]
        found = torch.autograd.grad(log_p, list(nudges.values()), allow_unused=True)
        for key, gradient in zip(nudges, found, strict=True):
            fast, h = self.fast[key], inputs[key]
            gradient = torch.zeros_like(nudges[key]) if gradient is None else gradient
            self.event(fast, h, fast.plastic.rate * gradient, lambda part, x: x)

    def event(self, fast: FastLinear, h: Tensor, u: Tensor, change: Callable[[str, Tensor], Tensor]) -> None:
        rule = fast.plastic
        scale = 1.0 if rule.mu is None else 1 / (float(h @ h) + rule.mu)
        k = h * scale
        if rule.clip is not None:
            u = u * torch.clamp(rule.clip / (u.abs() * k.norm()), max=1.0)
        self.queue.append((fast, change("value", u), change("key", k), scale))

    def flush(self) -> None:
        """Writes the events that were made, in their order."""
        for fast, u, k, scale in self.queue:
            rule = fast.plastic
            fast.dW = (1 - rule.decay) * fast.dW + torch.outer(u, k)
            if rule.bias:
                fast.db = (1 - rule.decay) * fast.db + u * scale
            fast.keys.append(k)
            fast.values.append(u)
        self.queue = []

    def step(self, token: int, change: Change = keep, write: bool = False) -> Tensor:
        """Logits [V] of one token; its events stand in `queue`, or wait for the next token."""
        position, gradient = self.position, any(f.plastic.kind == "gradient-ascent" for f in self.fast.values())
        inputs: dict[tuple[int, str], Tensor] = {}
        nudges: dict[tuple[int, str], Tensor] = {}

        def at(site: str, layer: int | None, x: Tensor) -> Tensor:
            y = change(site, layer, position, x)
            assert y.shape == x.shape
            self.sites.setdefault((site, layer), []).append(y.detach())
            return y

        def linear(layer: int, name: str, h: Tensor) -> Tensor:
            site, fast = name.removesuffix("_proj"), self.fast.get((layer, name))
            W, b = self.frozen(f"model.layers.{layer}.mlp.{name}")
            a = affine(h, W, b)
            if fast is None:
                return a
            a = a + at(f"{site}.read", layer, fast.dW @ h + fast.db)
            if fast.plastic.kind == "gradient-ascent":
                nudges[layer, name] = torch.zeros_like(a, requires_grad=True)
                a = a + nudges[layer, name]
                inputs[layer, name] = h.detach()
            elif write:
                u = fast.value(h.detach(), a.detach())
                self.event(fast, h.detach(), u, lambda part, x: at(f"{site}.{part}", layer, x))
            return a

        with torch.set_grad_enabled(bool(gradient and write)):
            x = at("embedding", None, self.weights["model.embed_tokens.weight"][int(token)])
            cos, sin = self.rope(position)
            for layer in range(self.L):
                name = f"model.layers.{layer}."
                x = at("resid_pre", layer, x)
                h = at("attn_norm", layer, self.norm(name + "input_layernorm", x))
                x = x + at("attn_out", layer, self.attention(layer, h, cos, sin, at))
                x = at("resid_mid", layer, x)
                h = at("mlp_norm", layer, self.norm(name + "post_attention_layernorm", x))
                gate, up = (at(n, layer, linear(layer, f"{n}_proj", h)) for n in ("gate", "up"))
                act = at("act", layer, silu(gate) * up)
                x = x + at("mlp_out", layer, linear(layer, "down_proj", act))
                x = at("resid_post", layer, x)
            h = at("final_norm", None, self.norm("model.norm", x))
            logits = at("logits", None, self.unembedding @ h)
        if write and nudges:
            self.pending = logits, inputs, nudges
        self.position += 1
        return logits.detach()

    def attention(self, layer: int, h: Tensor, cos: Tensor, sin: Tensor, at: Callable[..., Tensor]) -> Tensor:
        name = f"model.layers.{layer}.self_attn."
        q, k, v = (
            at(part, layer, affine(h, *self.frozen(f"{name}{part}_proj")).view(heads, self.E))
            for part, heads in (("q", self.H), ("k", self.G), ("v", self.G))
        )
        q, k = at("q_rot", layer, rotate(q, cos, sin)), at("k_rot", layer, rotate(k, cos, sin))
        keys, values = torch.stack([*self.keys[layer], k]), torch.stack([*self.values[layer], v])
        self.keys[layer].append(k.detach())
        self.values[layer].append(v.detach())
        groups = [head // (self.H // self.G) for head in range(self.H)]
        if self.windows[layer] is not None:
            keys, values = keys[-self.windows[layer] :], values[-self.windows[layer] :]
        scores = torch.stack([keys[:, g] @ q[head] / math.sqrt(self.E) for head, g in enumerate(groups)])
        pattern = at("pattern", layer, torch.softmax(at("scores", layer, scores), dim=-1))
        z = at("z", layer, torch.stack([pattern[head] @ values[:, g] for head, g in enumerate(groups)]))
        W, b = self.frozen(name + "o_proj")
        parts = [W[:, head * self.E : (head + 1) * self.E] @ z[head] for head in range(self.H)]
        out = at("result", layer, torch.stack(parts)).sum(0)
        return out if b is None else out + b

    # ---- the parts of a Llama

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.weights[name + ".weight"] * x / torch.sqrt((x * x).mean() + self.eps)

    def rope(self, position: int) -> tuple[Tensor, Tensor]:
        """cos and sin [E]; the angles are float32, as in transformers."""
        angles = torch.tensor(float(position), dtype=torch.float32) * self.inv_freq
        angles = torch.cat((angles, angles))
        return angles.cos().to(F64), angles.sin().to(F64)


def columns(rows: Sequence[Naive], ids: Sequence[Sequence], changes: Sequence[Change], write: bool) -> list[list]:
    """Rows that share one ΔW: a column reads, and then writes in row order. Logits [T][B], None where ids are None."""
    found = []
    for column in zip(*ids, strict=True):
        here = [n for n, token in enumerate(column) if token is not None]
        for n in here:
            rows[n].settle(column[n])
        for row in rows:
            row.flush()
        logits = [rows[n].step(column[n], changes[n], write) if n in here else None for n in range(len(rows))]
        for row in rows:
            row.flush()
        found.append(logits)
    return found


# ---- edits, said as changes of one token


def bent(x):
    """Neither zero, nor linear, nor even."""
    return 0.5 * x.clamp(-3, 3) + 0.2 * x.clamp(-3, 3) ** 2 + 0.1


def twin(site, what=bent, layers=None, heads=None, units=None, positions=None):
    """The same edit for the naive model: `what` of one token's numbers at these places."""

    def change(name, layer, position, x):
        if name != site or (layers is not None and layer not in layers):
            return x
        if positions is not None and position not in positions:
            return x
        chosen = torch.ones_like(x, dtype=torch.bool)
        if heads is not None:
            chosen &= torch.tensor([n in heads for n in range(len(x))]).view(-1, *[1] * (x.dim() - 1))
        if units is not None:
            chosen &= torch.tensor([n in units for n in range(x.shape[-1])])
        return torch.where(chosen, what(x), x)

    return change


def both(*changes):
    """One change after another."""

    def change(name, layer, position, x):
        for each in changes:
            x = each(name, layer, position, x)
        return x

    return change
