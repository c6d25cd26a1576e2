"""Rules whose numbers are learned: one per plastic linear, in one object, saved as a folder.

For one linear that reads h, with what it was set to by hand as the start (p = 1, w = 0, c = 0):

    rate   r = rate₀ p_r          one number, or one per neuron [1, O]
    gamma  γ = gamma₀ p_γ         the same; of the slow target alone
    decay  λ = sigmoid(θ)         where the hand-set decay is above 0
    m(h)   = 2 sigmoid(w·h / ‖h‖ + c)

    event  u = r ⊙ value(a),  k = m(h) h / (‖h‖² + mu)
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import GATES, gated, slow_value
from .files import read_json, write_tensors, write_text
from .numbers import Number, Twin, as_float, spread

FORMAT = "fastweights rule 1"
FILES = ("rule.json", "rule.safetensors")
PER = ("neuron", "layer")
Address = tuple[int, str]


class Sized(Protocol):
    """A linear, as far as a rule must know it."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


class Plasticity(nn.Module):
    """The rule of one linear. `factor` multiplies its rate: a number, or a tuple of one per row of an episode."""

    neuron_local = True
    factor: Number = 1.0

    def __init__(self, form: Mapping[str, Any], in_features: int, out_features: int, per: str, modulated: bool):
        super().__init__()
        self.form = dict(form)
        self.mu, self.clip, self.bias = form["mu"], form["clip"], form["bias"]
        self.in_features, self.out_features = in_features, out_features
        shape = (1, out_features) if per == "neuron" else ()
        self.rates = nn.Parameter(torch.ones(shape))
        self.gammas = nn.Parameter(torch.ones(shape)) if form["target"] == "slow" else None
        decay = form["decay"]
        self.theta = nn.Parameter(torch.tensor(math.log(decay / (1 - decay)))) if decay else None
        self.weight = nn.Parameter(torch.zeros(in_features)) if modulated else None
        self.shift = nn.Parameter(torch.zeros(())) if modulated else None

    def __repr__(self) -> str:
        return f"Plasticity({', '.join(f'{name}={value!r}' for name, value in self.form.items())})"

    @property
    def rate(self) -> Number:
        rate = self.form["rate"] * self.rates
        if isinstance(self.factor, tuple):
            factor_R = torch.tensor(self.factor, dtype=rate.dtype, device=rate.device)
            return factor_R[:, None] * rate if rate.dim() else factor_R * rate
        return rate if isinstance(self.factor, float) and self.factor == 1 else self.factor * rate

    @property
    def gamma(self) -> Number:
        return self.form["gamma"] if self.gammas is None else self.form["gamma"] * self.gammas

    @property
    def decay(self) -> float | Tensor:
        return 0.0 if self.theta is None else self.theta.sigmoid()

    @property
    def modulation(self) -> Any:
        return None if self.weight is None else self._weigh

    def _weigh(self, h: Tensor) -> Tensor:
        assert self.weight is not None
        assert self.shift is not None
        along = F.normalize(h, dim=-1) @ self.weight.to(h.device, h.dtype)
        return 2 * (along + self.shift.to(h.device, h.dtype)).sigmoid()

    @property
    def twin(self) -> Twin:
        """As the kernels know it that read numbers anew."""
        rate, gamma, gate = self.rate, self.gamma, self.form["gate"]
        assert isinstance(rate, Tensor)
        if isinstance(gamma, Tensor):
            return Twin(f"slow_{gate}", rate.detach(), gamma.detach())
        return Twin(gate, rate.detach() * as_float(gamma))

    def value(self, a: Tensor, z: Tensor, at: Any) -> Tensor:
        gamma, gate = spread(self.gamma, a, at.row), self.form["gate"]
        if self.form["target"] == "slow":
            return slow_value(a, at.frozen_a, gamma, at.activation, gate)
        return gamma * gated(a, z, at.activation, gate)


