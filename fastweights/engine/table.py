"""A model's weights by role, as the step in C reads them: one token of each row in one call.

`fast_step` is this step with the frozen weights; `Cpu` is the path of an episode over the same table.
Shape suffixes as in `model`.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..backward import length, widths
from ..cache import KVCache, Positions
from ..kernels.cpu import MOST_ROWS, library
from ..kernels.decode import FAST, LAYER, MODEL, NORMS, decode
from ..kernels.values import IN_C
from ..model import Llama, RMSNorm
from ..plastic import PlasticLinear
from ..watch import Watch, standing

DTYPES = (torch.float32, torch.bfloat16)
LINEARS = ("gate_proj", "up_proj", "down_proj")  # the roles of an MLP's linears, in C's order
IN_ONE = "gate_up_proj"  # the role of one that is the first two
KNOWN = frozenset(  # what C knows of `LlamaConfig.features`
    (
        "layer norms",
        "norms times 1 + w",
        "norms that round once",
        "norms behind attention and MLP",
        "no norms before attention and MLP",
        "norms of the heads of q and k",
        "norms of q and k",
        "q, k and v in one linear",
        "q, k and v head by head in one linear",
        "gate and up in one linear",
        "an MLP without a gate",
        *(f"the activation {name}" for name in IN_C),
        "learned positions",
        "scaled embeddings",
        "rope of a part of each head",
        "a rope of its own in some layers",
        "a scale of scores of its own",
        "capped scores",
        "capped logits",
        "attention beside the MLP",
    )
)


class Workspace(threading.local):
    """What one run of the step writes: each thread has its own, because C runs without Python's lock."""

    def __init__(self, layers: np.ndarray):
        self.layers = layers.copy()  # with the KV buffers of the cache at hand
        self.cache: list[int] = []  # their addresses
        self.scratch = torch.empty(0, device="cpu")

    def point_at(self, cache: KVCache) -> None:
        """Names the KV buffers to C."""
        addresses = [t.data_ptr() for t in (*cache.keys, *cache.values)]
        if addresses != self.cache:
            self.layers["K"], self.layers["V"] = np.split(np.array(addresses, np.uint64), 2)
            self.cache = addresses


class Table:
    """Where a model's weights lie, as long as its watch stands.

    why: why C cannot run this model; None if it can. stranger: a type of module of which only the module itself knows
    what it computes; None: there is none.
    """

    def __init__(self, model: Llama, watch: Watch):
        self.watch, self.stranger = watch, strange_module(model)
        self.fused: Any = None  # what `fused.fast_step` knows of the model
        self.why = self._why(model)
        if self.why is not None:
            return
        blocks: list[Any] = list(model.model.layers)
        self.head, config = model.lm_head.weight, model.config
        self.model, self.frequency = model_record(model)
        layers = np.zeros(len(blocks), LAYER)
        self.frozen = np.zeros(0, FAST), np.full((len(blocks), len(LINEARS)), -1)
        for layer, block in zip(layers, blocks, strict=True):
            attention, mlp = block.self_attn, block.mlp
            layer["window"], layer["scale"] = attention.window or 0, attention.scale
            layer["rope"] = model.model.kinds.index(block.rope)
            for role in ("before_attention", "after_attention", "before_mlp", "after_mlp"):
                point(layer, role, getattr(block, role))
            for role in ("q_norm", "k_norm"):
                point(layer, role, getattr(attention, role))
            for name, row in zip("qkv", first_rows(attention), strict=True):
                point(layer, name, attention.qkv_proj or getattr(attention, f"{name}_proj"), row)
            point(layer, "o", attention.o_proj)
            point(layer, "gate", mlp.gate_up_proj or mlp.gate_proj)
            point(layer, "up", mlp.gate_up_proj or mlp.up_proj, config.intermediate_size if mlp.gate_up_proj else 0)
            point(layer, "down", mlp.down_proj)
        self.workspace = Workspace(layers)

    def _why(self, model: Llama) -> str | None:
        if unknown := sorted(model.config.features - KNOWN):
            return f"the step in C does not know {unknown[0]}"
        if self.stranger is not None:
            return f"the model holds a module that the step in C does not know: {self.stranger}"
        if norms_differ(model):
            return "a norm is not what the configuration says"
        if any(p.dtype != model.dtype or not p.is_cpu or not p.is_contiguous() for p in model.parameters()):
            return "the weights differ in dtype or device, or are not contiguous"
        return None if library() is not None else "there is no C helper"


def model_record(model: Llama) -> tuple[np.ndarray, Tensor]:
    """What C knows of a whole model, MODEL [1], and the frequencies [ropes, E/2] that it names."""
    config, decoder = model.config, model.model
    ropes = [decoder.frequencies(rope) for rope in decoder.kinds if rope is not None]
    frequency = torch.stack(ropes) if ropes else torch.empty(0, 0, device="cpu")
    record = np.zeros(1, MODEL)
    point(record[0], "norm", decoder.norm)
    point(record[0], "head", model.lm_head)
    record["frequency"] = frequency.data_ptr()
    for name, number in {
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "KH": config.num_key_value_heads,
        "E": config.head_dim,
        "V": len(model.lm_head.weight),
        "ropes": len(frequency),
        "turned": 2 * frequency.shape[1],
        "apart": config.head_dim * (3 if config.family.interleaved else 1),
        "norms": NORMS.index(config.family.norm),
        "phi": IN_C[config.hidden_act],
        "whole": config.family.qk_norm == "all",
        "parallel": config.use_parallel_residual,
        "eps": config.rms_norm_eps,
        "cap": config.attn_logit_softcapping or 0,
    }.items():
        record[name] = number
    return record, frequency


