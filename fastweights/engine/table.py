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
from ..kernels.decode import FAST, LAYER, decode
from ..model import Llama
from ..plastic import PlasticLinear
from ..watch import Watch, standing

DTYPES = (torch.float32, torch.bfloat16)
LINEARS = ("gate_proj", "up_proj", "down_proj")  # the roles of an MLP's linears, in C's order
KNOWN: frozenset[str] = frozenset()  # what C knows of `LlamaConfig.features`


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
        self.norm = model.model.norm.weight
        self.head, config = model.lm_head.weight, model.config
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self.sizes = (config.intermediate_size, *heads, config.head_dim)
        layers = np.zeros(len(blocks), LAYER)
        self.frozen = np.zeros(0, FAST), np.full((len(blocks), len(LINEARS)), -1)
        for layer, block in zip(layers, blocks, strict=True):
            attention, mlp = block.self_attn, block.mlp
            layer["window"] = attention.window or 0
            layer["norm1"] = block.before_attention.weight.data_ptr()
            layer["norm2"] = block.before_mlp.weight.data_ptr()
            linears = {name[0]: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            linears |= {name.removesuffix("_proj"): getattr(mlp, name) for name in LINEARS}
            for name, linear in linears.items():
                layer[name] = linear.weight.data_ptr()
                layer[f"{name}b"] = 0 if linear.bias is None else linear.bias.data_ptr()
        self.workspace = Workspace(layers)

    def _why(self, model: Llama) -> str | None:
        if unknown := sorted(model.config.features - KNOWN):
            return f"the step in C does not know {unknown[0]}"
        if self.stranger is not None:
            return f"the model holds a module that the step in C does not know: {self.stranger}"
        if any(p.dtype != model.dtype or not p.is_cpu or not p.is_contiguous() for p in model.parameters()):
            return "the weights differ in dtype or device, or are not contiguous"
        return None if library() is not None else "there is no C helper"


def strange_module(model: Llama) -> str | None:
    """The class of a module that is neither the model's own nor a plastic linear; None if there is none."""
    known = {type(model), type(model.lm_head), nn.Embedding, nn.ModuleList, PlasticLinear}
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
    rows, (F, H, _, E) = len(input_ids), table.sizes
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
    y_BV = decode(
        work.layers,
        fast,
        which,
        table.norm,
        table.head,
        x_BD,
        model.model.frequencies(model.model.kinds[0]),
        position_B1,
        place_B1,
        work.scratch,
        table.sizes,
        places,
        model.config.rms_norm_eps,
        width,
    )
    if tape_BN is not None:
        V = y_BV.shape[1]
        tape_BN[:, -V - x_BD.shape[1] : -V], tape_BN[:, -V:] = x_BD, y_BV
    return y_BV[:, None], tape_BN
