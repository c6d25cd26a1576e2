"""Fast weights out into the world and back: ΔW as a PEFT LoRA folder, added to the weights, or read from a folder.

    LoRA (Hu et al. 2021): y = W x + b + scaling · B A x, A [r, I], B [O, r]      here A = K, B = (w ⊙ U)ᵀ, scaling = 1

Shape suffixes: R events or terms, O out, I in.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import LlamaConfig
from .episode_state import Address, EpisodeState
from .files import read_json, write_tensors, write_text
from .model import Llama
from .numbers import as_float
from .plastic import PlasticLinear, plastic_linears
from .state.compress import fold
from .state.events import Events
from .state.moments import Moment
from .stored import DTYPE_NAMES, more, open_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# keys of adapter_config.json that change nothing of a trained adapter on an unchanged model
HARMLESS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
        *("inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core"),
        *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    }
)
HANDLED = frozenset(
    {
        *("alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "lora_alpha", "lora_bias", "peft_type", "r", "rank_pattern", "target_modules"),
        "use_rslora",
    }
)
KEEP_THE_WEIGHTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others subtract something from W first


def names_of(config: LlamaConfig, addresses: Any) -> dict[Address, str]:
    """What the checkpoint calls each linear: "model.layers.3.mlp.gate_proj"."""
    names = config.family.names
    return {a: f"{names['model']}.{names['layers']}.{a[0]}.{names['mlp']}.{a[1]}" for a in addresses}


# ---- out


def export_peft(
    model: Llama,
    state: EpisodeState,
    folder: str | Path,
    row: int,
    moment: int | Moment | None,
    rank: int | None,
) -> dict[Address, tuple[float, float]]:
    """Writes ΔW and Δb of one row as a LoRA folder, see `FastWeights.export_peft`."""
    folder = Path(folder)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"export_peft(rank={rank!r}): expected a whole number, 1 or more, or None")
    _check_free(folder)
    terms = _terms(state, row, moment, "export_peft(moment=...)")
    errors, parts = {}, {}
    for address, (U_RO, K_RI, bias_R, w_R) in terms.items():
        delta_bias = (bias_R.double() * w_R) @ U_RO.double()
        U_RO, K_RI, errors[address] = _reduced(U_RO, K_RI, w_R, rank)
        parts[address] = (U_RO, K_RI, delta_bias.to(U_RO.dtype))
    with_bias = any(bool(delta_bias.any()) for _, _, delta_bias in parts.values())
    names, tensors, ranks = names_of(model.config, terms), {}, {}
    for address, (U_RO, K_RI, delta_bias) in parts.items():
        name = names[address]
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = K_RI, U_RO.T
        if with_bias:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = delta_bias
        ranks[name] = len(U_RO)
    _check_finite(tensors, "export_peft()")
    _write(folder, _config(ranks, model.config.family.transposed, with_bias), tensors)
    return errors


def merge(model: Llama, state: EpisodeState, row: int, moment: int | Moment | None) -> dict[str, Tensor]:
    """The model's state dict with ΔW and Δb added, see `FastWeights.merge`."""
    merged = dict(model.state_dict())
    terms = _terms(state, row, moment, "merge(moment=...)")
    names = names_of(model.config, terms)
    for address, (U_RO, K_RI, bias_R, w_R) in terms.items():
        weight, bias = (merged.get(f"{names[address]}.{part}") for part in ("weight", "bias"))
        U_RO = (U_RO.double() * w_R[:, None]).to(U_RO.dtype)
        delta_bias = bias_R @ U_RO
        if bias is None and bool(delta_bias.any()):
            raise ValueError(
                f"merge(): {names[address]} has a fast bias, and a {model.config.family.title} has no bias there to "
                "add it to: export_peft() can hold it"
            )
        assert weight is not None
        merged[f"{names[address]}.weight"] = _sum(weight, U_RO.T @ K_RI)
        if bias is not None:
            merged[f"{names[address]}.bias"] = _sum(bias, delta_bias)
    _check_finite({f"{name}.weight": merged[f"{name}.weight"] for name in names.values()}, "merge()")
    return merged


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """Their sum in the precision of `delta`, rounded once."""
    return (weight.to(delta.dtype) + delta.to(weight.device)).to(weight.dtype)