def point(record: np.void, name: str, module: Any, row: int = 0) -> None:
    """Names the weights of a linear or norm to C, and its bias if it has one, from a row on; none if it is None."""
    for field, tensor in ((name, getattr(module, "weight", None)), (f"{name}b", getattr(module, "bias", None))):
        if tensor is not None:
            record[field] = tensor[row:].data_ptr()


def first_rows(attention: Any) -> tuple[int, int, int]:
    """Where q, k and v begin among the rows of their linears."""
    q, k, _ = attention.widths
    if attention.qkv_proj is None:
        return 0, 0, 0
    return (0, attention.head_dim, 2 * attention.head_dim) if attention.interleaved else (0, q, q + k)


def norms_differ(model: Llama) -> bool:
    """Whether a norm is not what the configuration says: of another kind or eps, or without weights."""
    like = (model.config.family.norm, model.config.rms_norm_eps)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, RMSNorm | nn.LayerNorm)]
    bare = any(isinstance(norm, nn.LayerNorm) and norm.bias is None for norm in norms)
    return bare or any((getattr(norm, "kind", "layer"), norm.eps) != like for norm in norms)


def strange_module(model: Llama) -> str | None:
    """The class of a module that is neither the model's own nor a plastic linear; None if there is none."""
    known = {type(model), type(model.lm_head), nn.Embedding, nn.ModuleList, PlasticLinear}
    if model.config.family.norm == "layer":
        known.add(nn.LayerNorm)
    return next(
        (
            type(module).__name__
            for module in model.modules()
            if type(module) not in known and type(module).__module__ != type(model).__module__
        ),
        None,
    )


def table_of(model: Llama, watch: Watch) -> Table:
    """The table of a model as its watch sees it."""
    if watch.table is None:
        watch.table = Table(model, watch)
    return watch.table


def refusal(model: Llama, rows: int, watch: Watch) -> str | None:
    """Why C cannot run one token of so many rows now, whatever is plastic; None if it can."""
    if model.device.type != "cpu":
        return "the model is not on the CPU"
    if rows > MOST_ROWS:
        return f"the step in C takes up to {MOST_ROWS} rows"
    if model.dtype not in DTYPES:
        return "the step in C takes float32 and bfloat16"
    if model.binding.taps:
        return "edits or a capture run on the modules"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return "weights ask for gradients"
    table = table_of(model, watch)
    if table.why is not None:
        return table.why
    return "there are hooks on the model, or a forward of its user's" if watch.hooked() else None


def fast_step(model: Llama, input_ids: Tensor, positions: Positions, cache: KVCache | None) -> Tensor | None:
    """Logits [B, 1, V] of one token per row, stored in `cache`; None where the modules must run instead."""
    if model.device.type != "cpu":
        return None
    watch = standing(model)
    if model.binding.now is not None or refusal(model, len(input_ids), watch) is not None:
        return None
    if cache is None:
        cache = model.new_cache(len(input_ids), 1)
    elif cache.keys[0].dtype != model.dtype:
        return None
    table = table_of(model, watch)
    return run(model, table, input_ids, positions, cache, *table.frozen)[0]


def run(
    model: Llama,
    table: Table,
    input_ids: Tensor,
    positions: Positions,
    cache: KVCache,
    fast: np.ndarray,
    which: np.ndarray,
    first: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`fast_step` by a table; `fast` and `which` as in `kernels.decode`.

    first: also the tape from this layer on, as `backward.Tape` has it; None: no tape.
    """
    rows, config = len(input_ids), model.config
    F, H, E = config.intermediate_size, config.num_attention_heads, config.head_dim
    work = table.workspace
    work.point_at(cache)
    places = cache.capacity + 1
    place_B1 = position_B1 = positions.position_BT.contiguous()
    if positions.real_BT is not None:  # the last place is scratch
        place_B1 = torch.where(positions.real_BT, place_B1, places - 1)
    x_BD = model.model.embed(input_ids[:, 0], position_B1[:, 0]).float()
    needed = rows * (H * E + 2 * F + x_BD.shape[1] + H * places + torch.get_num_threads() * H * (E + 2))
    if len(work.scratch) < needed:
        work.scratch = torch.empty(needed, device="cpu")
    tape_BN, width = None, 0
    work.layers["tape"] = 0
    if first is not None:
        width, each = length(model, first), sum(widths(model)[:-2])
        tape_BN = model.lm_head.weight.new_empty(rows, width)
        starts = np.arange(len(work.layers) - first, dtype=np.uint64) * np.uint64(each * tape_BN.element_size())
        work.layers["tape"][first:] = starts + np.uint64(tape_BN.data_ptr())
    tables = (table.model, work.layers, fast, which, table.head)
    y_BV = decode(*tables, x_BD, position_B1, place_B1, work.scratch, places, width)
    if tape_BN is not None:
        V = y_BV.shape[1]
        tape_BN[:, -V - x_BD.shape[1] : -V], tape_BN[:, -V:] = x_BD, y_BV
    return model.capped(y_BV)[:, None], tape_BN
