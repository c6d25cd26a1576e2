"""What `attach` and an episode are given, made into what linears need, or refused by name."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .model import Llama
from .passes import Site
from .rules import Rule, twin_of
from .state.budget import OVER_BUDGET, Budget

if TYPE_CHECKING:
    from .plastic import PlasticLinear


def factor_dtype_of(asked: torch.dtype | None, model: Llama) -> torch.dtype:
    least = torch.float64 if model.dtype == torch.float64 else torch.float32
    if asked is not None and asked not in (least, torch.float64):
        raise ValueError(
            f"factor_dtype={asked}: expected {' or '.join({str(least): 0, 'torch.float64': 0})} for a "
            f"{str(model.dtype)[6:]} model (small events vanish in narrower sums)"
        )
    return asked or least


def budget_of(model: Llama, site: Site, share: float | None, over: str) -> Budget | None:
    if over not in OVER_BUDGET:
        raise ValueError(f"over_budget={over!r}: expected one of {', '.join(map(repr, OVER_BUDGET))}")
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
        raise ValueError(f"budget={share!r}: expected a share of ‖W‖, a number above 0, or None")
    norm = weight_norm(getattr(model.model.layers[site[0]].mlp, site[1]))
    if not norm:
        raise ValueError(f"budget={share!r}: layers.{site[0]}.mlp.{site[1]} is zero, and so is any share of it")
    return Budget(float(share), over, share * norm)


def weight_norm(linear: nn.Linear | PlasticLinear) -> float:
    """‖W‖_F, summed in float64."""
    return float(torch.linalg.vector_norm(linear.weight.detach(), dtype=torch.float64))


def backend_of(backend: str, model: Llama, rule: Rule, factor_dtype: torch.dtype) -> str:
    known, cuda = twin_of(rule) is not None, model.device.type == "cuda"
    match backend:
        case "torch":
            return "torch"
        case "auto":
            if cuda and not known and rule.neuron_local:
                warnings.warn(f"{type(rule).__name__} has no Triton twin: it runs on torch", stacklevel=3)
            return "triton" if cuda and known and factor_dtype != torch.float64 else "torch"
        case "triton":
            if not known:
                raise ValueError(f"backend='triton': {type(rule).__name__} has no Triton twin, use 'torch'")
            if model.dtype == torch.float64:
                raise ValueError("backend='triton' computes in float32: use 'torch' for a float64 model")
            if factor_dtype == torch.float64:
                raise ValueError("backend='triton' computes in float32: use 'torch' for factor_dtype=torch.float64")
            if not cuda and os.environ.get("TRITON_INTERPRET") != "1":
                raise ValueError(
                    f"backend='triton' needs CUDA (or TRITON_INTERPRET=1): this model is on {model.device}"
                )
            return "triton"
    raise ValueError(f"backend={backend!r}: expected 'auto', 'torch' or 'triton'")


def check_target(model: Llama, rule: Rule, sites: Sequence[Site]) -> None:
    target = getattr(rule, "target", None)
    if not isinstance(target, Tensor):
        return
    for layer, name in sites:
        width = getattr(model.model.layers[layer].mlp, name).out_features
        if target.shape[-1] != width:
            raise ValueError(
                f"{type(rule).__name__}(target=...) has shape {list(target.shape)}, "
                f"but layers.{layer}.mlp.{name} needs a last dimension of {width}"
            )


def check_targets(linears: Mapping[Site, PlasticLinear], rows: int, position_BT: Tensor, write_BT: Tensor) -> None:
    """Refuses written positions and rows that a rule's target does not reach."""
    for plastic in linears.values():
        target = getattr(plastic.rule, "target", None)
        if not isinstance(target, Tensor) or target.dim() == 1 or not write_BT.any():
            continue
        last = int(position_BT[write_BT].max())
        if last >= target.shape[-2] or (target.dim() == 3 and len(target) != rows):
            raise ValueError(
                f"{plastic.name}: the rule's target has shape {list(target.shape)}, "
                f"but position {last} of {rows} rows is to be written"
            )


def check_rows(linears: Mapping[Site, PlasticLinear], rows: int, shared: bool) -> None:
    """Refuses rates that are not one per row, and what rows that share one ΔW cannot have."""
    for plastic in linears.values():
        if shared and rows > 1 and plastic.budget is not None:
            raise ValueError(
                f"{plastic.name} has a budget, which is kept event by event, but the rows of a shared episode write "
                "side by side: expected shared=False or a linear without a budget"
            )
        rate, rule = plastic.rule.rate, type(plastic.rule).__name__
        if isinstance(rate, tuple) and len(rate) != rows:
            raise ValueError(
                f"{plastic.name}: {rule} has {len(rate)} rates, one per row, but this episode has batch {rows}"
            )
        if isinstance(rate, tuple) and shared and plastic.backend == "triton":
            raise ValueError(
                f"{plastic.name}: {rule} has a rate per row, which a shared episode cannot run on backend='triton': "
                "attach with backend='torch'"
            )