def _terms(
    state: EpisodeState, row: int, moment: int | Moment | None, where: str
) -> dict[Address, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """U [R, O], K [R, I], bias keys [R] and w [R] (float64) of every linear's events that count, at a moment."""
    if not state.logs:
        raise ValueError(f"{where.partition('(')[0]}(): the episode has no plastic linears")
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < state.states:
        raise ValueError(f"{where.partition('(')[0]}(row={row!r}): there are rows 0 to {state.states - 1}")
    if moment is not None and (isinstance(moment, bool) or not isinstance(moment, (int, Moment))):
        raise ValueError(f"{where} is {moment!r}, expected an event number, an fw.Moment or None")
    if isinstance(moment, int):
        moment = Moment(events=moment)
    if moment is not None:
        moment.check(max(log.event_counts[row] for log in state.logs.values()), state.logs, where)
    found = {}
    for address, log in state.logs.items():
        if moment is None:
            U_BRO, K_BRI, bias_BR = log.factors()
            norm_R = None if log.norm_BR is None else log.norm_BR[row, : log.used]
            w_R = log.weigh(log.birth_BR[row, : log.used], norm_R, log.event_counts[row])
        else:
            U_BRO, K_BRI, bias_BR, _ = log.moment_factors()
            w_R = moment.slot_weights(log, address, row, where).double()
        live_R = w_R != 0
        found[address] = (U_BRO[row][live_R], K_BRI[row][live_R], bias_BR[row][live_R], w_R[live_R])
    return found


def _reduced(U_RO: Tensor, K_RI: Tensor, w_R: Tensor, rank: int | None) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """w ⊙ U and K in at most `rank` terms, and no more than a matrix of this shape needs; and what that loses."""
    most = min(U_RO.shape[1], K_RI.shape[1], rank or math.inf)
    if not len(U_RO):  # PEFT has no rank 0
        return U_RO.new_zeros(1, U_RO.shape[1]), K_RI.new_zeros(1, K_RI.shape[1]), (0.0, 0.0)
    if len(U_RO) <= most:
        return (U_RO.double() * w_R[:, None]).to(U_RO.dtype), K_RI, (0.0, 0.0)
    best = fold(U_RO, K_RI, torch.zeros_like(w_R), w_R, int(most))
    return best.U_RO, best.K_RI, (best.error_2, best.error_F)


def _config(ranks: Mapping[str, int], transposed: bool, with_bias: bool) -> dict[str, Any]:
    """adapter_config.json: the most common rank as r, the others as patterns; alpha = rank, so the scaling is 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # patterns are regular expressions
    others = {re.escape(name): other for name, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "init_lora_weights": True,
    }
    return config | ({"lora_bias": True} if with_bias else {})


def _check_free(folder: Path) -> None:
    """Refuses a place that holds something else than an adapter."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to export into")
    others = sorted({path.name for path in folder.iterdir()} - {CONFIG, TENSORS}) if folder.exists() else []
    if others:
        raise ValueError(f"{folder} holds {others[0]}{more(others)}, expected a new folder, or an adapter to replace")


def _check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    if bad := [key for key, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{what}: {bad[0]}{more(bad)} would not be finite")


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes the folder under another name first: it appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.parent / f".{folder.name}.{os.getpid()}.{kind}" for kind in ("new", "old"))
    try:
        new.mkdir()
        write_text(new / CONFIG, json.dumps(config, indent=2) + "\n")
        write_tensors(new / TENSORS, tensors, {"format": "pt"})
        shutil.copymode(new / CONFIG, new / TENSORS)  # safetensors makes it readable for its owner alone
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# ---- in


