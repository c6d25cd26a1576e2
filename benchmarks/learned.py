"""Learned plasticity against plasticity set by hand, on works that it was not learned from.

    python -m fastweights.benchmarks.learned [--steps 200] [--out FOLDER] [--json]

Every variant reads the same segments of the held-out works, each a life of its own, and every token is measured before
anything is written on it. The control that decides is static: a scale and a bias for each neuron of the same linears,
learned from the same texts by the same number of steps, and nothing plastic. What is learned is chosen on the ends of
the works it is learned from. Shape suffixes: N segments, T tokens, O neurons.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastweights as fw
from fastweights.learn import even
from fastweights.model import Llama
from fastweights.progress import bar

TEXTS = Path(__file__).parent / "texts"
EDGES = (0, 32, 128)
SHARE = 0.9  # of each work to learn from; its end chooses
RESAMPLES = 2000
CONTROL = "scale and bias, learned"


class Static(nn.Module):
    """The control: (1 + s) ⊙ (W h + b) + c for each neuron of some linears."""

    def __init__(self, model: Llama, layers: Sequence[int], linears: Sequence[str]):
        super().__init__()
        self.places = [getattr(model.model.layers[layer].mlp, name) for layer in layers for name in linears]
        self.scales, self.biases = (
            nn.ParameterList([torch.zeros(place.out_features) for place in self.places]) for _ in range(2)
        )
        for p in self.parameters():
            p.requires_grad_(True)

    @contextmanager
    def on(self) -> Iterator[None]:
        """The model with it."""
        handles = []
        try:
            for place, scale, bias in zip(self.places, self.scales, self.biases, strict=True):
                handles.append(place.register_forward_hook(lambda _m, _i, out, s=scale, c=bias: out * (1 + s) + c))
            yield
        finally:
            for handle in handles:
                handle.remove()


def learn_static(
    model: Llama, static: Static, draw: Callable[[int], Tensor], kept: Tensor, steps: int, lr: float, every: int
) -> dict[int, float]:
    """The same loop as `fw.learn`'s, with the parameters that are best on `kept` left in `static`: {step: loss}."""
    adam = torch.optim.AdamW(static.parameters(), lr=lr, weight_decay=0.0)
    found: dict[int, float] = {}
    best = {}
    with static.on(), bar("the control") as show:
        for step in range(steps + 1):
            if step % every == 0:
                with torch.no_grad():
                    found[step] = sum(float(loss_of(model, ids_1T)) for ids_1T in kept.split(1)) / len(kept)
                if found[step] == min(found.values()):
                    best = {name: tensor.clone() for name, tensor in static.state_dict().items()}
            if step == steps:
                break
            adam.zero_grad()
            loss_of(model, draw(step)).backward()
            adam.step()
            show(step + 1, steps)
    static.load_state_dict(best)
    return found


