"""The fused step: one token of each row through the whole model in one call of C, where that gives what modules give.

A model in float32 or bfloat16 on a CPU takes it for every pass of one token; any hook, any replaced module, a gradient,
or a machine without a C compiler, and the modules run instead. Shape suffixes as in `model`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .kernels.cpu import MOST_ROWS, library
from .kernels.decode import FAST, LAYER, decode
from .watch import Watch

if TYPE_CHECKING:
    from .model import KVCache, Llama, Span

MLP = ("gate_proj", "up_proj", "down_proj")
DTYPES = (torch.float32, torch.bfloat16)


class Table:
    """Where a model's weights lie."""

    def __init__(self, model: Llama):
        self.watch = Watch(model)
        blocks: list[Any] = list(model.model.layers)
        # linears that stand in for the model's own: they say themselves whether they are plain at the moment
        self.guests: list[Any] = [
            linear
            for block in blocks
            for name in MLP
            if (linear := getattr(block.mlp, name)) is not None and type(linear) is not type(model.lm_head)
        ]
        self.usable = self._check(model) and library() is not None
        if not self.usable:
            return
        self.embedding, self.norm = model.model.embed_tokens.weight, model.model.norm.weight
        self.head, config = model.lm_head.weight, model.config
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self.sizes = (config.intermediate_size, *heads, config.head_dim)
        self.layers = np.zeros(len(blocks), LAYER)
        self.frozen = np.zeros(0, FAST), np.full((len(blocks), 3), -1)
        for layer, block in zip(self.layers, blocks, strict=True):
            attention, mlp = block.self_attn, block.mlp
            layer["norm1"] = block.input_layernorm.weight.data_ptr()
            layer["norm2"] = block.post_attention_layernorm.weight.data_ptr()
            linears = {name[0]: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            linears |= {name.removesuffix("_proj"): getattr(mlp, name) for name in MLP}
            for name, linear in linears.items():
                layer[name] = linear.weight.data_ptr()
                layer[f"{name}b"] = 0 if linear.bias is None else linear.bias.data_ptr()
        self.cache: list[int] = []  # addresses of the KV buffers that `layers` names
        self.scratch = torch.empty(0)

    def _check(self, model: Llama) -> bool:
        """Whether every module is of a kind, and every weight of a form, that the step in C knows."""
        modules = list(model.modules())
        known = {type(model), type(model.lm_head), nn.Embedding, nn.ModuleList}
        known |= {type(m) for m in modules if type(m).__module__ == type(model).__module__}
        guests = {id(guest) for guest in self.guests}
        kinds = all(type(m) in known or (id(m) in guests and hasattr(m, "plain")) for m in modules)
        return kinds and all(p.dtype == model.dtype and p.is_cpu and p.is_contiguous() for p in model.parameters())

    def point_at(self, cache: KVCache) -> bool:
        """Names the KV buffers to C; False: they are not of the model's dtype, it has changed since."""
        addresses = [t.data_ptr() for t in (*cache.keys, *cache.values)]
        if addresses != self.cache:
            if any(t.dtype != self.head.dtype for t in (*cache.keys, *cache.values)):
                return False
            self.cache = addresses
            self.layers["K"], self.layers["V"] = np.split(np.array(addresses, np.uint64), 2)
        return True


_tables: weakref.WeakKeyDictionary[Llama, Table] = weakref.WeakKeyDictionary()


def usable(model: Llama, rows: int) -> Table | None:
    """The table of a model whose next pass of one token may take the fused step."""
    if (
        rows > MOST_ROWS
        or model.dtype not in DTYPES
        or model.device.type != "cpu"
        or torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()))
    ):
        return None
    table = _tables.get(model)
    if table is None or not table.watch.stands():
        table = _tables[model] = Table(model)
    return table if table.usable and not table.watch.hooked() else None


def step(model: Llama, input_ids: Tensor, span: Span, cache: KVCache | None) -> Tensor | None:
    """Logits [B, 1, V] of one token per row, stored in `cache`; None where the modules must run instead."""
    table = usable(model, len(input_ids))
    if table is None or not all(guest.plain for guest in table.guests):
        return None
    return run(model, table, input_ids, span, cache or model.new_cache(len(input_ids), 1), *table.frozen)


def run(
    model: Llama, table: Table, input_ids: Tensor, span: Span, cache: KVCache, fast: np.ndarray, which: np.ndarray
) -> Tensor | None:
    """`step` by a usable table; `fast` and `which` as in `kernels.decode`."""
    rows, (F, H, _, E) = len(input_ids), table.sizes
    if not table.point_at(cache):
        return None
    slots = cache.capacity + 1
    slot_B1 = position_B1 = span.position_BT.contiguous()
    if span.real_BT is not None:  # the last slot is scratch
        slot_B1 = torch.where(span.real_BT, slot_B1, slots - 1)
    x_BD = torch.embedding(table.embedding, input_ids[:, 0]).float()
    needed = rows * (H * E + 2 * F + x_BD.shape[1] + H * slots + torch.get_num_threads() * H * (E + 2))
    if len(table.scratch) < needed:
        table.scratch = torch.empty(needed)
    y_BV = decode(
        table.layers,
        fast,
        which,
        table.norm,
        table.head,
        x_BD,
        model.frequencies(),
        position_B1,
        slot_B1,
        table.scratch,
        table.sizes,
        slots,
        model.config.rms_norm_eps,
    )
    return y_BV[:, None]
