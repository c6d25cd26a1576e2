"""Packed linears of a checkpoint (GPTQ, AWQ "gemm", FP8 in blocks) → dense weights, one at a time.

A linear has I inputs, O outputs and b bits a number; each of its G groups of inputs shares a row of scales and zeros.
The dense weight [O, I] is (q - zero) · scale, rounded once to the dtype of the scales, as the formats' own code in
PyTorch does (gptqmodel's TorchLinear, awq's dequantize_gemm), and then to the model's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_json
from .stored import DTYPE_NAMES, Stored, open_file

_ROWS = 64  # rows of a dense weight that are made at once: what lies unpacked beside it stays small
_SCALES = ("F16", "BF16", "F32")
_ORIGINAL = "load the model that it was made from instead"
_INSTEAD = {
    "bitsandbytes": "load it in transformers, and save what model.dequantize() gives",
    "compressed-tensors": "load it in transformers with CompressedTensorsConfig(run_compressed=False), and save that",
    "mlx": "make it dense with mlx_lm.convert --dequantize",
    "gguf": "pass the .gguf file instead of its folder",
}
# What would change the numbers, and the only values that are read.
_GPTQ = (None, "gptq", "gptq_v2")
_AWQ = (None, "gemm", "GEMM")
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "gptq": {"checkpoint_format": _GPTQ, "format": _GPTQ, "is_marlin_format": (None, False)}
    | {"adapter": (None,), "rotation": (None,)},
    "awq": {"version": _AWQ, "format": _AWQ, "checkpoint_format": _AWQ, "zero_point": (None, True)},
    "fp8": {"fmt": (None, "e4m3"), "scale_fmt": (None, "float"), "activation_scheme": (None, "dynamic")},
}

Parts = dict[str, Tensor]
Wanted = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # part → its shape, and the dtypes it may be stored in


@dataclass(frozen=True)
class Gptq:
    """qweight int32 [I·b/32, O], packed down the inputs; qzeros int32 [G, O·b/32], packed along the outputs; scales
    [G, O]; g_idx int32 [I], the group of each input (absent: one group after the other).

    `added`: what the format adds to a stored zero, 1 in "gptq" and 0 in "gptq_v2". The sum is not masked again.
    """

    bits: int
    group_size: int
    added: int
    act_order: bool

    scales = "scales"  # the part whose dtype the weight is computed in

    def __str__(self) -> str:
        return f"{self.bits} bits (GPTQ, {_groups(self.group_size)}{', act order' if self.act_order else ''})"

    @property
    def optional(self) -> tuple[str, ...]:
        return () if self.act_order and self.group_size > 0 else ("g_idx",)

    def wanted(self, O: int, I: int) -> Wanted:
        G = _ceil(I, _size(self.group_size, I))
        qweight, qzeros = (_ceil(I * self.bits, 32), O), (G, _ceil(O * self.bits, 32))
        packed = {"qweight": (qweight, ("I32",)), "qzeros": (qzeros, ("I32",))}
        return {**packed, "scales": ((G, O), _SCALES), "g_idx": ((I,), ("I32",))}

    def dense(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        (_, I), b = shape, self.bits
        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        one_after_the_other = torch.arange(I, device=scales.device) // _size(self.group_size, I)
        group_I = parts.get("g_idx", one_after_the_other).long()
        if int(group_I.min()) < 0 or int(group_I.max()) >= len(scales):
            raise ValueError(
                f"g_idx holds groups from {int(group_I.min())} to {int(group_I.max())}, expected 0 to {len(scales) - 1}"
            )

        def rows(start: int, stop: int) -> Tensor:  # start is a multiple of 32, where a word begins in qzeros
            q_IO = _unpack(qweight[:, start:stop], b, I)
            zeros_GO = _unpack(qzeros[:, start * b // 32 : _ceil(stop * b, 32)].T, b, stop - start).T + self.added
            return _weights(q_IO, zeros_GO, scales[:, start:stop], group_I)

        return _by_rows(rows, shape, dtype, scales.device)


@dataclass(frozen=True)
class Awq:
    """qweight int32 [I, O/8] and qzeros int32 [G, O/8], four bits packed along the outputs; scales [G, O].

    From its lowest bits on, word c holds the outputs 8c + 0, 2, 4, 6, 1, 3, 5, 7.
    """

    group_size: int

    scales, optional = "scales", ()

    def __str__(self) -> str:
        return f"4 bits (AWQ, {_groups(self.group_size)})"

    def wanted(self, O: int, I: int) -> Wanted:
        G = _ceil(I, _size(self.group_size, I))
        packed = {"qweight": ((I, _ceil(O, 8)), ("I32",)), "qzeros": ((G, _ceil(O, 8)), ("I32",))}
        return {**packed, "scales": ((G, O), _SCALES)}

    def dense(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        (_, I), scales = shape, parts["scales"]
        group_I = torch.arange(I, device=scales.device) // _size(self.group_size, I)
        shift = 4 * torch.tensor([0, 4, 1, 5, 2, 6, 3, 7], dtype=torch.int32, device=scales.device)  # of outputs 0 to 7

        def rows(start: int, stop: int) -> Tensor:  # start is a multiple of 8
            words = slice(start // 8, _ceil(stop, 8))
            q_IO, zeros_GO = (
                ((parts[name][:, words, None] >> shift) & 15).flatten(1)[:, : stop - start]
                for name in ("qweight", "qzeros")
            )
            return _weights(q_IO, zeros_GO, scales[:, start:stop], group_I)

        return _by_rows(rows, shape, dtype, scales.device)


@dataclass(frozen=True)
class Fp8:
    """weight float8_e4m3fn [O, I], and weight_scale_inv: what each block of it is multiplied by, in float32."""

    block: tuple[int, int]

    scales, optional = "weight_scale_inv", ()

    def __str__(self) -> str:
        return f"8 bits (FP8, blocks of {self.block[0]} x {self.block[1]})"

    def wanted(self, O: int, I: int) -> Wanted:
        blocks = (_ceil(O, self.block[0]), _ceil(I, self.block[1]))
        return {"weight": ((O, I), ("F8_E4M3",)), "weight_scale_inv": (blocks, _SCALES)}

    def dense(self, parts: Parts, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        weight, scales = parts["weight"], parts["weight_scale_inv"].float()
        block_O = torch.arange(shape[0], device=weight.device) // self.block[0]
        block_I = torch.arange(shape[1], device=weight.device) // self.block[1]

        def rows(start: int, stop: int) -> Tensor:
            return weight[start:stop].float() * scales[block_O[start:stop]][:, block_I]

        return _by_rows(rows, shape, dtype, weight.device)


Layout = Gptq | Awq | Fp8


def layout_of(folder: Path) -> Layout | None:
    """How the folder's linears are packed, as config.json or, in old GPTQ folders, quantize_config.json says.

    None: it says nothing. Raises ValueError, which says what to do, for every format that is not read.
    """
    path = folder / "config.json"
    hf = read_json(path)
    said = hf.get("quantization_config")
    for key, method in (("quantization", "mlx"), ("compression_config", "compressed-tensors")):
        if hf.get(key) is not None:
            said = {"quant_method": method}
    if said is None:
        path = folder / "quantize_config.json"
        said = {"quant_method": "gptq"} | read_json(path) if path.is_file() else None
    if said is None:
        return None
    try:
        return _layout(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _layout(said: Any) -> Layout:
    if not isinstance(said, Mapping):
        raise ValueError(f"quantization_config is {json.dumps(said)}, expected an object")
    method = said.get("quant_method")
    if method is None and (said.get("load_in_4bit") or said.get("load_in_8bit")):
        method = "bitsandbytes"
    if method not in ("gptq", "awq", "fp8"):
        raise ValueError(
            f"its weights are quantised as {json.dumps(method)}, and fastweights reads gptq, awq and fp8 only: "
            f"{_INSTEAD.get(str(method), _ORIGINAL)}"
        )

    def refuse(key: str, wanted: str) -> ValueError:
        return ValueError(
            f"{key} is {json.dumps(said.get(key))}, and fastweights reads {method} with {wanted} only: {_ORIGINAL}"
        )

    for key, allowed in _ONLY[method].items():
        if key in said and said[key] not in allowed:
            raise refuse(key, " or ".join(map(json.dumps, allowed)))
    if method == "fp8":
        block = said.get("weight_block_size")
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise refuse("weight_block_size", "blocks, such as [128, 128],")
        return Fp8((block[0], block[1]))
    bits: Any = said.get("bits")
    group_size = said.get("group_size")
    if bits not in (wanted := (4,) if method == "awq" else (2, 3, 4, 8)):
        raise refuse("bits", ", ".join(map(str, wanted)))
    if type(group_size) is not int or not (group_size > 0 or group_size == -1):
        raise refuse("group_size", "a positive number or -1 (one group)")
    if method == "awq":
        if said.get("backend") == "llm-awq":  # the others are names of kernels
            raise refuse("backend", "AutoAWQ's order of numbers")
        return Awq(group_size)
    for name in said.get("dynamic") or ():
        if not name.startswith("-:"):  # those are linears that stay dense
            raise refuse("dynamic", "the same numbers for every linear")
    versions = {said.get(key) for key in ("checkpoint_format", "format")} - {None}
    if len(versions) > 1:
        raise refuse("format", f"the same value in checkpoint_format ({json.dumps(said['checkpoint_format'])})")
    return Gptq(int(bits), group_size, 0 if versions == {"gptq_v2"} else 1, said.get("desc_act") is True)


def parts_of(layout: Layout, wanted: Iterable[str]) -> list[str]:
    """Every name that a part of a packed linear may have, and those of the biases that old GPTQ folders hold."""
    bases = [key.removesuffix(".weight") for key in wanted if key.endswith(".weight")]
    return [f"{base}.{part}" for base in bases for part in (*layout.wanted(1, 1), "bias")]


def take_linears(
    layout: Layout | None,
    stored: dict[str, Stored],
    wanted: Mapping[str, tuple[int, ...]],
    folder: Path,
    embedding: str,
) -> dict[str, dict[str, Stored]]:
    """Takes the packed linears out of `stored`: for each weight of `wanted`, but the embedding, its parts.
    What is dense stays.

    A bias of zeros that the model does not have is dropped: old GPTQ folders hold one for every linear. Raises
    ValueError for a part that is missing or of another shape or dtype.
    """
    if layout is None:
        ends = (".qweight", ".weight_packed", ".weight_scale_inv")
        if packed := next((key for key in stored if key.endswith(ends)), None):
            raise ValueError(
                f"{folder}: the tensor {packed} is a packed weight, and config.json has no quantization_config that "
                "says how: add the one of its repository (or quantize_config.json)"
            )
        return {}
    linears: dict[str, dict[str, Stored]] = {}
    for key, shape in wanted.items():
        base = key.removesuffix(".weight")
        if len(shape) != 2 or key == embedding or (key in stored and stored[key].dtype in DTYPE_NAMES):
            continue
        parts = layout.wanted(*shape)
        names = {part: f"{base}.{part}" for part in parts if f"{base}.{part}" in stored}
        if not names:
            continue
        if missing := [part for part in parts if part not in names and part not in layout.optional]:
            raise ValueError(
                f"{folder}: the tensor {base}.{missing[0]} is missing, expected beside {next(iter(names.values()))} "
                f"for a linear in {layout}: fetch the folder again"
            )
        for part, name in names.items():
            tensor, (size, dtypes) = stored[name], parts[part]
            if tensor.shape != size or tensor.dtype not in dtypes:
                raise ValueError(
                    f"{folder}: the tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected "
                    f"{' or '.join(dtypes)} {list(size)} for a linear of {shape[1]} inputs and {shape[0]} outputs in "
                    f"{layout}: config.json and the file do not belong together"
                )
        linears[key] = {part: stored.pop(name) for part, name in names.items()}
        bias = f"{base}.bias"
        if bias in stored and bias not in wanted:
            if _read(stored[bias]).any():
                raise ValueError(
                    f"{folder}: the tensor {bias} is not zero, and config.json says that this linear has no bias: set "
                    "attention_bias or mlp_bias there if the model has them"
                )
            del stored[bias]
    return linears


def dense_weight(
    layout: Layout, parts: Mapping[str, Stored], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[O, I]: one packed linear, read and made dense on `device`."""
    tensors = {part: _read(tensor).to(device) for part, tensor in parts.items()}
    try:
        return layout.dense(tensors, shape, dtype)
    except ValueError as error:
        one = next(iter(parts.values()))
        raise ValueError(f"{one.path}: {one.name.rpartition('.')[0]}.{error}: fetch the file again") from None