class Learned(nn.Module):
    """Rules for some linears of a model, with parameters that begin as a rule set by hand, bit for bit or to rounding.

    It is given to `attach` like any rule; each linear takes its own part. Outside of `feed(graph=...)` its numbers are
    those that the parameters have then; the scan of a prompt in C and by Triton takes them, the fused steps do not.

    Args:
        rule: `Hebbian` or `LocalLeastSquares` with plain numbers. A decay of 0 stays 0, one above 0 is learned.
        sizes: (in_features, out_features) of each linear, by (layer, name).
        per: rate (and gamma of the slow target) for each "neuron" or each "layer", that is for each linear.
        modulated: whether m(h) is learned too, from 1.
        seen: what the parameters were learned from, plain values for JSON.

    Attributes:
        rate: multiplies every rate: a number, or a tuple of one per row of an episode. Not saved.

    Example:
        rule = fw.Learned.of(model, fw.Hebbian(1e-3), layers=[11, 12, 13])
        fw.attach(model, rule.layers, rule, rule.linears)
    """

    rate: Number = 1.0

    def __init__(
        self,
        rule: Any,
        sizes: Mapping[Address, tuple[int, int]],
        per: str = "neuron",
        modulated: bool = True,
        seen: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if per not in PER:
            raise ValueError(f"Learned(per={per!r}): expected one of {', '.join(map(repr, PER))}")
        if not sizes:
            raise ValueError("Learned() got no linears")
        self.form, self.per, self.modulated = _form(rule), per, bool(modulated)
        self.seen = dict(seen or {})
        options = (per, self.modulated)
        self.parts = nn.ModuleDict(
            {_key(address): Plasticity(self.form, *size, *options) for address, size in sorted(sizes.items())}
        )

    @classmethod
    def of(cls, model: Any, rule: Any, layers: Any, linears: Any = None, **options: Any) -> Learned:
        """For linears of a model; layers and linears as `attach` takes them, `options` as above."""
        family = model.config.family.linears
        depth = len(model.model.layers)
        layers = range(depth) if layers == "all" else [layers] if isinstance(layers, int) else list(layers)
        linears = list(family) if linears is None else [linears] if isinstance(linears, str) else list(linears)
        sizes = {}
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer < depth:
                raise ValueError(f"layer {layer!r} does not exist: this model has layers 0 to {depth - 1}")
            for name in linears:
                if name not in family:
                    raise ValueError(f"linear {name!r} does not exist: an MLP has {', '.join(family)}")
                linear: Sized = getattr(model.model.layers[layer].mlp, name)
                sizes[layer % depth, name] = (linear.in_features, linear.out_features)
        return cls(rule, sizes, **options)

    def __repr__(self) -> str:
        start = ", ".join(f"{name}={value!r}" for name, value in self.form.items() if name != "gate" or value != "ones")
        return f"Learned({start}, per={self.per!r}, modulated={self.modulated}, digest={self.digest[:12]})"

    @property
    def addresses(self) -> list[Address]:
        """(layer, name) of every linear that it has a rule for."""
        return [_address(key) for key in self.parts]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.addresses})

    @property
    def linears(self) -> list[str]:
        return list(dict.fromkeys(name for _, name in self.addresses))

    @property
    def digest(self) -> str:
        """SHA-256 of all parameters."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def for_linear(self, layer: int, name: str, in_features: int, out_features: int) -> Plasticity:
        """The rule of one linear; it shares the parameters of this object."""
        key = _key((layer, name))
        if key not in self.parts:
            known = ", ".join(f"{layer} {name}" for layer, name in self.addresses)
            raise ValueError(f"this learned rule has nothing for layer {layer} {name!r}; it has {known}")
        part = copy.copy(self.parts[key])
        assert isinstance(part, Plasticity)
        if (part.in_features, part.out_features) != (in_features, out_features):
            raise ValueError(
                f"this learned rule has a linear [{part.out_features}, {part.in_features}] at layer {layer} {name!r}, "
                f"but the model's is [{out_features}, {in_features}]"
            )
        part.factor = self.rate
        return part

    def save(self, folder: str | Path) -> None:
        """Writes rule.json and rule.safetensors, each whole or not at all; what a folder held of them is replaced."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        linears = {key: [part.in_features, part.out_features] for key, part in self.parts.items()}
        whole = {"format": FORMAT, "start": self.form, "per": self.per, "modulated": self.modulated}
        whole |= {"linears": linears, "seen": self.seen, "digest": self.digest}
        write_tensors(folder / FILES[1], dict(self.state_dict()), {"format": FORMAT})
        write_text(folder / FILES[0], json.dumps(whole, indent=1))


def load(folder: str | Path) -> Learned:
    """The learned rule in a folder, as `Learned.save` wrote it, bit for bit.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: it is broken, or of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist, expected a folder that fw.learn or save() wrote")
    whole = read_json(folder / FILES[0])
    if whole.get("format") != FORMAT:
        raise ValueError(f"{folder / FILES[0]} has format {whole.get('format')!r}, expected {FORMAT!r}")
    try:
        sizes = {_address(key): (int(size[0]), int(size[1])) for key, size in whole["linears"].items()}
        rule = Learned(_Start(whole["start"]), sizes, whole["per"], whole["modulated"], whole["seen"])
        rule.load_state_dict(load_file(folder / FILES[1]))
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a whole learned rule: {' '.join(str(error).split())[:200]}") from None
    if rule.digest != whole.get("digest"):
        raise ValueError(f"{folder / FILES[1]} does not hold the parameters that {FILES[0]} names: write both again")
    return rule


class _Start:
    """A hand-set rule as `rule.json` holds it."""

    def __init__(self, form: Mapping[str, Any]):
        self.__dict__.update(form)


def _form(rule: Any) -> dict[str, Any]:
    """The numbers of a hand-set rule, of the slow target or not; refuses what is neither."""
    name = type(rule).__name__
    gate, target = getattr(rule, "gate", None), getattr(rule, "target", "self")
    if gate not in GATES or not isinstance(target, str):
        raise ValueError(f"Learned() begins as a Hebbian or LocalLeastSquares, and got a {name}")
    form: dict[str, Any] = {"gate": gate, "target": target, "bias": rule.bias}
    numbers = {key: getattr(rule, key) for key in ("rate", "mu", "decay", "clip")}
    numbers["gamma"] = getattr(rule, "gamma", 1.0)
    for key, number in numbers.items():
        number = number[0] if isinstance(number, tuple) and len(number) == 1 else number
        if isinstance(number, tuple) or (isinstance(number, Tensor) and number.numel() > 1):
            raise ValueError(f"Learned() got a {name} with several {key}s, expected one number to begin with")
        form[key] = None if number is None else as_float(number)
    for key in ("rate", "gamma"):
        if not form[key]:
            raise ValueError(f"Learned() got a {name} with {key} 0, expected one to begin with, which is multiplied")
    if form["decay"] >= 1:
        raise ValueError(f"Learned() got a {name} with decay {form['decay']:g}, expected one below 1")
    return form


def _key(address: Address) -> str:
    return f"{address[0]}-{address[1]}"  # names of modules hold no dot


def _address(key: str) -> Address:
    layer, _, name = key.partition("-")
    return int(layer), name
