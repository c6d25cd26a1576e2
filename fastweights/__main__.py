"""Command line: `fastweights demo`, `run`, `generate`, `eval-ppl`, `lens`, `patch`, `info`, `bench`."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .flags import Parser, parser_of

PLASTIC = ("linears", "rule", "rate", "mu", "decay", "clip", "gate", "target", "bias", "rank", "overflow", "budget")

DEMO: dict[str, Any] = {
    "context": (
        "As of August 24, 2025, the current President of the United States is **Donald J. Trump**. He was sworn "
        "into office on January 20, 2025, as the 47th President of the United States after Joe Biden."
    ),
    "question": (
        "Question: Who is the current US president?\nOption (A): Donald Trump.\nOption (B): Joe Biden.\nAnswer: ("
    ),
    "answers": ["A", "B"],
    "layers": [11, 12, 13],
}


def main(arguments: Sequence[str] | None = None) -> int:
    return _guarded(_main, sys.argv[1:] if arguments is None else list(arguments))


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["bench"]:
        from .benchmarks.bench import main as bench

        return bench(arguments[1:]) or 0
    options = _parser().parse_args(arguments)
    return options.command(options) or 0


def _guarded(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs a command; what the user got wrong becomes one line on stderr and exit status 2."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller; what is written to stderr must not go to stdout then
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the end)
        elif isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is written as an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return command(arguments)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is dealt with
    except BrokenPipeError:  # the reader went away: nobody is left to tell, now or at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError) as error:
        print(f"fastweights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastweights: interrupted", file=sys.stderr)
        return 130


# ---- the commands


def demo(options: argparse.Namespace) -> None:
    from . import GradientAscent, Hebbian, report

    halves: list[tuple[str, Any, dict[str, Any]]] = [
        ("gradient ascent after every token of the context", GradientAscent(rate=0.3, clip=0.005), {"update": "all"}),
        (
            "Hebbian, only tokens 10, 12 and 13, and the model goes on writing",
            Hebbian(rate=0.03),
            {"update": [10, 12, 13], "max_new_tokens": 12},
        ),
    ]
    _check_folder(options.out)
    model, tokenizer = _load(options)
    settings = {**DEMO, "layers": _layers(options.layers or DEMO["layers"], model)}
    print(f"context:\n{settings['context']}\n\nquestion:\n{settings['question']}\n")
    records = {}
    for title, rule, extra in halves:
        print(f"=== {title} (layers {', '.join(map(str, settings['layers']))}; {rule})\n")
        record = _surgery(options, model, tokenizer, rule=rule, **settings, **extra)
        print(report.table(record, rows=14))
        print(f"\n{_wrapped(report.paragraph(record))}\n")
        if any(event.generated for event in record.events) or "max_new_tokens" in extra:
            own = record.token_ids[-extra["max_new_tokens"] :]
            print(f"the model went on: {tokenizer.decode(own)!r}\n")
        records[title] = record
        if options.out:
            _save(record, Path(options.out) / type(rule).__name__)
            print()
    if options.json:
        print(json.dumps({title: {**r.to_dict(), "model": _name(options)} for title, r in records.items()}))


def run(options: argparse.Namespace) -> None:
    from . import report

    rule = _rule(options)
    _check_folder(options.out)
    model, tokenizer = _load(options)
    layers = _layers(options.layers, model)
    record = _surgery(
        options,
        model,
        tokenizer,
        context=options.context,
        question=options.question,
        answers=options.answers,
        layers=layers,
        rule=rule,
        linears=options.linears,
        rank=options.rank,
        overflow=options.overflow,
        budget=options.budget,
        over_budget=options.over_budget,
        update=options.update,
        max_new_tokens=options.max_new_tokens,
        probe_every=options.probe_every,
    )
    print(report.table(record))
    print(f"\n{_wrapped(report.paragraph(record))}\n\n{record.drift}")
    if options.out:
        print()
        _save(record, Path(options.out))
    if options.json:
        print(json.dumps({**record.to_dict(), "model": _name(options), "layers": layers}))


def generate(options: argparse.Namespace) -> None:
    import torch

    from . import Episode, attach

    _check_plastic(options, ["generate", ""], "over_budget", "drift")
    rule = _rule(options) if options.layers else None
    model, tokenizer = _load(options)
    if rule is not None:
        budget = {"budget": options.budget, "over_budget": options.over_budget}
        layers = _layers(options.layers, model)
        attach(model, layers, rule, options.linears, options.rank, options.overflow, **budget)
    text = options.prompt
    if options.chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    ids = tokenizer.encode(text, add_special_tokens=not options.chat)
    episode = Episode(model)
    steps = episode.generate(
        ids,
        options.max_new_tokens,
        update=options.update,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop_strings=options.stop,
        tokenizer=tokenizer,
    )
    print(f"prompt ids: {ids}", file=sys.stderr)  # generate() has accepted them
    new: list[int] = []
    text, reason = "", None
    with torch.no_grad():
        for step in steps:
            new += step.token_ids.tolist()
            text, reason = text + step.text[0], step.finish_reason[0]
            print(step.text[0], end="", flush=True)
    print()
    print(f"{len(new)} tokens, {episode.events} events, finish_reason: {reason}", file=sys.stderr)
    if options.drift:
        print(episode.drift(), file=sys.stderr)
    if options.json:
        whole: dict[str, Any] = {
            "prompt_ids": ids,
            "token_ids": new,
            "text": text,
            "finish_reason": reason,
            "events": episode.events,
        }
        whole |= {"drift": episode.drift().to_list()} if options.drift else {}
        print(json.dumps({**whole, "model": _name(options)}))


def eval_ppl(options: argparse.Namespace) -> None:
    from . import perplexity
    from .files import write_text
    from .progress import bar

    _check_plastic(options, ["eval-ppl", ""], "gamma", "over_budget")
    rule = _rule(options) if options.layers else None
    if options.tokens is not None and options.tokens < 2:
        raise ValueError(f"--tokens {options.tokens}: expected 2 or more")
    _check_folder(options.out)
    model, tokenizer = _load(options)
    names, texts = zip(*options.texts, strict=True)
    with bar("reading") as show:
        found = perplexity(
            model,
            [tokenizer.encode(text)[: options.tokens] for text in texts],
            rule,
            _layers(options.layers, model) if options.layers else None,
            linears=options.linears,
            rank=options.rank,
            overflow=options.overflow,
            budget=options.budget,
            over_budget=options.over_budget,
            length=options.length,
            stride=options.stride,
            reset=options.reset,
            names=names,
            progress=show,
        )
    whole = {**found.to_dict(options.buckets), "model": _name(options)}
    print(found.table(options.buckets))
    if options.out:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        found.picture(folder / "perplexity.png", options.buckets)
        write_text(folder / "perplexity.json", json.dumps(whole))
        print(f"\nsaved to {folder}: perplexity.json, perplexity.png")
    if options.json:
        print(json.dumps(whole))


def lens(options: argparse.Namespace) -> None:
    from torch import Tensor

    from . import Episode, Exam, report
    from . import lens as lens_of
    from . import rank as rank_of
    from .files import write_text
    from .probes.sites import site_of

    site, layer = site_of(options.site)
    if site.axes != "D" or site.side == "plastic" or site.name == "final_norm" or layer is not None:
        raise ValueError(f"--site {options.site}: expected a site of the stream's width, such as resid_post or mlp_out")
    _check_folder(options.out)
    model, tokenizer = _load(options)
    if not 1 <= options.top <= model.config.vocab_size:
        raise ValueError(f"--top {options.top}: expected 1 to {model.config.vocab_size}, the size of the vocabulary")
    if not (ids := tokenizer.encode(options.text)):
        raise ValueError("lens got an empty text: expected at least one token")
    answer_ids = None if options.answer is None else Exam(tokenizer, [options.text], [options.answer]).answer_ids[0][0]
    trace = Episode(model).probe(ids, sites=site.name, positions="last")
    # of resid_post the embedding is the first row, so that row ℓ is the stream after ℓ layers
    hidden = trace.hidden_states if site.name == "resid_post" else trace[site.name]
    logits_LV = lens_of(model, hidden.reshape(-1, hidden.shape[-1]), options.norm).double()
    chosen = logits_LV.topk(options.top)
    probability_LK = (chosen.values - logits_LV.logsumexp(-1, keepdim=True)).exp()
    layers = [
        [
            {"token": token, "logit": logit, "probability": probability}
            for token, logit, probability in zip(tokenizer.tokens(best), logits, probabilities, strict=True)
        ]
        for best, logits, probabilities in zip(
            *map(Tensor.tolist, (chosen.indices, chosen.values, probability_LK)), strict=True
        )
    ]
    whole: dict[str, Any] = {"layers": layers}
    if answer_ids is not None:
        rank = rank_of(logits_LV, answer_ids[0]).tolist()
        whole |= {"rank": rank, "first": rank.index(0) if 0 in rank else None}
    answer = tokenizer.tokens(answer_ids or [])
    print(report.lens_table(layers, answer, whole.get("rank"), site.name, options.norm))
    settings = {"site": site.name, "norm": options.norm, "answer": options.answer}
    if options.out:
        page = report.lens_page(
            text=options.text,
            model=_name(options),
            tokens=[[each["token"] for each in row] for row in layers],
            probabilities=[[each["probability"] for each in row] for row in layers],
            answer=answer[0] if answer else None,
            ranks=whole.get("rank"),
            settings=settings,
        )
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_text(Path(options.out, "report.html"), page)
        print(f"saved to {options.out}: report.html")
    if options.json:
        print(json.dumps({**whole, **settings, "ids": ids, "tokens": tokenizer.tokens(ids), "model": _name(options)}))


def patch(options: argparse.Namespace) -> None:
    from . import Episode, context_patch, report
    from .progress import bar

    if options.tokens < 0:
        raise ValueError(f"--tokens {options.tokens}: expected 0 or more")
    _check_folder(options.out)
    model, tokenizer = _load(options)
    context_ids = tokenizer.encode(options.context)
    query_ids = tokenizer.encode(options.query, add_special_tokens=False)
    for what, ids in (("context", context_ids), ("query", query_ids)):
        if not ids:
            raise ValueError(f"--{what} is empty: expected at least one token")
    if options.tokens:
        steps = Episode(model).generate([*context_ids, *query_ids], options.tokens)
        query_ids += [int(step.token_ids[0]) for step in steps]
    layers = None if options.layers is None else _layers(options.layers, model)
    with bar("patching") as show:
        made = context_patch(model, context_ids, query_ids, layers, show)
    whole = {**made.to_dict(), "tokens": tokenizer.tokens(query_ids)}
    whole["said"] = {run: tokenizer.tokens(ids) for run, ids in whole["choices"].items()}
    print(report.patch_table(whole))
    settings = {"model": _name(options), "context": options.context, "query": options.query}
    if options.out:
        _save_patch(whole, {**settings, "dtype": str(model.dtype)[6:]}, Path(options.out))
    if options.json:
        print(json.dumps({**whole, **settings}))


def info(options: argparse.Namespace) -> None:
    from . import Episode, anatomy

    model, tokenizer = _load(options)
    episode = Episode(model)
    episode.feed([0], update="none", logits="last")  # a token that is read says what such a pass runs on
    weights = {id(p): p for p in model.parameters()}.values()
    facts: dict[str, Any] = {
        "model": _name(options),
        "parameters": sum(p.numel() for p in weights),
        "bytes": sum(p.numel() * p.element_size() for p in weights),
        "dtype": str(model.dtype)[6:],
        "device": str(model.device),
        "path": episode.path,
        "why": episode.why,
        **model.config.to_dict(),
    }
    parts = anatomy(model)
    if options.text is not None:
        ids = tokenizer.encode(options.text)
        facts |= {"ids": ids, "tokens": tokenizer.tokens(ids)}
    for key, value in facts.items():
        print(f"{key:24} {value}")
    print(f"\n{parts}")
    if options.json:
        print(json.dumps({**facts, "anatomy": parts.to_dict()}))


# ---- from words to values


def _load(options: argparse.Namespace):
    """Model and tokenizer; the commands read text, so a checkpoint without a tokenizer is refused, but by `info`."""
    from . import load

    model, tokenizer = load(options.model, dtype=options.dtype, device=options.device, strict=options.strict)
    if tokenizer is None and (options.command is not info or options.text is not None):
        raise ValueError(f"{options.model} has no tokenizer, and this command turns text into ids with it")
    return model, tokenizer


def _surgery(options: argparse.Namespace, model, tokenizer, **settings):
    """The experiment with a live progress line on stderr; its record says which model it was."""
    from . import surgery
    from .progress import bar

    with bar("asking after each event") as show:
        record = surgery(model, tokenizer, **settings, progress=show)
    return replace(record, settings={"model": _name(options), **record.settings})


def _check_plastic(options: argparse.Namespace, bare: list[str], *names: str) -> None:
    """Refuses flags of plasticity where no layer is plastic; bare: the command without any."""
    left_out = vars(_parser().parse_args(bare))
    for name in (*PLASTIC, *names) if not options.layers else ():
        if getattr(options, name) != left_out[name]:
            raise ValueError(f"--{name.replace('_', '-')} needs --layers: without, nothing is plastic")


def _check_folder(path: str | None) -> None:
    if path and Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"--out {path} is a file, expected a folder")


def _save(record, folder: Path) -> None:
    names = record.save(folder)
    print(f"saved to {folder}: {', '.join(names)}")


def _save_patch(whole: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    from . import report
    from .files import write_text
    from .report import canvas

    fig = report.patch_picture(whole)
    page = report.patch_page(whole, settings, fig)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.html", page)
    canvas.save(fig, folder / "patch.png")
    print(f"saved to {folder}: report.html, patch.png")


def _rule(options: argparse.Namespace):
    from . import Delta, GradientAscent, Hebbian, LocalLeastSquares

    takes = {"hebbian": {"gate"}, "local-least-squares": {"gate", "target"}, "delta": {"target"}}
    given = {key: getattr(options, key) for key in ("mu", "decay", "clip", "bias", "gate", "target")}
    given = {key: value for key, value in given.items() if value is not None}
    for key in ("gate", "target"):
        if key in given and key not in takes.get(options.rule, ()):
            raise ValueError(f"--{key} does not belong to --rule {options.rule}")
    if getattr(options, "gamma", None) is not None and options.rule != "local-least-squares":
        raise ValueError(f"--gamma does not belong to --rule {options.rule}")
    match options.rule:
        case "hebbian":
            return Hebbian(rate=options.rate, **given)
        case "local-least-squares":
            many = isinstance(options.rate, tuple)
            gamma = options.rate if not many else 1.0 if options.gamma is None else options.gamma
            return LocalLeastSquares(gamma=gamma, rate=options.rate if many else 1.0, **given)
        case "delta":
            given["target"] = _target(given.get("target"))
            beta = {"beta": 1.0, "rate": options.rate} if isinstance(options.rate, tuple) else {"beta": options.rate}
            return Delta(**beta, **given)
        case _:
            return GradientAscent(rate=options.rate, **given)


def _target(path: str | None):
    """The v* of a delta rule: the one tensor of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None:
        raise ValueError("--rule delta needs --target FILE.safetensors with one tensor, v*: [O], [P, O] or [B, P, O]")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"--target {path} is not a safetensors file: {error}") from None
    if len(tensors) != 1:
        raise ValueError(f"--target {path} holds {len(tensors)} tensors, expected one")
    return next(iter(tensors.values()))


def _name(options: argparse.Namespace) -> str:
    return options.model or "SmolLM2-135M-Instruct"


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100)


def _layers(given: list[int] | str, model) -> list[int]:
    """Layer numbers; a negative one counts from the last layer."""
    depth = model.config.num_hidden_layers
    if isinstance(given, str):
        return list(range(depth))
    return [layer + depth if -depth <= layer < 0 else layer for layer in given]


def _parser() -> Parser:
    from . import __version__

    return parser_of(
        {
            "demo": demo,
            "run": run,
            "generate": generate,
            "eval-ppl": eval_ppl,
            "lens": lens,
            "patch": patch,
            "info": info,
        },
        __version__,
    )


if __name__ == "__main__":
    sys.exit(main())
