"""The kernels of one token by their role, each over all layers in one recording: which read at memory speed?"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fastweights as fw
from fastweights.engine.cuda import Cuda, graphed
from fastweights.kernels.products import Frozen, add_project_, project
from fastweights.kernels.query import Where, attend_
from fastweights.kernels.step import down_, gate_up

from .bed import Bed
from .decode import CONTEXT
from .measure import Check, Experiment, Trial


def step_kernels(bed: Bed, rows: int = 1, context: int = CONTEXT) -> Experiment:
    """Every role against torch's products of the same matrices, one by one and without a norm."""
    fw.detach(bed.model)
    cuda, model, config = bed.device.type == "cuda", bed.model, bed.config
    episode = fw.Episode(model, rows, max_length=context + 1)
    episode.feed(bed.ids(context).expand(rows, -1), update="none", logits="last")
    path = Cuda(model, {}, episode.state, lambda run: run, "triton" if cuda else "torch")
    path.unable = None  # on a CPU its definitions in torch
    path.renew(episode.engine.check(), path.cache.bucket(context + 1), False)
    backend, layers, heads = path.backend, path.layers, config.num_attention_heads
    x_BD = torch.randn(rows, config.hidden_size, device=bed.device, dtype=torch.promote_types(bed.dtype, torch.float32))
    h_BD = x_BD.to(bed.dtype)
    qkv_BO = project(x_BD, layers[0].before_attention, layers[0].qkv, bed.dtype, backend)
    z_BO, act_BO = (
        qkv_BO[:, : heads * config.head_dim].contiguous(),
        gate_up(x_BD, layers[0].before_mlp, *layers[0].mlp[:2], backend),
    )
    position_B = torch.full((rows,), context, device=bed.device)
    assert path.rope is not None
    where = Where(position_B, position_B, *path.rope)
    head = Frozen(model.lm_head.weight, model.lm_head.bias)
    keys, values = path.cache.keys, path.cache.values

    def over_layers(role: Callable[[int], object]) -> Callable[[], None]:
        def run() -> None:
            for number in range(len(layers)):
                role(number)

        return run

    roles: dict[str, tuple[Callable[[], object], list[Tensor]]] = {
        "q, k, v": (
            over_layers(lambda n: project(x_BD, layers[n].before_attention, layers[n].qkv, bed.dtype, backend)),
            [frozen.W_OI for layer in layers for frozen in layer.qkv],
        ),
        "attention": (
            over_layers(
                lambda n: attend_(qkv_BO, where, keys[n], values[n], heads, path.end, path.arrived_BK, backend)
            ),
            [cache[:, :, :context] for cache in (*keys, *values)],
        ),
        "o": (
            over_layers(lambda n: add_project_(x_BD, z_BO, layers[n].o, backend)),
            [layer.o.W_OI for layer in layers],
        ),
        "gate, up": (
            over_layers(lambda n: gate_up(x_BD, layers[n].before_mlp, *layers[n].mlp[:2], backend)),
            [linear.frozen.W_OI for layer in layers for linear in layer.mlp[:2]],
        ),
        "down": (
            over_layers(lambda n: down_(x_BD, act_BO, layers[n].mlp[2], backend)),
            [layer.mlp[2].frozen.W_OI for layer in layers],
        ),
        "head": (lambda: project(x_BD, layers[-1].before_mlp, (head,), bed.dtype, backend), [head.W_OI]),
    }
    trials, ratios = [], []
    for name, (run, read) in roles.items():
        matrices = [] if name == "attention" else read
        trials.append(_trial(name, run, read, cuda))
        if matrices:
            z = {"o": z_BO, "down": act_BO}.get(name, h_BD)

            def products(matrices: list[Tensor] = matrices, z: Tensor = z) -> None:
                for W_OI in matrices:
                    F.linear(z, W_OI)

            trials.append(_trial(f"torch {name}", products, read, cuda))
            ratios.append((f"torch {name}", name))
    one = layers[0]

    def exact(frozen: Frozen) -> Tensor:
        h_BD = F.rms_norm(
            x_BD.double(), x_BD.shape[1:], one.before_attention.weight_D.double(), one.before_attention.eps
        )
        return F.linear(h_BD, frozen.W_OI.double(), None if frozen.b_O is None else frozen.b_O.double())

    check = Check(
        "q, k, v = float64",
        lambda: project(x_BD, one.before_attention, one.qkv, bed.dtype, backend),
        lambda: torch.cat([exact(frozen) for frozen in one.qkv], dim=1),
        bed.tolerance,
    )
    notes = {"rows": rows, "context": context, "layers": len(layers), "unit": "all layers"}
    return Experiment(trials, [check], ratios, notes)


def _trial(name: str, run: Callable[[], object], read: list[Tensor], cuda: bool) -> Trial:
    run()  # so that every kernel is compiled

    def recorded() -> Tensor:
        run()
        return torch.empty(0)

    count = sum(tensor.numel() * tensor.element_size() for tensor in read)
    return Trial(name, graphed(recorded) if cuda else run, bytes=count)