def loss_of(model: Llama, ids_BT: Tensor) -> Tensor:
    """The mean of −log p of all tokens but the first."""
    return F.cross_entropy(model(ids_BT[:, :-1]).flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def segments(texts: Sequence[Tensor], count: int, length: int) -> list[Tensor]:
    """`count` pieces of length + 1 tokens at even distances, of the texts in turn."""
    chosen = []
    for n, text in enumerate(texts):
        own = len(range(n, count, len(texts)))
        last = len(text) - length - 1
        chosen += [text[last * i // max(1, own - 1) :][: length + 1] for i in range(own)]
    return chosen


def interval(apart_N: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % of the means of as many segments, drawn again and again."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(apart_N), (RESAMPLES, len(apart_N)), generator=generator)
    low, high = apart_N[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=apart_N.dtype)).tolist()
    return low, high


def summary(losses: dict[str, Tensor], edges: Sequence[int] = EDGES) -> dict[str, Any]:
    """Per variant and bucket: perplexity, and the difference of the loss from the frozen model's and the control's."""
    T = losses["frozen"].shape[1]
    edges = [edge for edge in edges if edge < T]
    buckets = [*zip(edges, [*edges[1:], T], strict=True), (0, T)]
    found: dict[str, Any] = {}
    for name, loss_NT in losses.items():
        rows = []
        for start, end in buckets:
            loss_N = loss_NT[:, start:end].mean(1)
            row: dict[str, Any] = {"from": start, "to": end, "perplexity": float(loss_N.mean().exp())}
            for other in ("frozen", CONTROL):
                apart_N = loss_N - losses[other][:, start:end].mean(1)
                row[other] = {"difference": float(apart_N.mean()), "interval": interval(apart_N)}
            rows.append(row)
        found[name] = rows
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = fw.load(options.model, dtype="float32")
    assert tokenizer is not None
    began, length, layers, linears = time.time(), options.length, options.layers, options.linears
    works = {part: sorted((TEXTS / part).glob("*.txt")) for part in ("train", "held_out")}
    ids = {
        part: [torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8"))) for path in paths]
        for part, paths in works.items()
    }
    train = [text[: int(SHARE * len(text))] for text in ids["train"]]
    ends = [text[int(SHARE * len(text)) :] for text in ids["train"]]
    held_out = segments(ids["held_out"], options.segments, length)
    how: dict[str, Any] = {"length": length, "lives": 1, "steps": options.steps, "every": options.every}
    how |= {"seed": options.seed, "samples": options.samples, "held_out": ends}
    by_hand: dict[str, Any] = {"Hebbian, by hand": fw.Hebbian(options.rate)}
    by_hand["slow target, by hand"] = fw.LocalLeastSquares(gamma=options.gamma, target="slow", rate=options.slow_rate)
    rules = dict(by_hand)
    learning: dict[str, Any] = {}
    for name, rule in by_hand.items():
        own = name.replace("by hand", "learned")
        out = None if options.out is None else options.out / own.split(",")[0].replace(" ", "-")
        one = fw.learn(model, train, rule, layers, linears, lr=options.lr, out=out, **how)
        rules[own], learning[own] = one.rule, {**one.to_dict(), "parameters": _count(one.rule)}
        print(f"{own}: {one.held_out}, {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    static, kept = Static(model, layers, linears), even(ends, options.samples, length)

    def draw(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * options.seed + step)
        text = train[int(torch.multinomial(torch.tensor([float(len(t)) for t in train]), 1, generator=generator))]
        start = int(torch.randint(len(text) - length, (), generator=generator))
        return text[None, start : start + length + 1]

    held = learn_static(model, static, draw, kept, options.steps, options.static_lr, options.every)
    learning[CONTROL] = {"held_out": held, "parameters": _count(static)}
    print(f"{CONTROL}: {held}, {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    losses: dict[str, Tensor] = {}
    for name, rule in rules.items():
        read = fw.perplexity(model, held_out, rule, layers, linears=linears, rank=length + 1, overflow="grow")
        losses.setdefault("frozen", torch.stack([loss_RT[0] for loss_RT in read.losses]))
        losses[name] = torch.stack([loss_RT[1] for loss_RT in read.losses])
        print(f"{name} measured, {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    with static.on():
        read = fw.perplexity(model, held_out)
    losses[CONTROL] = torch.stack([loss_RT[0] for loss_RT in read.losses])
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "json")}
    settings |= {"seconds": round(time.time() - began), "works": {k: [p.name for p in v] for k, v in works.items()}}
    return {"variants": summary(losses), "learning": learning, "settings": settings}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def lines(found: dict[str, Any]) -> list[str]:
    """A table in Markdown."""
    first = next(iter(found["variants"].values()))
    names = [*(f"{row['from']} to {row['to'] - 1}" for row in first[:-1]), "all"]
    head = f"| {' | '.join(names)} |"
    rule, variants = "|---" * (len(names) + 1) + "|", found["variants"].items()
    table = [f"| perplexity {head}", rule]
    for name, rows in variants:
        table.append(f"| {name} | {' | '.join(format(row['perplexity'], '.2f') for row in rows)} |")
    for other in ("frozen", CONTROL):
        table += ["", f"| Δ loss from: {other} {head}", rule]
        for name, rows in variants:
            if name not in ("frozen", other):
                table.append(f"| {name} | {' | '.join(_cell(row[other]) for row in rows)} |")
    return table


def _cell(apart: dict[str, Any]) -> str:
    low, high = apart["interval"]
    return f"{apart['difference']:+.4f} ({low:+.4f} to {high:+.4f})"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="learned", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="left out: SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=lambda text: [int(n) for n in text.split(",")], default=[26, 27, 28])
    parser.add_argument("--linears", type=lambda text: text.split(","), default=["gate_proj", "up_proj"])
    parser.add_argument("--rate", type=float, default=1e-3, help="of the Hebbian rule, by hand")
    parser.add_argument("--slow-rate", type=float, default=1e-3, help="of the slow target, by hand")
    parser.add_argument("--gamma", type=float, default=0.3, help="of the slow target, by hand")
    parser.add_argument("--length", type=int, default=256, help="tokens of a life")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two looks at the ends of the works")
    parser.add_argument("--samples", type=int, default=9, help="lives of such a look")
    parser.add_argument("--segments", type=int, default=32, help="held-out segments")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--static-lr", type=float, default=0.002)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="save what is learned here, and go on from it")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    found = measure(options)
    print("\n".join(lines(found)))
    for name, one in found["learning"].items():
        print(f"{name}: {one['parameters']} parameters, on the ends {one['held_out']}")
    if options.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
