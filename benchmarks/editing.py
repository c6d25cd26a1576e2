"""Editing, honestly measured: 50 facts (facts.json), edited one at a time in several ways, on the default model.

    python -m fastweights.benchmarks.editing [--only NAME …] [--tune] [--json]

Scores are those of CounterFact (Meng et al. 2022, arXiv 2202.05262), of log-probabilities summed over the tokens of the
two objects: efficacy, how often the new object is likelier than the true one after the prompt; paraphrase, the same
after other words; neighbourhood, how often the true one is likelier for other subjects with the same true object; and
what a passage that has nothing to do with the fact loses. Every edit is of fast weights: events in an episode.
Shape suffixes: F facts (rows of one episode), P prompts, T tokens, I in, O out, D model width.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastweights as fw
from fastweights.cache import Positions
from fastweights.model import Llama
from fastweights.progress import bar
from fastweights.rules import Rule
from fastweights.state.events import Events
from fastweights.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
ROWS = 5  # facts edited in one batch
PASSAGE = 32  # tokens of a text that no fact speaks of
LAYER = 6  # of ROME; chosen on the facts of "tune", as the rates below
MIDDLE = range(6, 11)
PREFIXES = ("", "As the teacher said: ")


@dataclass(frozen=True)
class Fact:
    """prompt has {} where the subject stands; objects are texts without the blank in front."""

    relation: str
    subject: str
    prompt: str
    true: str
    new: str
    paraphrases: tuple[str, ...]
    neighbours: tuple[str, ...]

    @property
    def asked(self) -> str:
        return self.prompt.format(self.subject)

    @property
    def stated(self) -> str:
        """The new fact as a sentence."""
        return f"{self.asked} {self.new}."

    @property
    def up_to_subject(self) -> str:
        return self.asked[: self.asked.index(self.subject) + len(self.subject)]


def facts(part: str = "facts", path: Path = HERE / "facts.json") -> list[Fact]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[part]
    lists = ("paraphrases", "neighbours")
    return [Fact(**{**fact, **{key: tuple(fact[key]) for key in lists}}) for fact in found]


# ---- scoring


def scored(episode: fw.Episode, tokenizer: Tokenizer, fact: Fact, passage: Sequence[int], prefix: str = "") -> dict:
    """The scores of one fact in an episode of one row, each 0 to 1; `passage`: the loss of a text, in nats a token."""
    prompts = [prefix + text for text in (fact.asked, *fact.paraphrases, *fact.neighbours)]
    exam = fw.Exam(tokenizer, prompts, [f" {fact.new}", f" {fact.true}"])
    scores = episode.probe(exam).scores
    assert scores is not None
    gain_P = scores.difference.view(-1).cpu()
    edited_P, aside_P = gain_P[: 1 + len(fact.paraphrases)], gain_P[1 + len(fact.paraphrases) :]
    before = tokenizer.encode(prefix) if prefix else []
    logits_TV = episode.probe([[*before, *passage]]).logits[0, len(before) : -1].float()
    return {
        "efficacy": float(edited_P[0] > 0),
        "paraphrase": float((edited_P[1:] > 0).double().mean()),
        "neighbourhood": float((aside_P < 0).double().mean()),
        "passage": float(F.cross_entropy(logits_TV, torch.tensor(passage[1:], device=logits_TV.device))),
    }


def interval(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean, and the 95 % interval of means of facts drawn again with replacement."""
    x = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = x[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(x.mean()), low, high


# ---- ways of editing: each gives, fact by fact, an episode of one row and what stands in front of the prompts

Edited = Iterator[tuple[fw.Episode, str]]
Way = Callable[[Llama, Tokenizer, Sequence[Fact]], Edited]


def nothing(model: Llama, tokenizer: Tokenizer, chosen: Sequence[Fact]) -> Edited:
    for _ in chosen:
        yield fw.Episode(model), ""


def context(model: Llama, tokenizer: Tokenizer, chosen: Sequence[Fact]) -> Edited:
    for fact in chosen:
        yield fw.Episode(model), f"{fact.stated} "


def reading(
    model: Llama,
    tokenizer: Tokenizer,
    chosen: Sequence[Fact],
    rule: Rule,
    layers: range,
    passes: int = 1,
    object_alone: bool = False,
) -> Edited:
    """The stated fact is read so many times, each from an empty KV cache, and written by the rule.

    object_alone: only the tokens are written whose next one is of the new object.
    """
    fw.attach(model, list(layers), rule, overflow="grow")
    for start in range(0, len(chosen), ROWS):
        part = chosen[start : start + ROWS]
        ids = [tokenizer.encode(fact.stated) for fact in part]
        asked = [len(tokenizer.encode(fact.asked)) if object_alone else 1 for fact in part]
        longest = max(map(len, ids))
        padded = [row + [0] * (longest - len(row)) for row in ids]
        mask_FT = torch.tensor([[n < len(row) for n in range(longest)] for row in ids])
        # the last token writes nothing: it has no next one; and what comes before it predicts the full stop
        ends = [len(row) - (2 if object_alone else 1) for row in ids]
        write_FT = torch.tensor(
            [[a - 1 <= n < end for n in range(longest)] for a, end in zip(asked, ends, strict=True)]
        )
        episode: fw.Episode | None = None
        for _ in range(passes):
            before, episode = episode, fw.Episode(model, len(part))
            if before is not None:
                for address, log in before.logs.items():
                    episode.logs[address].copy_from(log)
            episode.feed(padded, update=write_FT, attention_mask=mask_FT, logits="last")
        for row in range(len(part)):
            assert episode is not None
            yield episode.fork(rows=[row]), ""


def ridge(model: Llama, tokenizer: Tokenizer, chosen: Sequence[Fact], mu: float, layers: range | None = None) -> Edited:
    """The stated fact as a context, made into weights for the prompt, alone and behind a text: `fw.ridge_patch`."""
    for fact in chosen:
        queries = [tokenizer.encode(prefix + fact.asked) for prefix in PREFIXES]
        stated = tokenizer.encode(f"{fact.stated}\n")
        yield fw.ridge_patch(model, stated, queries, mu, None if layers is None else list(layers)).episode, ""
        fw.detach(model)


def rome(model: Llama, tokenizer: Tokenizer, chosen: Sequence[Fact], covariance: bool, layer: int = LAYER) -> Edited:
    """ROME's closed form (Meng et al. 2022, eq. 2): ΔW = (v* − W k)(C⁻¹ k)ᵀ / (kᵀ C⁻¹ k) on the last linear of an MLP.

    k is its input at the subject's last token, v* what it should put out there, C = E[h hᵀ] over text; without
    covariance C = 1. The edit is one event: u = v* − W k, key = C⁻¹ k / (kᵀ C⁻¹ k).
    """
    C_II = second_moment(model, tokenizer, layer) if covariance else None
    down = [*model.config.family.linears][-1]
    for fact in chosen:
        k_I, change_O = target(model, tokenizer, fact, layer)
        key_I = k_I.double() if C_II is None else torch.linalg.solve(C_II, k_I.double())
        key_I = (key_I / (k_I.double() @ key_I)).to(k_I.dtype)
        fw.attach(model, layer, fw.Hebbian(0.0), down, overflow="grow")
        episode = fw.Episode(model)
        event = Events(change_O[None, None], key_I[None, None], None, torch.ones(1, 1, dtype=torch.bool))
        with episode.state.alone(), episode.state.attempt():
            episode.state.write((layer, down), event)
        yield episode, ""
        fw.detach(model)


@lru_cache(maxsize=256)
def target(
    model: Llama, tokenizer: Tokenizer, fact: Fact, layer: int, steps: int = 12, lr: float = 0.5, most: float = 4.0
) -> tuple[Tensor, Tensor]:
    """k [I] and v* − W k [O] of one fact: what, added to the stream, raises log p(new object) behind a few texts.

    Adam on −log p(new) + 0.0625 · KL(frozen, "{subject} is a"), within `most` · ‖W k‖. The model is frozen.
    """
    texts = [prefix + fact.asked for prefix in PREFIXES]
    new = tokenizer.encode(f" {fact.new}", add_special_tokens=False)
    rows = [tokenizer.encode(text) + new[:-1] for text in texts] + [tokenizer.encode(f"{fact.subject} is a")]
    subject = [len(tokenizer.encode(prefix + fact.up_to_subject)) - 1 for prefix in PREFIXES]
    at_P = torch.tensor([*subject, len(tokenizer.encode(fact.subject)) - 1])
    end, longest = [len(row) for row in rows], max(map(len, rows))
    padded = [row + [0] * (longest - len(row)) for row in rows]  # causal: no real token sees what stands behind it
    sites = ["act", "mlp_out", "resid_post"]
    seen = fw.Episode(model).probe(padded, sites=sites, layers=layer, logits="last", positions=range(longest))
    each, last = torch.arange(len(rows)), len(PREFIXES)
    k_I = seen["act", layer][each, at_P][:last].mean(0)
    size = seen["mlp_out", layer][each, at_P][:last].norm(dim=-1).mean()
    change_D = torch.zeros(model.config.hidden_size, dtype=k_I.dtype, device=k_I.device, requires_grad=True)
    x_PTD, adam = seen["resid_post", layer], torch.optim.Adam([change_D], lr=lr)
    row_N = [row for row in range(last) for _ in new] + [last]
    column_N = [end[row] - len(new) + n for row in range(last) for n in range(len(new))] + [end[last] - 1]
    positions = Positions.alone((len(rows), longest), None, model.device)

    def logprob_NV() -> Tensor:
        """After the prompts, as many rows as the object has tokens for each of them, and after the last text."""
        moved_PTD = x_PTD.index_put((each, at_P), change_D.expand(len(rows), -1), accumulate=True)
        stream_PTD = model.model.blocks(moved_PTD, positions, start=layer + 1)
        return model.unembed(stream_PTD[row_N, column_N]).log_softmax(-1)

    frozen_V = logprob_NV()[-1].detach()
    for _ in range(steps):
        with torch.enable_grad():
            found_NV = logprob_NV()
            says = found_NV[range(len(row_N) - 1), new * last].sum() / last
            loss = 0.0625 * F.kl_div(found_NV[-1], frozen_V, log_target=True, reduction="sum") - says
        (change_D.grad,) = torch.autograd.grad(loss, change_D)
        adam.step()
        with torch.no_grad():
            change_D.mul_((most * size / change_D.norm()).clamp(max=1))
    return k_I, change_D.detach()


@lru_cache(maxsize=8)
def second_moment(model: Llama, tokenizer: Tokenizer, layer: int, tokens: int = 6144, ridge: float = 1e-2) -> Tensor:
    """E[h hᵀ] of the inputs of the layer's last MLP linear over train texts, [I, I] float64, and ridge · its mean."""
    files = sorted((HERE / "texts" / "train").glob("*.txt"))
    each = tokens // len(files)
    C_II, count = torch.zeros(()), 0
    for file in files:
        ids = tokenizer.encode(file.read_text(encoding="utf-8")[: 8 * each])[:each]
        for start in range(0, len(ids), 512):
            with fw.capture(model, "act", layers=layer) as seen:
                fw.Episode(model).feed([ids[start : start + 512]], logits="last")
            h_TI = seen["act", layer][0].double()
            C_II, count = C_II + h_TI.T @ h_TI, count + len(h_TI)
    C_II = C_II / count
    return C_II + ridge * C_II.diagonal().mean() * torch.eye(len(C_II), dtype=C_II.dtype, device=C_II.device)


WAYS: dict[str, Way] = {
    "nothing": nothing,
    "context in the prompt": context,
    "gradient ascent": partial(reading, rule=fw.GradientAscent(0.3), layers=MIDDLE, passes=5, object_alone=True),
    "gradient ascent, every token": partial(reading, rule=fw.GradientAscent(0.1), layers=MIDDLE, passes=3),
    "Hebbian": partial(reading, rule=fw.Hebbian(0.1), layers=MIDDLE),
    "context_patch, ridge": partial(ridge, mu=1.0),
    "ROME, C = 1": partial(rome, covariance=False),
    "ROME, covariance": partial(rome, covariance=True),
}


def measure(
    model: Llama, tokenizer: Tokenizer, chosen: Sequence[Fact], ways: dict[str, Way] = WAYS
) -> dict[str, list[dict[str, float]]]:
    """{way: the scores of each fact}; the model is frozen before and after."""
    text = (HERE / "texts" / "held_out" / "alice.txt").read_text(encoding="utf-8")
    passage = tokenizer.encode(text[2000:3000], add_special_tokens=False)[:PASSAGE]
    found: dict[str, list[dict[str, float]]] = {}
    with bar("editing") as show:
        for n, (name, way) in enumerate(ways.items()):
            try:
                found[name] = []
                for fact, (episode, prefix) in zip(chosen, way(model, tokenizer, chosen), strict=True):
                    found[name].append(scored(episode, tokenizer, fact, passage, prefix))
                    show(n * len(chosen) + len(found[name]), len(ways) * len(chosen))
            finally:
                fw.detach(model)
    return found


# ---- for people


def lines(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """The table in Markdown: means, with the 95 % intervals of a bootstrap over facts."""
    out = ["| | efficacy | paraphrase | neighbourhood | passage (Δ nats) |", "|---|---|---|---|---|"]
    base = [each["passage"] for each in found.get("nothing", [])]
    for name, scores in found.items():
        cells = []
        for key in ("efficacy", "paraphrase", "neighbourhood"):
            mean, low, high = interval([each[key] for each in scores])
            cells.append(f"{100 * mean:.0f} % ({100 * low:.0f} to {100 * high:.0f})")
        apart = [each["passage"] - frozen for each, frozen in zip(scores, base, strict=False)]
        mean, low, high = interval(apart) if apart else (float("nan"),) * 3
        out.append(f"| {name} | {' | '.join(cells)} | {mean:+.3f} ({low:+.3f} to {high:+.3f}) |")
    return out


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="editing", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=WAYS, help="this way of editing alone, and those named so")
    parser.add_argument("--tune", action="store_true", help="on the facts that rates and layers were chosen on")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    model, tokenizer = fw.load(dtype="float32")
    assert tokenizer is not None  # the default model has one
    ways = {name: way for name, way in WAYS.items() if not options.only or name in options.only}
    found = measure(model, tokenizer, facts("tune" if options.tune else "facts"), ways)
    print("\n".join(lines(found)))
    if options.json:
        print(json.dumps(found))
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
