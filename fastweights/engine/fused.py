"""One token of each row by the fused kernels: five a layer, two more where linears of the layer are plastic.

`Llama.fast_step` is this step with the frozen weights on a GPU, and the step in C on a CPU; `Cuda` is the path of an
episode over the same kernels. Shape suffixes as in `model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import KVCache, Positions
from ..episode_state import Address
from ..kernels import values
from ..kernels.products import MOST_ROWS, Frozen, Norm, add_project_, project
from ..kernels.query import Where, attend_
from ..kernels.step import Plastic, StepLinear, down_, gate_up
from ..model import Llama
from ..rules import target_at
from ..watch import Watch, standing
from . import table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KNOWN: frozenset[str] = frozenset()  # what these kernels know of `LlamaConfig.features`


@dataclass(frozen=True)
class Layer:
    """The weights of one block by role."""

    before_attention: Norm
    qkv: tuple[Frozen, Frozen, Frozen]
    o: Frozen
    before_mlp: Norm
    mlp: tuple[StepLinear, StepLinear, StepLinear]  # gate, up, down
    window: int | None  # how many tokens attention sees; None: all


def layers_of(model: Llama, plastic: Mapping[Address, Plastic]) -> list[Layer]:
    """The weights of every block; the fast weights of the linears that have some."""
    return [_layer(number, block, plastic) for number, block in enumerate(model.model.layers)]


def _layer(number: int, block: Any, plastic: Mapping[Address, Plastic]) -> Layer:
    attention = block.self_attn
    qkv = (_frozen(attention.q_proj), _frozen(attention.k_proj), _frozen(attention.v_proj))
    gate, up, down = (
        StepLinear(_frozen(getattr(block.mlp, name)), plastic.get((number, name))) for name in table.LINEARS
    )
    norms = _norm(block.before_attention), _norm(block.before_mlp)
    return Layer(norms[0], qkv, _frozen(attention.o_proj), norms[1], (gate, up, down), attention.window)


def rope_of(model: Llama, places: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions below `places`, each [places, E/2] in the model's dtype."""
    cos, sin = model.model.rope(torch.arange(places, device=model.device)[None], model.model.kinds[0])
    half = model.config.head_dim // 2
    return cos[0, 0, :, :half].contiguous(), sin[0, 0, :, :half].contiguous()


def arrivals(model: Llama, rows: int) -> Tensor:
    """The counters of `attend_`."""
    return torch.zeros(rows, model.config.num_key_value_heads, dtype=torch.int32, device=model.device)


def token(
    model: Llama,
    layers: list[Layer],
    ids_B: Tensor,
    where: Where,
    cache: KVCache,
    end: int,
    arrived_BK: Tensor,
    backend: str,
) -> Tensor:
    """Logits [B, 1, V] of one token of each row; its key and value are in the cache then, its events in their slots.

    Nothing waits for the device. ids [B] int64 on it; end: no position is larger than end − 1.
    """
    dtype, heads = model.dtype, model.config.num_attention_heads
    # the residual stream is float32 whatever the weights are
    x_BD = torch.embedding(model.model.embed_tokens.weight, ids_B).to(torch.promote_types(dtype, torch.float32))
    for layer, K_BKSE, V_BKSE in zip(layers, cache.keys, cache.values, strict=True):
        qkv_BO = project(x_BD, layer.before_attention, layer.qkv, dtype, backend)
        z_BO = attend_(qkv_BO, where, K_BKSE, V_BKSE, heads, end, arrived_BK, backend, layer.window)
        add_project_(x_BD, z_BO, layer.o, backend)
        gate, up, down = (_at(linear, where.position_B) for linear in layer.mlp)
        down_(x_BD, gate_up(x_BD, layer.before_mlp, gate, up, backend), down, backend)
    head = Frozen(model.lm_head.weight, model.lm_head.bias)
    return project(x_BD, _norm(model.model.norm), (head,), dtype, backend)[:, None]


def unable(model: Llama, rows: int, backend: str) -> str | None:
    """Why the kernels cannot run so many rows of this model, whatever its modules are; None if they can."""
    if unknown := sorted(model.config.features - KNOWN):
        return f"the fused step does not know {unknown[0]}"
    if backend == "triton" and values.triton is None:
        return "triton is not installed"
    if backend == "triton" and model.dtype not in DTYPES:
        return "the fused step takes float32, bfloat16 and float16"
    return f"the fused step takes up to {MOST_ROWS} rows" if rows > MOST_ROWS else None


def strange(model: Llama, watch: Watch) -> str | None:
    """Why the kernels cannot run the modules or weights of this model; None if they can."""
    if (stranger := table.table_of(model, watch).stranger) is not None:
        return f"the model holds a module that the fused step does not know: {stranger}"
    if any(p.dtype != model.dtype or not p.is_contiguous() for p in model.parameters()):
        return "the weights differ in dtype, or are not contiguous"
    return None


def fast_step(
    model: Llama, input_ids: Tensor, positions: Positions, cache: KVCache | None, backend: str = "triton"
) -> Tensor | None:
    """Logits [B, 1, V] of one token per row, stored in `cache`; None where the modules must run instead."""
    rows, binding = len(input_ids), model.binding
    if binding.now is not None or binding.taps or torch.compiler.is_compiling():
        return None
    if unable(model, rows, backend) is not None or (
        torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
    ):
        return None
    watch = standing(model)
    if watch.hooked() or strange(model, watch) is not None:
        return None
    if cache is None:
        cache = model.new_cache(rows, 1)
    elif cache.keys[0].dtype != model.dtype or not all(k.is_contiguous() for k in (*cache.keys, *cache.values)):
        return None
    known, places = table.table_of(model, watch), cache.capacity + 1
    if known.fused is None or len(known.fused[1][0]) != places:
        known.fused = layers_of(model, {}), rope_of(model, places)
    layers, rope = known.fused
    position_B = place_B = positions.position_BT[:, 0].contiguous()
    if positions.real_BT is not None:  # the last place is scratch
        place_B = torch.where(positions.real_BT[:, 0], position_B, places - 1)
    where, end = Where(position_B, place_B, *rope), cache.bucket(positions.end)
    with torch.no_grad(), torch.cuda.device_of(position_B):
        return token(model, layers, input_ids[:, 0], where, cache, end, arrivals(model, rows), backend)


def _one_step(model: Llama, input_ids: Tensor, positions: Positions, cache: KVCache | None) -> Tensor | None:
    if model.device.type == "cuda":
        return fast_step(model, input_ids, positions, cache)
    return table.fast_step(model, input_ids, positions, cache)


def _at(linear: StepLinear, position_B: Tensor) -> StepLinear:
    """The linear with its target at these positions."""
    plastic = linear.plastic
    if plastic is None or plastic.inputs.target is None:
        return linear
    target_BO = target_at(plastic.inputs.target, position_B[:, None]).expand(len(position_B), 1, -1)[:, 0]
    return linear._replace(plastic=plastic._replace(inputs=plastic.inputs._replace(target=target_BO)))


def _frozen(linear: Any) -> Frozen:
    return Frozen(linear.weight, linear.bias)


def _norm(norm: nn.Module) -> Norm:
    return Norm(norm.weight, norm.eps)  # type: ignore[arg-type]


Llama.fast_step = staticmethod(_one_step)