def _read(tensor: Stored) -> Tensor:
    with open_file(tensor.path) as file:
        return file.get_tensor(tensor.name)


def _weights(q_IO: Tensor, zeros_GO: Tensor, scales_GO: Tensor, group_I: Tensor) -> Tensor:
    """[O, I], rounded once: the difference of whole numbers is exact in the dtype of the scales."""
    return ((q_IO - zeros_GO[group_I]).to(scales_GO.dtype) * scales_GO[group_I]).T


def _unpack(words_WN: Tensor, bits: int, count: int) -> Tensor:
    """int32 [count, N]: down each column the 32-bit words are one stream of numbers, lowest bits first."""
    first = torch.arange(count, device=words_WN.device) * bits
    word, shift = first // 32, (first % 32)[:, None].int()
    inside = (32 - shift).clamp(max=bits)  # bits of the number in its first word
    numbers = (words_WN[word] >> shift) & ((1 << inside) - 1)
    if 32 % bits:  # the rest of a number may stand in the next word
        following = words_WN[(word + 1).clamp(max=len(words_WN) - 1)]
        numbers |= torch.where(inside < bits, following << inside, 0) & ((1 << bits) - 1)
    return numbers


def _by_rows(
    rows: Callable[[int, int], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    dense = torch.empty(shape, dtype=dtype, device=device)
    for start in range(0, shape[0], _ROWS):
        stop = min(start + _ROWS, shape[0])
        dense[start:stop] = rows(start, stop)
    return dense


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _size(group_size: int, I: int) -> int:
    return group_size if group_size > 0 else I


def _groups(size: int) -> str:
    return f"groups of {size}" if size > 0 else "one group"