def import_peft(model: Llama, folder: str | Path) -> None:
    """Sets what ΔW of every new episode begins with, see `FastWeights.import_peft`."""
    folder = Path(folder)
    linears = plastic_linears(model)
    config = _read_config(folder, model.config.family.transposed)
    tensors = _read_tensors(folder)
    halves = _halves(folder, config, tensors, names_of(model.config, linears))
    adapters = {a: _adapter(folder, config, linears[a], *half) for a, half in halves.items()}
    first = max(count(events) for events in [*adapters.values(), *(l.adapter for l in linears.values())])
    for address, linear in linears.items():
        adapter = adapters.get(address, linear.adapter)
        if linear.overflow == "error" or (linear.overflow == "evict" and adapter is not None):
            needs = first if linear.overflow == "error" else count(adapter)
            if needs > linear.rank:
                raise ValueError(
                    f"{folder}: {linear.name} would begin with {needs} events, over its rank of {linear.rank} "
                    f"(overflow={linear.overflow!r}): attach with a larger rank, or with overflow='grow'"
                )
    for address, events in adapters.items():
        linears[address].adapter = events


def count(events: Events | None) -> int:
    """How many events there are."""
    return 0 if events is None else events.write_BT.shape[1]


def _read_config(folder: Path, transposed: bool) -> dict[str, Any]:
    """adapter_config.json of a LoRA that is nothing but ΔW and Δb; any other is refused by the key that says so."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a folder that PEFT's save_pretrained wrote")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, expected 'LORA'")
    for key in sorted(config.keys() - HARMLESS - HANDLED):
        if config[key] not in (None, False, [], {}, ""):
            raise ValueError(f"{path}: {key} is {config[key]!r}, which fast weights cannot represent")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(f"{path}: bias is {bias!r}, which changes the model's own biases, expected 'none'")
    init = config.get("init_lora_weights")
    if init not in KEEP_THE_WEIGHTS:
        raise ValueError(
            f"{path}: init_lora_weights is {init!r}, whose adapter belongs to changed weights, expected true"
        )
    if bool(config.get("fan_in_fan_out")) != transposed:
        raise ValueError(f"{path}: fan_in_fan_out is {not transposed}, but this model's checkpoint wants {transposed}")
    for key in ("r", "lora_alpha"):
        config[key] = _number(path, key, config.get(key, 8))
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config[key] = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{path}: {key} is {patterns!r}, expected an object")
        config[key] = {pattern: _number(path, key, number) for pattern, number in patterns.items()}
    return config


def _number(path: Path, key: str, number: Any) -> int | float:
    whole = key in ("r", "rank_pattern")
    if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)) or not math.isfinite(number):
        raise ValueError(f"{path}: {key} holds {number!r}, expected a {'whole ' if whole else ''}number")
    return number


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        if pickle.is_file():
            raise ValueError(
                f"{pickle} is a pickle, which can run any code when it is read, expected {TENSORS}: "
                "load the adapter with PEFT and save it with save_pretrained"
            )
        raise FileNotFoundError(f"{path} does not exist, expected the adapter's tensors there")
    with open_file(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    for key, tensor in tensors.items():
        if tensor.dtype not in {getattr(torch, name) for name in DTYPE_NAMES.values()}:
            raise ValueError(f"{path}: {key} is stored as {tensor.dtype}, expected one of {', '.join(DTYPE_NAMES)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {key} holds numbers that are not finite")
    return tensors


def _halves(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Mapping[Address, str]
) -> dict[Address, tuple[str, Tensor, Tensor, Tensor | None]]:
    """The module's name, A, B and the bias of every linear that the adapter changes."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias)", key)
        if found is None:
            raise ValueError(
                f"{folder / TENSORS}: {key} is no half of a LoRA, which is all that fast weights represent"
            )
        modules.setdefault(found[1], {})[found[2]] = tensor
    here = {name: address for address, name in names.items()}
    if foreign := sorted(modules.keys() - here.keys()):
        plastic = ", ".join(here) or "no linears"
        raise ValueError(f"{folder}: the adapter changes {foreign[0]}{more(foreign)}, but plastic here are {plastic}")
    if not modules:
        raise ValueError(f"{folder / TENSORS} holds no tensors, expected the halves of a LoRA")
    for name, parts in modules.items():
        if not _targeted(config, name):
            raise ValueError(f"{folder}: {TENSORS} holds {name}, which {CONFIG} does not target")
        if missing := [part for part in ("lora_A.weight", "lora_B.weight") if part not in parts]:
            raise ValueError(f"{folder / TENSORS}: {name}.{missing[0]} is missing")
        if ("lora_B.bias" in parts) != bool(config.get("lora_bias")):
            raise ValueError(f"{folder}: lora_bias is {config.get('lora_bias')}, unlike what {TENSORS} holds of {name}")
    return {
        here[name]: (name, parts["lora_A.weight"], parts["lora_B.weight"], parts.get("lora_B.bias"))
        for name, parts in modules.items()
    }


