"""A folder of safetensors → where each tensor of a model is stored, under the names of its class in transformers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .config import LlamaConfig
from .files import one_line

PICKLES = ("pytorch_model*", "consolidated*.pth", "*.pth", "*.pt", "*.bin", "*.ckpt")
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, under which name, and what its header says."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name: "F32", "BF16", ...


def head_of(config: LlamaConfig) -> str:
    """The name of the unembedding's weight."""
    return f"{config.family.names['lm_head']}.weight"


def embedding_of(config: LlamaConfig) -> str:
    names = config.family.names
    return f"{names['model']}.{names['embed_tokens']}.weight"


def lies_transposed(config: LlamaConfig, key: str, shape: Iterable[int]) -> bool:
    """Whether a checkpoint of this family holds this weight, [O, I] here, as [I, O]."""
    names = config.family.names
    inside = key.startswith(f"{names['model']}.{names['layers']}.")
    return config.family.transposed and inside and len(tuple(shape)) == 2


def stored_tensors(folder: Path, config: LlamaConfig, wanted: Iterable[str]) -> dict[str, Stored]:
    """Every tensor in the folder's safetensors, from their headers, under the names of `wanted` where it is one.

    Tied weights come once, as the embedding. Raises ValueError or FileNotFoundError that names what is wrong.
    """
    stored = _canonical(_stored(folder), wanted, config)
    _resolve_tied(config, stored, folder)
    return stored


def check_dtypes(stored: Mapping[str, Stored]) -> None:
    """Refuses a tensor that is stored as something else than a float of DTYPE_NAMES."""
    for key, tensor in stored.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ValueError(
                f"{tensor.path}: {key} is stored as {tensor.dtype}, expected one of {', '.join(DTYPE_NAMES)}"
            )


def _canonical(stored: dict[str, Stored], wanted: Iterable[str], config: LlamaConfig) -> dict[str, Stored]:
    """The tensors under the names of the family, without the buffers that old checkpoints hold.

    What a model without a head saved has no `model.` before its names; wrappers (torch.compile, DataParallel, PEFT) put
    more before it. The prefix is what stands before the first norm.
    """
    buffers = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # config.json decides
    roles, head = config.family.names, head_of(config)
    stored = {key: t for key, t in stored.items() if not key.endswith((*buffers, *config.family.ignored))}
    norm = roles.get("before_attention") or roles["after_attention"]
    mark, model = f"{roles['layers']}.0.{norm}.weight", f"{roles['model']}."
    prefix = next((key.removesuffix(mark) for key in stored if key.endswith(mark)), model)
    outer = prefix.removesuffix(model)
    names, wanted = {key: key for key in stored}, set(wanted)
    for key in stored:
        if key.startswith(prefix) and (name := model + key.removeprefix(prefix)) in wanted:
            names[key] = name
        elif key in (outer + head, outer + "lm_head.weight"):
            names[key] = head
    if len(set(names.values())) < len(names):  # two tensors would get one name
        return stored
    return {names[key]: tensor for key, tensor in stored.items()}


def _resolve_tied(config: LlamaConfig, stored: dict[str, Stored], folder: Path) -> None:
    """Leaves one of the tied weights, as the embedding: either may be stored, or both if they are equal."""
    name, tied_to = head_of(config), embedding_of(config)
    if not (config.tie_word_embeddings and name in stored):
        return
    head = stored.pop(name)
    if (embedding := stored.setdefault(tied_to, head)) is head:
        return
    with open_file(head.path) as one, open_file(embedding.path) as other:
        if not torch.equal(one.get_tensor(head.name), other.get_tensor(embedding.name)):
            raise ValueError(
                f"{folder}: config.json says tie_word_embeddings, but {name} differs from {tied_to}: "
                "set tie_word_embeddings to false there to use both"
            )


def _files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise _no_weights(folder)
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not readable, expected an object with a weight_map") from None
    for key, file in where:
        if not isinstance(file, str) or Path(file).is_absolute() or Path(file).name != file or file in ("", "..", "."):
            raise ValueError(f"{index}: {key} is said to be in {file!r}, expected the name of a file in {folder}")
    names = sorted({file for _, file in where})
    if missing := [name for name in names if not (folder / name).is_file()]:
        key = next(key for key, file in where if file == missing[0])
        raise FileNotFoundError(
            f"{index}: {key} is said to be in {missing[0]}, which is missing from {folder}: "
            f"fetch {', '.join(missing)}, {len(missing)} of {len(names)} files"
        )
    return [folder / name for name in names]


def _no_weights(folder: Path) -> Exception:
    """The refusal of a folder without safetensors, which says what to do with what it holds."""
    save = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r}) in transformers"
    if pickles := [path.name for kind in PICKLES for path in sorted(folder.glob(kind))]:
        how = (
            "convert it with transformers' convert_llama_weights_to_hf.py"
            if pickles[0].startswith("consolidated")
            else f"convert it with transformers' save_pretrained: {save}"
        )
        return ValueError(
            f"{folder} holds its weights only as {pickles[0]}, a pickle that can run any code when it is "
            f"read, expected model.safetensors: {how}"
        )
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    holds = f" (it holds {other[0]}{more(other)})" if other else ""
    return FileNotFoundError(
        f"{folder} has no model.safetensors and no model.safetensors.index.json, expected one of them{holds}"
    )


def _stored(folder: Path) -> dict[str, Stored]:
    """Every tensor's file, shape and dtype, from the headers alone.

    An index only says which files belong to the model, as in transformers: its entries may be too few or too many.
    """
    stored: dict[str, Stored] = {}
    for path in _files(folder):
        with open_file(path) as file:
            for key in file.keys():  # noqa: SIM118 a handle, not a dictionary
                if key in stored:
                    raise ValueError(f"{folder}: {stored[key].path.name} and {path.name} both hold {key}")
                view = file.get_slice(key)
                stored[key] = Stored(path, key, tuple(view.get_shape()), view.get_dtype())
    return stored


def open_file(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({one_line(error)})") from None


def more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
