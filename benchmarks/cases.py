"""The list of cases: each builds what it times, the reference that must agree first, and the counts beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .bed import ALL, Bed
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
    for rank in (16, 64, 256):
        about = f"3 layers, three linears, R = {rank}: against frozen"
        cases.append(Case(f"decode.plastic.r{rank}", about, partial(plastic_decode, rank=rank)))
    about = "all layers, three linears, R = 64: against frozen"
    cases.append(Case("decode.plastic.all-layers", about, partial(plastic_decode, rank=64, count=None)))
    for name, linears in (*((n, (n,)) for n in ALL), ("gate_proj+up_proj", ("gate_proj", "up_proj"))):
        about = f"3 layers, {name} alone, R = 64: against frozen"
        cases.append(Case(f"decode.plastic.{name}", about, partial(plastic_decode, rank=64, linears=linears)))
    about = "3 layers, three linears, R = 64, logs that are full: compress, evict and grow against frozen"
    cases.append(Case("decode.overflow", about, overflow))
    for tokens in (128, 512, 2048):
        about = f"{tokens} tokens in one pass, all written: against frozen and transformers"
        cases.append(Case(f"prefill.{tokens}", about, partial(prefill, tokens=tokens)))
    about = "512 tokens into logs of rank 64: compress, evict and grow against frozen"
    cases.append(Case("prefill.overflow", about, prefill_overflow))
    cases.append(Case("reads.moments", "a probe at 8, 32 and 128 moments: against one probe at now", moments))
    cases.append(Case("surgery", "the experiment: against a hook loop on transformers with dense updates", surgery))
    cases.append(Case("load", "load time and peak memory: against reading the file", measure=load))
    return cases


CASES = {case.name: case for case in _cases()}
