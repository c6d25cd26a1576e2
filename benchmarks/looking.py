"""Sweeps of edits against loops of hooks on transformers, and an edited generation against the modules it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastweights as fw

from . import measure
from .bed import Bed
from .decode import CONTEXT, STEPS, decoded, frozen_trial
from .measure import Check, Experiment, Trial

TOKENS = 14  # of the prompt that a sweep asks
LOOPED = 30  # alternatives that the hook loop runs: a sample of the sweep's, because each takes it as long as the next


def heads(bed: Bed, tokens: int = TOKENS) -> Experiment:
    """Every head mean-ablated, one after the other, and the logits of the last token each time."""
    episode, ids = _episode(bed), bed.ids(tokens)
    config, width = bed.config, bed.config.head_dim
    layers, heads_ = range(config.num_hidden_layers), range(config.num_attention_heads)
    reference = episode.probe(bed.ids(2 * tokens)[:, tokens:], sites="z")
    mean_LHE = reference["z"][:, 0].mean(1)
    sweep = [fw.ablate("z", "mean", reference, layers=n, heads=h) for n in layers for h in heads_]
    blocks = bed.peer.model.layers

    def hooked(number: int) -> Any:
        n, h = divmod(number, len(heads_))

        def ablate(_module: Any, args: tuple) -> tuple:
            z = args[0].clone()
            z[..., h * width : (h + 1) * width] = mean_LHE[n, h]
            return (z,)

        return blocks[n].self_attn.o_proj.register_forward_pre_hook(ablate)

    return _experiment(bed, episode, ids, sweep, hooked, "heads")


def patching(bed: Bed, tokens: int = TOKENS) -> Experiment:
    """The residual stream of another prompt put in before every layer, at every position."""
    episode, ids = _episode(bed), bed.ids(tokens)
    layers, positions = range(bed.config.num_hidden_layers), range(tokens)
    source = episode.probe(bed.ids(2 * tokens)[:, tokens:], sites="resid_pre")
    stream_LTD = source["resid_pre"][:, 0]
    sweep = [fw.patch("resid_pre", source, layers=n, positions=p) for n in layers for p in positions]
    blocks = bed.peer.model.layers

    def hooked(number: int) -> Any:
        n, p = divmod(number, tokens)

        def patch(_module: Any, args: tuple) -> tuple:
            x = args[0].clone()
            x[:, p] = stream_LTD[n, p]
            return (x, *args[1:])

        return blocks[n].register_forward_pre_hook(patch)

    return _experiment(bed, episode, ids, sweep, hooked, "layer × position")


def edited_decode(bed: Bed, context: int = CONTEXT, steps: int = STEPS) -> Experiment:
    """Greedy decoding with a head ablated in every token: against the modules, and against no edit at all."""
    frozen, episode, _ = frozen_trial(bed, context, steps)
    edit = fw.ablate("z", layers=bed.layers(1)[0], heads=0)

    def generated(edits: list[fw.Edit]) -> Tensor:
        for _ in episode.generate(None, steps, update="none", stop_token_ids=(), edits=edits):
            pass
        assert episode.logits is not None
        return episode.logits

    def on_modules() -> Tensor:
        handle = bed.model.model.norm.register_forward_hook(lambda *_: None)
        try:
            return decoded(episode, "none", steps)
        finally:
            handle.remove()

    def prepared(run: Callable[[], Tensor]) -> Tensor:
        frozen.prepare()
        return run()

    modules = replace(frozen, name="modules", run=on_modules)
    trials = [frozen, modules, replace(frozen, name="edited", run=partial(generated, [edit]))]
    same = partial(prepared, partial(generated, [fw.Edit("z", lambda x, at: x, layers=0)]))
    return Experiment(
        trials,
        [Check("an edit that changes nothing = no edit", same, partial(prepared, frozen.run), bed.tolerance)],
        [("edited", "modules"), ("edited", "frozen")],
        {"context": context, "steps": steps, "edit": repr(edit)},
        bars={"edited ÷ modules": "≤ 1.05"},
    )


def _episode(bed: Bed) -> fw.Episode:
    fw.detach(bed.model)
    return fw.Episode(bed.model)


def _experiment(
    bed: Bed, episode: fw.Episode, ids: Tensor, sweep: list[fw.Edit], hooked: Callable[[int], Any], what: str
) -> Experiment:
    """hooked: sets the hook of an alternative on the peer, and returns its handle."""
    sample = range(0, len(sweep), max(1, len(sweep) // LOOPED))

    def ours() -> Tensor:
        fw.detach(bed.model)
        return episode.probe(ids, sweep=sweep, logits="last").logits[:, 0, 0]

    def loop() -> Tensor:
        seen = []
        for number in sample:
            handle = hooked(number)
            try:
                with torch.no_grad():
                    seen.append(bed.peer(ids.to(bed.device), use_cache=False, logits_to_keep=1).logits[:, -1])
            finally:
                handle.remove()
        return torch.cat(seen)

    flops = measure.forward_flops(bed.config, ids.shape[1], heads=1)
    trials = [
        Trial("sweep", ours, len(sweep), flops=flops, memory=True),
        Trial("hook loop", loop, len(sample), flops=flops),
    ]
    return Experiment(
        trials,
        [Check("logits of alternatives = hook loop", lambda: ours()[list(sample)], loop, bed.amplified(10))],
        [("hook loop", "sweep")],
        {"alternatives": f"{len(sweep)} {what}, of which the loop runs {len(sample)}", "tokens": ids.shape[1]},
        "matmul",
        {"hook loop ÷ sweep": "≥ 3.5"} if bed.device.type == "cpu" else {},
    )
