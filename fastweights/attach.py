"""attach and detach: linears are swapped from outside, and the same objects put back; what attach is given, understood
or refused."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activations import phi_of
from .episode import Episode
from .episode_state import Address, EpisodeState
from .exchange import export_peft, import_peft, merge
from .kernels import values
from .model import Llama
from .numbers import tensors_of
from .plastic import PlasticLinear, plastic_linears, weight_norm
from .rules import Rule, check_rule, twin_of
from .state import OVERFLOW, EventLog
from .state.budget import OVER_BUDGET, Budget
from .state.moments import Moment

RULE_NAMES = ("rate", "mu", "decay", "clip", "bias", "neuron_local", "value")


class FastWeights:
    """The plastic linears of one `attach` call.

    `delta_weight` and the other questions about a state look at the episode given, or else at the one that
    ran last on this model.
    """

    def __init__(self, model: Llama, linears: dict[Address, PlasticLinear]):
        self.model, self.linears = model, linears

    def __repr__(self) -> str:
        return f"FastWeights({', '.join(p.name for p in self.linears.values())})"

    def delta_weight(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> Tensor:
        """ΔW of one linear in one row of an episode (a shared one has one), dense [O, I], float32 or float64."""
        return self._log(layer, linear, episode, row).delta_weight(row)

    def delta_bias(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> Tensor:
        """Δb of one linear in one row of an episode, [O]."""
        return self._log(layer, linear, episode, row).delta_bias(row)

    def error(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> tuple[float, float]:
        """(error_2, error_F): bounds on ‖ΔW_exact − ΔW‖ of one linear, see `EventLog.certificate`."""
        return self._log(layer, linear, episode, row).certificate(row)

    def delta_norm(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> float:
        """‖ΔW‖_F of one linear, from the factors."""
        return self._log(layer, linear, episode, row).delta_norm(row)

    def effective_rank(self, layer: int, linear: str, *, row: int = 0, episode: Episode | None = None) -> float:
        """exp of the entropy of the normalised singular values of ΔW (Roy & Vetterli 2007)."""
        return self._log(layer, linear, episode, row).effective_rank(row)

    # ---- to other libraries and back

    def export_peft(
        self,
        folder: str | Path,
        episode: Episode | None = None,
        row: int = 0,
        moment: int | Moment | None = None,
        rank: int | None = None,
    ) -> dict[Address, tuple[float, float]]:
        """Writes the fast weights of one row of an episode as a LoRA, which PEFT loads onto the unchanged checkpoint.

        Every plastic linear of the model is in it, also those of other `attach` calls, with a rank of its own; one
        without events has rank 1, of zeros. A fast bias is a `lora_bias`. Gradient events that wait are not in it.

        Args:
            folder: appears whole or not at all; an adapter that is there is replaced.
            moment: an event number or an `fw.Moment`; None: as they are now.
            rank: most terms per linear, the best that there are; None: as many as are needed.

        Returns:
            (error_2, error_F) of each linear, by (layer, name): bounds on ‖ΔW − ΔW as written‖, 0 where no term was
            left out. What the log itself has lost is `error`.

        Raises:
            ValueError: a row, moment or rank that does not exist, or a folder that holds something else.

        Example:
            fast.export_peft("adapter")
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/name"), "adapter")
        """
        state = self._state(episode)
        with state.alone(changes=False):
            return export_peft(self.model, state, folder, row, moment, rank)

    def import_peft(self, folder: str | Path) -> None:
        """Sets what every row of every episode that is made from now on begins with: a LoRA, in PEFT's form.

        It becomes events 1 to r of every plastic linear of the model, r the largest rank (zeros stand first where a
        linear has fewer). ΔW after event r is the LoRA, and moment 0 the model without it. Decay and overflow treat
        them as any events; `undo` does not go below them, and `reset` goes back to them. Another call replaces the
        LoRA of the linears that it names. Episodes that exist stay as they are.

        Raises:
            ValueError, FileNotFoundError: what fast weights cannot represent, such as targets that are not plastic
                here, DoRA or modules_to_save; shapes of another model; ranks that do not fit; files that are damaged
                or a pickle. Nothing changes then.

        Example:
            fast.import_peft("adapter")
            fw.Episode(model).events  # r
        """
        import_peft(self.model, folder)

    def merge(
        self, episode: Episode | None = None, row: int = 0, moment: int | Moment | None = None
    ) -> dict[str, Tensor]:
        """The model's state dict with the fast weights of one row of an episode added; the model does not change.

        W + ΔW and b + Δb are added in the precision of the log, float32 or float64, and rounded once to the weights'
        dtype. Names and shapes are those of `model.state_dict()`; what is not plastic is the model's own tensors.

        Raises:
            ValueError: a row or moment that does not exist; a fast bias where the model has none to add it to.

        Example:
            fw.save(model, "merged", tokenizer, state=fast.merge())
        """
        state = self._state(episode)
        with state.alone(changes=False):
            return merge(self.model, state, row, moment)

    def _state(self, episode: Episode | None) -> EpisodeState:
        if episode is not None and episode.model is not self.model:
            raise ValueError("that episode is of another model")
        state = self.model.binding.last if episode is None else episode.state
        if state is None:
            raise ValueError("no episode of this model is alive: create fw.Episode(model) first")
        return state

    def _log(self, layer: int, linear: str, episode: Episode | None, row: int) -> EventLog:
        depth = len(self.model.model.layers)
        layer = layer + depth if -depth <= layer < 0 else layer
        if (layer, linear) not in self.linears:
            raise ValueError(
                f"layer {layer} {linear!r} is not plastic here; plastic are "
                f"{', '.join(f'{address[0]} {address[1]}' for address in self.linears)}"
            )
        state = self._state(episode)
        if (layer, linear) not in state.logs:
            raise ValueError(
                f"layers.{layer}.mlp.{linear} was made plastic after that episode was made: make a new one"
            )
        log = state.logs[layer, linear]
        if not 0 <= row < len(log.event_counts):
            raise ValueError(
                f"row {row} of layers.{layer}.mlp.{linear} does not exist: there are {len(log.event_counts)}"
            )
        return log


def attach(
    model: Llama,
    layers: int | Sequence[int] | str,
    rule: Rule,
    linears: str | Sequence[str] | None = None,
    rank: int = 64,
    overflow: str = "compress",
    backend: str = "auto",
    archive: bool = False,
    budget: float | None = None,
    over_budget: str = "scale",
    factor_dtype: torch.dtype | None = None,
) -> FastWeights:
    """Makes MLP linears of some layers plastic; may be called again for other linears with another rule.

    Args:
        layers: layer numbers from 0, or from the end (−1 is the last); one number; or "all".
        rule: `Hebbian`, `LocalLeastSquares`, `Delta`, `GradientAscent`, or any object of the `Rule` protocol.
        linears: which of the MLP's, by their names in the checkpoint: "gate_proj", "up_proj", "down_proj" of a Llama,
            "c_fc", "c_proj" of a GPT-2; None: all of them.
        rank: R, events to keep, per linear and sequence.
        overflow: what happens when there are more: "compress", "evict", "grow" or "error", see `state.EventLog`.
        backend: "torch"; "triton": the fused kernels, for float32 and half precision on CUDA; "auto": Triton on
            CUDA where the rule and the linear's φ have Triton twins, torch elsewhere; see `PlasticLinear.backend`.
        archive: keep every event on the CPU as well, so that any moment stays exact after an overflow.
        budget: largest ‖ΔW‖_F / ‖W‖_F, per linear and row; None = no limit.
        over_budget: what an event that goes over the budget does: "scale": ΔW (and Δb) is scaled back onto it; "stop":
            its feed is refused.
        factor_dtype: of U and K; None = float32 (float64 for a float64 model). float64 runs on torch.

    Raises:
        ValueError: a layer, linear, rule or option that does not exist, or a linear that is already plastic;
            the model is unchanged then.
    """
    if not isinstance(model, Llama):
        raise ValueError(f"attach() got a {type(model).__name__}, expected the fastweights model that fw.load returns")
    addresses = _addresses(model, layers, linears)
    missing = [] if isinstance(rule, type) else [name for name in RULE_NAMES if not hasattr(rule, name)]
    if isinstance(rule, type) or missing:
        lacks = f"the class lacks {', '.join(missing)}" if missing else "that is a class, not an object of it"
        raise ValueError(
            f"rule={rule!r} is not a rule: {lacks}; expected an object with {', '.join(RULE_NAMES[:-1])} and value"
        )
    check_rule(rule)
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
        raise ValueError(f"rank={rank!r}: expected a whole number of events, 1 or more")
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow={overflow!r}: expected one of {', '.join(map(repr, OVERFLOW))}")
    factors = _factor_dtype(factor_dtype, model)
    backends = _backends(backend, _backend(backend, model, rule, factors), model, addresses)
    _check_target(model, rule, addresses)
    budgets = {address: _budget(model, address, budget, over_budget) for address in addresses}
    plastic, roles, phi = {}, model.config.family.linears, model.config.phi
    with model.binding.changed("attach()"):
        for address in addresses:
            base = getattr(model.model.layers[address[0]].mlp, address[1])
            if isinstance(base, PlasticLinear):
                raise ValueError(f"layers.{address[0]}.mlp.{address[1]} is already plastic: fw.detach(model) first")
            what = (address, roles[address[1]], phi_of(phi[address[1]]))
            options = (rule, int(rank), overflow, backends[address], archive, model.binding, budgets[address], factors)
            plastic[address] = PlasticLinear(base, *what, *options)
        for (layer, name), linear in plastic.items():
            setattr(model.model.layers[layer].mlp, name, linear)
    return FastWeights(model, plastic)


def _addresses(model: Llama, layers: Any, linears: Any) -> list[Address]:
    """The linears that `layers` and `linears` name, sorted; or a refusal."""
    if layers is None:
        raise ValueError("attach(layers=None) names no linear")
    every = [*model.config.family.linears]
    depth = len(model.model.layers)
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers={layers!r}: expected layer numbers, or 'all'")
        layers = range(depth)
    layers = [layers] if isinstance(layers, Integral) else list(layers)
    linears = every if linears is None else [linears] if isinstance(linears, str) else list(linears)
    if not layers or not linears:
        raise ValueError(f"attach(layers={layers}, linears={linears}) names no linear")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not -depth <= int(layer) < depth:
            raise ValueError(f"layer {layer!r} does not exist: this model has layers 0 to {depth - 1}")
    for name in linears:
        if name not in every:
            raise ValueError(f"linear {name!r} does not exist: an MLP has {', '.join(every)}")
    return sorted({(int(layer) % depth, name) for layer in layers for name in linears})


def _factor_dtype(asked: torch.dtype | None, model: Llama) -> torch.dtype:
    least = torch.float64 if model.dtype == torch.float64 else torch.float32
    if asked is not None and asked not in (least, torch.float64):
        raise ValueError(
            f"factor_dtype={asked}: expected {' or '.join({str(least): 0, 'torch.float64': 0})} for a "
            f"{str(model.dtype)[6:]} model (small events vanish in narrower sums)"
        )
    return asked or least


def _budget(model: Llama, address: Address, share: float | None, over: str) -> Budget | None:
    if over not in OVER_BUDGET:
        raise ValueError(f"over_budget={over!r}: expected one of {', '.join(map(repr, OVER_BUDGET))}")
    if share is None:
        return None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < math.inf:
        raise ValueError(f"budget={share!r}: expected a share of ‖W‖, a number above 0, or None")
    norm = weight_norm(getattr(model.model.layers[address[0]].mlp, address[1]))
    if not norm:
        raise ValueError(f"budget={share!r}: layers.{address[0]}.mlp.{address[1]} is zero, and so is any share of it")
    return Budget(float(share), over, share * norm)


def _backend(backend: str, model: Llama, rule: Rule, factor_dtype: torch.dtype) -> str:
    known, cuda = twin_of(rule) is not None, model.device.type == "cuda"
    named = type(rule).__name__ + (" with numbers that are tensors" if tensors_of(rule) else "")
    match backend:
        case "torch":
            return "torch"
        case "auto":
            if cuda and not known and rule.neuron_local:
                warnings.warn(f"{named} has no Triton twin: it runs on torch", stacklevel=4)
            return "triton" if cuda and known and factor_dtype != torch.float64 else "torch"
        case "triton":
            if not known:
                raise ValueError(f"backend='triton': {named} has no Triton twin, use 'torch'")
            if model.dtype == torch.float64:
                raise ValueError("backend='triton' computes in float32: use 'torch' for a float64 model")
            if factor_dtype == torch.float64:
                raise ValueError("backend='triton' computes in float32: use 'torch' for factor_dtype=torch.float64")
            if not cuda and os.environ.get("TRITON_INTERPRET") != "1":
                raise ValueError(
                    f"backend='triton' needs CUDA (or TRITON_INTERPRET=1): this model is on {model.device}"
                )
            return "triton"
    raise ValueError(f"backend={backend!r}: expected 'auto', 'torch' or 'triton'")


def _backends(asked: str, chosen: str, model: Llama, addresses: Sequence[Address]) -> dict[Address, str]:
    """The backend of each linear: the chosen one, or torch where no kernel knows the linear's φ."""
    phi = model.config.phi
    unknown = {name: phi[name] for _, name in addresses if phi[name] not in values.ACTIVATIONS}
    if chosen == "triton":
        for name, own in unknown.items():
            said = f"the activation {own!r} of {name} has no Triton twin"
            if asked == "triton":
                raise ValueError(f"backend='triton': {said}, use 'torch'")
            warnings.warn(f"{said}: it runs on torch", stacklevel=3)
    return {address: "torch" if address[1] in unknown else chosen for address in addresses}


def _check_target(model: Llama, rule: Rule, addresses: Sequence[Address]) -> None:
    target = getattr(rule, "target", None)
    if not isinstance(target, Tensor):
        return
    for layer, name in addresses:
        width = getattr(model.model.layers[layer].mlp, name).out_features
        if target.shape[-1] != width:
            raise ValueError(
                f"{type(rule).__name__}(target=...) has shape {list(target.shape)}, "
                f"but layers.{layer}.mlp.{name} needs a last dimension of {width}"
            )


def detach(model: Llama) -> None:
    """Puts the original linears back, all of them, as the same objects; with the weights that the model has now.

    Raises:
        ValueError: a pass of this model runs, in this thread or another.
    """
    with model.binding.changed("detach()"):
        for (layer, name), plastic in plastic_linears(model).items():
            # a move to some devices, or load_state_dict(assign=True), puts new parameters into the model's own modules
            plastic.base.weight, plastic.base.bias = plastic.weight, plastic.bias
            setattr(model.model.layers[layer].mlp, name, plastic.base)
