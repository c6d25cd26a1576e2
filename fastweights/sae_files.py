"""A folder with a sparse autoencoder → its settings and tensors: SAELens, Gemma Scope, sparsify."""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .families import FAMILIES
from .files import one_line, read_json
from .probes.sites import site_of
from .stored import open_file

ARCHITECTURES = ("standard", "gated", "jumprelu", "topk")
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
BIASES = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
}
# settings that change what is computed, and why each is refused where it is set
REFUSED = {
    "transcode": "a transcoder predicts another site than it reads",
    "is_transcoder": "a transcoder predicts another site than it reads",
    "use_b_dec_out": "a transcoder predicts another site than it reads",
    "skip_connection": "an SAE with a linear skip connection is not computed here",
    "embed_skip": "an SAE with a skip connection from the embedding is not computed here",
    "gram_lookup": "an SAE that subtracts a table of n-grams is not computed here",
    "signed": "features of both signs are not computed here",
    "hook_head_index": "an SAE of one head alone is not computed here",
    "hook_point_head_index": "an SAE of one head alone is not computed here",
    "fold_value_biases": "the SAE was trained on another z than the model's",
    "refactor_factored_attn_matrices": "the SAE was trained on other q, k, v and z than the model's",
}
# keys of a cfg.json of SAELens 6: those that are read, then those that only its training reads
SAELENS_6 = {
    *("architecture", "d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "metadata"),
    *("k", "rescale_acts_by_decoder_norm", "reshape_activations", "dtype", "device"),
    *("decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps"),
    *("jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
    *("jumprelu_ste_to_input", "pre_act_loss_coefficient", "target_l0", "aux_loss_coefficient", "topk_threshold_lr"),
    *("use_sparse_activations", "noise_scale", "mse_loss_normalization"),
}
SPARSIFY = {
    *("d_in", "k", "num_latents", "expansion_factor", "activation", "transcode", "skip_connection", "signed"),
    *("embed_skip", "gram_lookup", "lookup_max_order", "gram_table_hash"),
    *("normalize_decoder", "multi_topk"),  # of the training alone: the stored decoder is normalised
}


@dataclass(frozen=True)
class Settings:
    """What a folder says of its SAE, in the words of SAELens 6."""

    path: Path  # the file that says it
    architecture: str
    hook: str | None = None  # where it reads; None: not said
    layer: int | None = None  # said without a hook
    d_in: int | None = None
    d_sae: int | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize: str = "none"
    scale: float | None = None  # of expected_average_only_in
    rescale_acts_by_decoder_norm: bool = False
    finetuned: bool = False  # decoded features are multiplied by a factor each
    centered: bool | None = None  # trained on activations without their mean over D; None: not said
    model: str = ""


def read_sae(folder: Path) -> tuple[Settings, dict[str, Tensor]]:
    """Settings and checked tensors, named as in SAELens: W_enc [D, N], W_dec [N, D], b_dec [D], vectors [N].

    Raises ValueError or FileNotFoundError with one sentence that names the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder, expected one that holds an SAE")
    readers = {"sae_weights.safetensors": _saelens, "params.npz": _gemma_scope, "sae.safetensors": _sparsify}
    for name, reader in readers.items():
        if (path := folder / name).is_file():
            settings, tensors = reader(path)
            return settings, _checked(path, settings, tensors)
    inner = sorted(path.parent.name for name in readers for path in folder.glob(f"*/{name}"))
    raise FileNotFoundError(
        f"{folder} holds no SAE, expected sae_weights.safetensors (SAELens), params.npz (Gemma Scope) or "
        f"sae.safetensors (sparsify)" + (f"; it holds folders that do, as {folder / inner[0]}" if inner else "")
    )


def place_of(hook: str) -> tuple[int | None, str | None]:
    """Layer and site of a hook named as in TransformerLens or by a module; (None, None) where it is no site.

    A module may have another prefix before "layers" or "h" than its family, or none. A name that means several sites,
    each in some families, is none, because the family is not known: "mlp.hook_pre" is gate or up.
    """
    inner = re.sub(r"^.*?((?:layers|h)\.\d)", r"\1", hook)
    for named in ("{hook}", "{model}.{inner}"):
        found = set()
        for family in FAMILIES.values():
            with contextlib.suppress(ValueError):
                name = named.format(hook=hook, inner=inner, model=family.names["model"])
                site, layer = site_of(name, family)
                found.add((layer, site.name if site.axes not in ("HS", "HD") else None))
        if found:
            return found.pop() if len(found) == 1 else (None, None)
    return None, None


# ---- SAELens


def _saelens(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    config = _config(path)
    said = path.with_name("cfg.json")
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"{said}: metadata is {_json(metadata)}, expected an object")
    kwargs = config.get("model_from_pretrained_kwargs") or metadata.get("model_from_pretrained_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f"{said}: model_from_pretrained_kwargs is {_json(kwargs)}, expected an object")
    _refuse_settings(said, {**config, **metadata, **kwargs})
    if "metadata" in config:
        _refuse_unknown(said, config, SAELENS_6)
    hook = next((at[key] for at in (config, metadata) for key in ("hook_name", "hook_point") if at.get(key)), None)
    out = next((at["hook_name_out"] for at in (config, metadata) if at.get("hook_name_out")), hook)
    if out != hook or config.get("d_out", config.get("d_in")) != config.get("d_in"):
        raise ValueError(f"{said}: it reads {hook} and predicts {out}, expected an SAE, which predicts what it reads")
    architecture, k = _architecture(said, config)
    normalize = _normalization(said, config.get("normalize_activations"))
    scaler = read_json(path.with_name("activation_scaler.json"))  # beside a checkpoint that was not folded
    settings = Settings(
        said,
        architecture,
        hook,
        d_in=_whole(said, "d_in", config.get("d_in")),
        d_sae=_whole(said, "d_sae", config.get("d_sae")),
        k=_whole(said, "k", k),
        apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
        normalize=normalize,
        scale=scaler.get("scaling_factor"),
        rescale_acts_by_decoder_norm=architecture == "topk" and bool(config.get("rescale_acts_by_decoder_norm")),
        finetuned=bool(config.get("finetuning_scaling_factor")),
        centered=None if "center_writing_weights" not in kwargs else bool(kwargs["center_writing_weights"]),
        model=str(config.get("model_name") or metadata.get("model_name") or ""),
    )
    return settings, _safetensors(path)


def _architecture(path: Path, config: Mapping[str, Any]) -> tuple[str, Any]:
    """The architecture and its k: before 6.0, topk was an activation of the standard one."""
    architecture = config.get("architecture") or ("standard" if "metadata" not in config else None)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: architecture is {_json(architecture)}, expected one of {', '.join(ARCHITECTURES)} "
            "(SAELens saves a finished batchtopk as jumprelu)"
        )
    activation = config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    kwargs = dict(config.get("activation_fn_kwargs") or {})
    k = config.get("k") or kwargs.pop("k", None)
    if activation == "topk" and architecture in ("standard", "topk"):
        architecture = "topk"
    elif activation != "relu":
        raise ValueError(f"{path}: activation is {_json(activation)} in a {architecture} SAE, expected relu or topk")
    if changed := [key for key, value in kwargs.items() if value]:
        raise ValueError(f"{path}: activation_fn_kwargs holds {changed[0]} = {_json(kwargs[changed[0]])}, expected k")
    return architecture, k


def _normalization(path: Path, value: Any) -> str:
    name = value or "none"
    if isinstance(value, bool):  # before 6.0
        name = "expected_average_only_in" if value else "none"
    if name not in NORMALIZATIONS:
        raise ValueError(
            f"{path}: normalize_activations is {_json(value)}, expected one of {', '.join(NORMALIZATIONS)}"
        )
    return name


# ---- Gemma Scope, sparsify


def _gemma_scope(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    """Layer and site stand in the path alone: …/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    parts = list(reversed(path.parent.absolute().parts))
    layer = next((match[1] for part in parts if (match := re.fullmatch(r"layer_(\d+)", part))), None)
    kinds = [match[1] for part in parts if (match := re.search(r"gemma-scope-.*-(res|att|mlp|transcoders)(-|$)", part))]
    if kinds[:1] == ["transcoders"]:
        raise ValueError(f"{path}: Gemma Scope's transcoders predict another site than they read, expected an SAE")
    if layer is None and "embedding" in parts:
        raise ValueError(f"{path}: Gemma Scope's SAEs of the embedding read it on another scale, and are not read here")
    names = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out"}
    hook = f"blocks.{layer}.{names[kinds[0]]}" if layer and kinds else None
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                tensors["W_" + name[2:] if name.startswith("w_") else name] = torch.from_numpy(file[name])
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole .npz file of numbers ({one_line(error)})") from None
    settings = Settings(path, "jumprelu", hook, apply_b_dec_to_input=False, centered=False)
    return replace(settings, layer=None if layer is None else int(layer)), tensors


def _sparsify(path: Path) -> tuple[Settings, dict[str, Tensor]]:
    config = _config(path)
    said = path.with_name("cfg.json")
    _refuse_settings(said, config)
    _refuse_unknown(said, config, SPARSIFY)
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{said}: activation is {_json(config['activation'])}, expected topk")
    d_in, k = (_whole(said, key, config.get(key)) for key in ("d_in", "k"))
    d_sae = config.get("num_latents") or (d_in or 0) * config.get("expansion_factor", 0) or None
    parts = path.parent.absolute().parts
    hook = next((part for part in reversed(parts) if re.search(r"(^|\.)(layers|h)\.\d+|^embed_tokens$", part)), None)
    renamed = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    tensors = {renamed.get(name, name): tensor for name, tensor in _safetensors(path).items()}
    if tensors.get("W_enc") is not None and tensors["W_enc"].ndim == 2:
        tensors["W_enc"] = tensors["W_enc"].T
    d_sae = _whole(said, "num_latents", d_sae)
    return Settings(said, "topk", hook, d_in=d_in, d_sae=d_sae, k=k, centered=False), tensors


# ---- what all formats share


def _config(path: Path) -> dict[str, Any]:
    said = path.with_name("cfg.json")
    if not said.is_file():
        raise FileNotFoundError(f"{said} is missing, expected the settings of {path.name}")
    return read_json(said)


def _json(value: Any) -> str:
    return json.dumps(value)[:80]


def _whole(path: Path, name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value)):
        raise ValueError(f"{path}: {name} is {_json(value)}, expected a whole number")
    return None if value is None else int(value)


def _refuse_settings(path: Path, config: Mapping[str, Any]) -> None:
    for key, why in REFUSED.items():
        if (value := config.get(key)) is not None and value is not False:
            raise ValueError(f"{path}: {key} is {_json(value)}: {why}")


def _refuse_unknown(path: Path, config: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(config.keys() - known - REFUSED.keys()):
        raise ValueError(f"{path}: {', '.join(unknown)} may change what the SAE computes, and is not known here")


def _safetensors(path: Path) -> dict[str, Tensor]:
    with open_file(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 a handle, not a dictionary


def _checked(path: Path, settings: Settings, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the architecture reads, all of them there, of one shape and finite."""
    tensors = dict(tensors)
    factor = tensors.pop("scaling_factor", tensors.pop("finetuning_scaling_factor", None))
    if factor is not None and settings.finetuned:
        tensors["finetuning_scaling_factor"] = factor
    elif factor is not None and not bool((factor == 1).all()):  # SAELens wrote ones for a while
        raise ValueError(f"{path} holds scaling factors, and {settings.path.name} says finetuning_scaling_factor false")
    wanted = ["W_enc", "W_dec", "b_dec", *BIASES[settings.architecture]]
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(f"{path} has no {missing[0]}, which a {settings.architecture} SAE needs")
    if unknown := sorted(tensors.keys() - {*wanted, "finetuning_scaling_factor"}):
        raise ValueError(f"{path} holds {unknown[0]}, which a {settings.architecture} SAE does not read")
    if tensors["W_dec"].ndim != 2:
        raise ValueError(f"{path}: W_dec is {list(tensors['W_dec'].shape)}, expected [N, D]")
    stored_N, stored_D = tensors["W_dec"].shape
    N, D = settings.d_sae or stored_N, settings.d_in or stored_D
    shapes = {"W_enc": [D, N], "W_dec": [N, D], "b_dec": [D]}
    for name in sorted(tensors, key=[*wanted, "finetuning_scaling_factor"].index):
        tensor = tensors[name]
        if list(tensor.shape) != (shape := shapes.get(name, [N])):
            raise ValueError(f"{path}: {name} is {list(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype}, expected floats")
        if not bool((tensor.isnan().logical_not() if name == "threshold" else tensor.isfinite()).all()):
            raise ValueError(f"{path}: {name} holds numbers that are not finite")
    if settings.architecture == "topk" and not 1 <= (settings.k or 0) <= N:
        raise ValueError(f"{settings.path}: k is {_json(settings.k)}, expected a number from 1 to {N}, the features")
    return tensors
