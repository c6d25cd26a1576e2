"""The published protocol of a context as weights: 5 prompts of 20 greedy tokens each, one token at a time.

    python -m fastweights.benchmarks.context_patch [--dtype float32] [--json]

Goldwaser et al. 2025 (arXiv 2511.17864): the model generates behind a prompt. At every new token a second pass reads
that token alone, at its absolute position, with the rank-1 patches of this token; agreement is the share of tokens
after which both choose the same. The unpatched control is that pass without patches. Their table is for Gemma-3 1B and
4B; this one is for whatever model is given.

Three ways to apply a patch:
    events         what each linear lacks, taken from what it gave behind the context; read in float32 (`context_patch`)
    W Δh           the theorem's formula in the weights' dtype: W (h_C − h) for gate and up, r_C − r for down
    materialised   the same, added to W in the weights' dtype: (W + ΔW) h

In float32 "events" must agree everywhere, with logits within 1e-3; otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastweights as fw
from fastweights.comparison import Comparison
from fastweights.context import Patched, Run, begun, joined, patched_linears
from fastweights.episode_state import Address
from fastweights.kernels.linear import linear
from fastweights.model import Llama
from fastweights.plastic import PlasticLinear
from fastweights.progress import bar

PROMPTS = (
    "The capital of Malaysia is Kuala Lumpur. The capital of the USA is Washington. The capital of Germany is",
    "A recipe for bread: mix flour, water, salt and yeast, and knead the dough for ten minutes. Then",
    "Question: If a train travels 60 miles in one hour, how far does it travel in three hours?\nAnswer:",
    "Once upon a time a fox lived at the edge of a large forest. Every morning the fox",
    "def add(a, b):\n    return a + b\n\ndef multiply(a, b):\n    return",
)
PUBLISHED = (  # Gemma-3 1B and 4B: top-1 agreement; an independent audit: the largest difference of a logit
    ("float32", "100 %", "2.7e-5"),
    ("bfloat16, naive", "87.5 %", ""),
    ("bfloat16, stable", "98–100 %", "0.375"),
    ("unpatched", "", "23.5"),
)


class Formula(Patched):
    """W Δh, in the dtype of the weights."""

    def value(self, address: Address, one: PlasticLinear, h_11I: Tensor) -> Tensor:
        """What the formula says the linear lacks, [1, 1, O]."""
        layer, block = address[0], self.blocks[address[0]]
        if one.role == "down_proj":
            lacks = self.informed.base(layer) - self.base(layer)
        else:
            lacks = linear(block.before_mlp(self.informed.base(layer)) - h_11I, one.weight, None)
        return lacks.to(self.episode.logs[address].dtype)


class Materialised(Formula):
    """(W + ΔW) h in the dtype of the weights: its difference from W h, so that the read gives just that."""

    def value(self, address: Address, one: PlasticLinear, h_11I: Tensor) -> Tensor:
        """What the dense change of this formula adds, [1, 1, O]."""
        u_O, h_I = super().value(address, one, h_11I)[0, 0], h_11I[0, 0].to(torch.float32)
        delta_OI = torch.outer(u_O, h_I / h_I.square().sum()).to(one.weight.dtype)
        a_11O, frozen_11O = F.linear(h_11I, one.weight + delta_OI, one.bias), linear(h_11I, one.weight, one.bias)
        return a_11O.to(u_O.dtype) - frozen_11O.to(u_O.dtype)


WAYS: dict[str, type[Patched]] = {"events": Patched, "W Δh": Formula, "materialised": Materialised}


@torch.no_grad()
def measured(model: Llama, prompts_ids: Sequence[list[int]], ways: dict[str, type[Patched]], tokens: int = 20) -> dict:
    """One comparison over all generated tokens of all prompts, by way."""
    found: dict[str, list[list[tuple[Tensor, Tensor]]]] = {way: [] for way in ways}
    with patched_linears(model, None, rank=1, overflow="evict", archive=True) as fast, bar("patching") as show:
        for done, ids in enumerate(prompts_ids):
            informed = Run(fw.Episode(model), fast.linears)
            logits_1V = informed.episode.feed(ids, logits="last")[:, 0]
            for position in range(len(ids), len(ids) + tokens):
                chosen_11 = logits_1V.argmax(-1)[None]
                informed.read(chosen_11)
                logits_1V = informed.fed[-1][0]
                bare = Run(begun(model, position), {})
                bare.read(chosen_11)
                for way, kind in ways.items():
                    patched = kind(begun(model, position), fast.linears, informed)
                    patched.read(chosen_11)
                    found[way].append([informed.fed[-1], bare.fed[-1], patched.fed[-1]])
                show(done * tokens + position - len(ids) + 1, len(prompts_ids) * tokens)
    fw.detach(model)
    return {way: Comparison.of(*map(joined, zip(*runs, strict=True))) for way, runs in found.items()}


def rows_of(dtype: str, compared: dict[str, Comparison]) -> list[dict[str, Any]]:
    """A row per way, and one for the control."""
    rows = []
    for way, one in compared.items():
        error = float(one.layer_error.max())
        rows.append({"dtype": dtype, "way": way, "agreement": one.agreement, "difference": one.difference})
        rows[-1] |= {"layer_error": error, "end_error": float(one.layer_error[:, -1].max()), "tokens": len(one.patched)}
    one = next(iter(compared.values()))
    bare = {"agreement": one.unpatched_agreement, "difference": one.unpatched_difference}
    bare |= {"layer_error": float(one.unpatched_layer_error.max()), "tokens": len(one.patched)}
    bare |= {"end_error": float(one.unpatched_layer_error[:, -1].max())}
    return [*rows, {"dtype": dtype, "way": "unpatched", **bare}]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="left out: SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", action="append", help="may be given again; left out: float32 and bfloat16")
    parser.add_argument("--device")
    parser.add_argument("--tokens", type=int, default=20, help="greedy tokens behind each prompt")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtype or ["float32", "bfloat16"]:
        model, tokenizer = fw.load(options.model, dtype=dtype, device=options.device)
        assert tokenizer is not None
        plain = not model.config.features  # the other ways are written for a Llama's block
        ways = WAYS if plain else {"events": Patched}
        rows += rows_of(dtype, measured(model, [tokenizer.encode(prompt) for prompt in PROMPTS], ways, options.tokens))
    print(f"{'dtype':10}{'way':14}{'agreement':>10}{'logits':>10}{'streams':>10}{'last':>10}   tokens")
    for row in rows:
        numbers = "".join(f"{row[key]:10.2g}" for key in ("difference", "layer_error", "end_error"))
        print(f"{row['dtype']:10}{row['way']:14}{row['agreement']:10.1%}{numbers}   {row['tokens']}")
    print("logits: largest difference; streams, last: largest relative error behind any layer, and behind the last")
    print("\npublished, Gemma-3 1B and 4B: " + "; ".join(" ".join(filter(None, row)) for row in PUBLISHED))
    if options.json:
        print(json.dumps(rows))
    failed = [row for row in rows if (row["dtype"], row["way"]) == ("float32", "events")]
    return int(any(row["agreement"] < 1 or row["difference"] > 1e-3 for row in failed))


if __name__ == "__main__":
    sys.exit(main())