def _targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would put an adapter there, by target_modules, exclude_modules and layers_to_transform."""

    def named(targets: Any) -> bool:
        if isinstance(targets, str):
            return targets == "all-linear" or re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    targets, layers = config.get("target_modules") or (), config.get("layers_to_transform")
    if not named(targets) or (config.get("exclude_modules") and named(config["exclude_modules"])):
        return False
    if layers is None or layers == [] or isinstance(targets, str) or name in targets:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(found[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _adapter(
    folder: Path,
    config: Mapping[str, Any],
    linear: PlasticLinear,
    name: str,
    A_RI: Tensor,
    B_OR: Tensor,
    bias_O: Tensor | None,
) -> Events:
    """A LoRA as events, B's columns times the scaling as values; its bias is one more, whose key is zero."""

    def of(key: str, default: str) -> int | float:
        patterns = config[key]
        return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", name)), config[default])

    rank, alpha = int(of("rank_pattern", "r")), of("alpha_pattern", "lora_alpha")
    wanted = {"lora_A": [rank, linear.in_features], "lora_B": [linear.out_features, rank]}
    for half, tensor in (("lora_A", A_RI), ("lora_B", B_OR)):
        if list(tensor.shape) != wanted[half]:
            raise ValueError(f"{folder}: {name}.{half}.weight has shape {list(tensor.shape)}, expected {wanted[half]}")
    if rank < 1:
        raise ValueError(f"{folder}: {name} has rank {rank}, expected 1 or more")
    if linear.budget is not None:
        raise ValueError(f"{folder}: {linear.name} has a budget, which is kept event by event: attach without one")
    scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    U_TO, K_TI, bias_T = B_OR.double().T * scaling, A_RI.double(), torch.zeros(rank, dtype=torch.float64)
    if bias_O is not None:
        if list(bias_O.shape) != [linear.out_features]:
            raise ValueError(
                f"{folder}: {name}.lora_B.bias has shape {list(bias_O.shape)}, expected [{linear.out_features}]"
            )
        if not linear.rule.bias:
            raise ValueError(
                f"{folder}: {name} has a lora_bias, but the rule of {linear.name} has no fast bias (bias=True)"
            )
        U_TO, K_TI = torch.cat([U_TO, scaling * bias_O.double()[None]]), torch.cat([K_TI, torch.zeros_like(K_TI[:1])])
        bias_T = torch.cat([bias_T, torch.ones_like(bias_T[:1])])
    largest, decay = float(U_TO.abs().max()), as_float(linear.rule.decay)
    if largest > (1 - decay) ** (len(U_TO) - 1) * torch.finfo(linear.factor_dtype).max:
        raise ValueError(
            f"{folder}: {name} is a sum of {len(U_TO)} events, of which a decay of {decay} leaves nothing: "
            "attach with a smaller decay"
        )
    ones = torch.ones(1, len(U_TO), dtype=torch.bool, device="cpu")
    return Events(U_TO[None], K_TI[None], bias_T[None], ones, True)
