"""The list of cases: each builds what it times, the reference that must agree first, and the counts beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import looking, profiles, roles, shapes
from .bed import Bed
from .decode import CONTEXT, frozen_decode, overflow, plastic_decode
from .measure import Experiment
from .passes import moments, prefill
from .passes import overflow as prefill_overflow
from .whole import load, surgery


@dataclass(frozen=True)
class Case:
    name: str
    about: str
    build: Callable[[Bed], Experiment] | None = None
    measure: Callable[[Bed], dict[str, Any]] | None = None  # a case that times in its own way


def _cases() -> list[Case]:
    cases = [Case("decode.frozen", f"one token, context {CONTEXT}: against transformers", frozen_decode)]
    about = f"one token, context {CONTEXT}: against transformers' static cache, its step compiled"
    cases.append(Case("decode.compiled", about, partial(frozen_decode, compiled=True)))
    for rank in (16, 64, 256):
        about = f"3 layers, three linears, R = {rank}: against frozen"
        cases.append(Case(f"decode.plastic.r{rank}", about, partial(plastic_decode, rank=rank)))
    about = "all layers, three linears, R = 64: against frozen"
    cases.append(Case("decode.plastic.all-layers", about, partial(plastic_decode, rank=64, count=None)))
    for linears in (("gate_proj",), ("up_proj",), ("down_proj",), ("gate_proj", "up_proj")):
        name = "+".join(linears)
        about = f"3 layers, {name} alone, R = 64: against frozen"
        cases.append(Case(f"decode.plastic.{name}", about, partial(plastic_decode, rank=64, linears=linears)))
    about = "3 layers, three linears, R = 64, logs that are full: compress, evict and grow against frozen"
    cases.append(Case("decode.overflow", about, overflow))
    cases.append(Case("decode.behind", "one token behind long contexts: against a short one", shapes.behind))
    about = "a step of many rows, frozen and plastic (3 layers, R = 64): against one row"
    cases.append(Case("decode.rows", about, shapes.rows))
    for rows in (1, 16):
        about = f"the kernels of a step of {rows} rows by role: against torch's products"
        cases.append(Case(f"kernels.rows{rows}", about, partial(roles.step_kernels, rows=rows)))
    cases.append(
        Case("decode.gradient", "gradient ascent after every token, 3 layers: against frozen", shapes.gradient)
    )
    cases.append(Case("forward.short", "model(ids) of 1 to 128 tokens: against transformers", shapes.short))
    for tokens in (128, 512, 2048):
        about = f"{tokens} tokens in one pass, all written: against frozen and transformers"
        cases.append(Case(f"prefill.{tokens}", about, partial(prefill, tokens=tokens)))
    about = "512 tokens into logs of rank 64: compress, evict and grow against frozen"
    cases.append(Case("prefill.overflow", about, prefill_overflow))
    cases.append(Case("reads.moments", "a probe at 8, 32 and 128 moments: against one probe at now", moments))
    cases.append(Case("surgery", "the experiment: against a hook loop on transformers with dense updates", surgery))
    cases.append(Case("sweep.heads", "every head ablated: against a hook loop on transformers", looking.heads))
    about = "the stream patched, layer × position: against a hook loop on transformers"
    cases.append(Case("sweep.patching", about, looking.patching))
    about = f"one token under an edit, context {CONTEXT}: against the modules and against frozen"
    cases.append(Case("decode.edited", about, looking.edited_decode))
    for name, about, profile in (
        ("decode.frozen", "frozen decode, a token", profiles.frozen_decode),
        ("decode.plastic", "plastic decode, 3 layers, R = 64, a token", profiles.plastic_decode),
        ("prefill.frozen", "2048 tokens in one pass, frozen", profiles.frozen_prefill),
        ("prefill.plastic", "2048 tokens in one pass, all written in 3 layers", profiles.plastic_prefill),
        ("probe", "a probe of 45 tokens", profiles.probe),
        ("moments", "the same at 64 moments", partial(profiles.probe, at="every")),
    ):
        cases.append(Case(f"profile.{name}", f"where the time goes: {about}", measure=profile))
    cases.append(Case("load", "load time and peak memory: against reading the file", measure=load))
    return cases


CASES = {case.name: case for case in _cases()}
