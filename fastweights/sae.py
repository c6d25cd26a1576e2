"""Sparse autoencoders: features of a site's activations, and edits of them that leave the rest as it was."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .files import warn
from .sae_files import Settings, place_of, read_sae
from .weights import device_of, dtype_of

PER_HEAD = ("q", "q_rot", "k", "k_rot", "v", "z")
# models whose writing weights TransformerLens can center, and those without LayerNorm, where it skips that
LAYER_NORM = re.compile(r"gpt|pythia|\bopt-|bloom|tiny-?stories|phi-[12]|gelu-|solu-|attn-only", re.IGNORECASE)
RMS_NORM = re.compile(r"llama|gemma|mistral|mixtral|qwen|smollm|deepseek|olmo-?2|gpt-oss|phi-[34]", re.IGNORECASE)
CENTERED_SITES = ("embedding", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
TOKENS_AT_ONCE = 1 << 25  # features of one piece of `error`


class Reconstruction(NamedTuple):
    """How well an SAE gives back activations: the share of variance that is missing, active features per token."""

    variance_unexplained: float
    l0: float


@dataclass(frozen=True, eq=False, repr=False)
class SAE:
    """A sparse autoencoder of D-wide activations with N features, as `load_sae` gives it.

    Weights may be in any dtype; all is computed in float32, or in float64 where x or the weights are.
    At a site of heads x may be [..., H, E] with H · E = D, and is read as its heads one behind the other.
    """

    W_enc: Tensor  # [D, N]
    W_dec: Tensor  # [N, D]: what one unit of each feature adds, before the normalisation is undone
    b_dec: Tensor  # [D]
    b_enc: Tensor | None  # [N]; None: gated
    threshold: Tensor | None  # [N]; None: not jumprelu
    architecture: str  # "standard", "gated", "jumprelu" or "topk"
    layer: int | None  # None: not known
    site: str | None  # None: not known
    k: int | None = None
    normalize: str = "none"  # or "layer_norm", "constant_norm_rescale": of each token
    center: bool = False  # the mean over D is removed first and given back at the end
    apply_b_dec_to_input: bool = True
    b_gate: Tensor | None = None  # [N]; gated alone, as the next two
    b_mag: Tensor | None = None
    r_mag: Tensor | None = None

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., N] of activations [..., D]; ValueError names another width or device, or integers."""
        return self._features(self._normalized(self._flat(x))[0])

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """Activations [..., D] from features [..., N].

        x, the activations that were encoded, says what to give back where the SAE removes each token's mean or
        size; ValueError where it is left out there. With x the result has its shape, [..., H, E] included.
        """
        if features.shape[-1] != (N := len(self.W_dec)):
            raise ValueError(f"features are {list(features.shape)}, expected [..., {N}]")
        self._check_device("features are", features)
        if x is None and (self.center or self.normalize != "none"):
            what = "mean" if self.normalize == "none" else f"{self.normalize} of each token"
            raise ValueError(f"this SAE removes the {what}: decode(features, x) needs x, which was encoded")
        dtype = self._dtype(features)
        decoded = features.to(dtype) @ self.W_dec.to(dtype) + self.b_dec.to(dtype)
        if x is None:
            return decoded
        _, mean, size = self._normalized(self._flat(x))
        return (decoded * size + mean).reshape(x.shape)

    def set(
        self, feature: int | Sequence[int], value: float | Tensor | Callable[[Tensor], Tensor]
    ) -> Callable[..., Tensor]:
        """A change for `Edit` that sets features and keeps what the SAE does not explain: x + (f′ − f) W_dec.

        Args:
            feature: a number, or K of them, from 0.
            value: what they become: a number, a tensor [K], or a function of their values [..., K].

        The change is (x, at) → x′, in x's shape and dtype; the normalisation is undone in it. ValueError names a
        feature that is out of range.

        Example:
            fw.Edit(sae.site, sae.set(7, 0.0), layers=sae.layer)
        """
        chosen = [int(one) for one in feature] if isinstance(feature, Sequence) else [int(feature)]
        N = len(self.W_dec)
        if wrong := [one for one in chosen if not 0 <= one < N]:
            raise ValueError(f"feature {wrong[0]} is out of range, expected 0 to {N - 1}")
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"features are {chosen}, expected each once, and at least one")
        if not callable(value) and not bool(torch.as_tensor(value).isfinite().all()):
            raise ValueError(f"the features' value is {value}, expected numbers that are finite")
        index = torch.tensor(chosen, device=self.W_dec.device)

        def change(x: Tensor, at: Any = None) -> Tensor:
            flat = self._flat(x)
            y, _, size = self._normalized(flat)
            old = self._features(y)[..., index]
            new = torch.as_tensor(value(old) if callable(value) else value, dtype=old.dtype, device=old.device)
            if new.shape not in ((), old.shape, old.shape[-1:]):
                raise ValueError(f"the features' values became {list(new.shape)}, expected {list(old.shape)}")
            moved = flat + (new - old) @ self.W_dec[index].to(old.dtype) * size
            return moved.reshape(x.shape).to(x.dtype)

        return change

    def error(self, x: Tensor) -> Reconstruction:
        """What reconstruction of activations [..., D] misses, over all the tokens given: leave padding out.

        `variance_unexplained` is the sum of the squared residuals over that of the squared deviations from the
        mean token, `l0` the mean number of active features. ValueError where the tokens do not differ.
        """
        flat = self._flat(x).reshape(-1, len(self.b_dec))
        spread = float((flat.double() - flat.double().mean(0, keepdim=True)).square().sum()) if len(flat) else 0.0
        if spread == 0:
            raise ValueError(f"x holds {len(flat)} tokens that do not differ, expected some that do")
        missed, active = 0.0, 0
        for piece in flat.split(max(1, TOKENS_AT_ONCE // len(self.W_dec))):
            features = self.encode(piece)
            missed += float((self.decode(features, piece) - piece).double().square().sum())
            active += int((features != 0).sum())
        return Reconstruction(missed / spread, active / len(flat))

    def __repr__(self) -> str:
        N, D = self.W_dec.shape
        site = f"{self.site or 'a site not known'}" + ("" if self.layer is None else f" of layer {self.layer}")
        more = [f"k {self.k}"] * (self.k is not None) + [self.normalize] * (self.normalize != "none")
        more += ["centered"] * self.center + [str(self.W_dec.dtype).removeprefix("torch."), str(self.W_dec.device)]
        return f"SAE({self.architecture}, {D} → {N} features, {site}, {', '.join(more)})"

    # ---- the steps

    def _dtype(self, x: Tensor) -> torch.dtype:
        return torch.promote_types(torch.promote_types(x.dtype, self.W_dec.dtype), torch.float32)

    def _check_device(self, what: str, x: Tensor) -> None:
        if x.device != self.W_dec.device:
            raise ValueError(
                f"{what} on {x.device} and the SAE on {self.W_dec.device}: load_sae(..., device=) moves it"
            )

    def _flat(self, x: Tensor) -> Tensor:
        """x as [..., D] in the dtype that is computed in."""
        D = len(self.b_dec)
        if not x.is_floating_point():
            raise ValueError(f"x holds {x.dtype}, expected the activations of a site")
        self._check_device("x is", x)
        flat = x
        if self.site in PER_HEAD and x.ndim > 1 and x.shape[-1] != D and x.shape[-2] * x.shape[-1] == D:
            flat = x.flatten(-2)
        if not flat.ndim or flat.shape[-1] != D:
            heads = f", or [..., H, E] with H · E = {D}" if self.site in PER_HEAD else ""
            raise ValueError(f"x is {list(x.shape)}, expected [..., {D}]{heads}")
        return flat.to(self._dtype(x))

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """What the encoder reads, and the mean and size that decoding gives back."""
        mean: Tensor | float = 0.0
        if self.center or self.normalize == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            x = x - mean
        if self.normalize == "layer_norm":
            size = x.std(-1, keepdim=True)
            return x / (size + 1e-5), mean, size
        if self.normalize == "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True).clamp_min(1e-30) / math.sqrt(x.shape[-1])
            return x / size, mean, size
        return x, mean, 1.0

    def _features(self, y: Tensor) -> Tensor:
        if self.apply_b_dec_to_input:
            y = y - self.b_dec.to(y.dtype)
        product = y @ self.W_enc.to(y.dtype)
        if self.b_gate is not None and self.b_mag is not None and self.r_mag is not None:
            b_gate, b_mag, r_mag = (vector.to(y.dtype) for vector in (self.b_gate, self.b_mag, self.r_mag))
            return torch.where(product + b_gate > 0, (product * r_mag.exp() + b_mag).relu(), 0.0)
        assert self.b_enc is not None  # every other architecture has one
        before = product + self.b_enc.to(y.dtype)
        if self.threshold is not None:
            return torch.where(before > self.threshold.to(y.dtype), before.relu(), 0.0)
        if self.k is not None:
            largest = before.topk(self.k, dim=-1)
            return torch.zeros_like(before).scatter(-1, largest.indices, largest.values.relu())
        return before.relu()


def load_sae(
    folder: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    layer: int | None = None,
    site: str | None = None,
    center: bool | None = None,
    scale: float | None = None,
) -> SAE:
    """Reads a sparse autoencoder from a folder of SAELens (before and after 6.0), Gemma Scope or sparsify.

    Args:
        folder: with cfg.json and sae_weights.safetensors, params.npz, or cfg.json and sae.safetensors.
        dtype: that the weights are kept in; None: float32, or float64 where they are stored in it. What is
            narrower takes less memory, and every call widens it again.
        device: None is the CPU.
        layer, site: where it reads, over what the folder says; needed where it names no site of ours.
        center: it was trained on activations without their mean over D (TransformerLens'
            `center_writing_weights`), over what the folder says.
        scale: the factor of `expected_average_only_in`, 1.0 where it is in the weights already; needed where
            cfg.json names that normalisation and no activation_scaler.json lies beside it.

    Raises ValueError or FileNotFoundError with one sentence that names what is wrong: transcoders, architectures,
    activations and normalisations that are not read here, tensors that are missing, of another shape or not finite.

    Example:
        sae = fw.load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre", center=True)
    """
    wanted, target = dtype_of(dtype), device_of(device)
    settings, tensors = read_sae(Path(folder).expanduser())
    layer, site = _place(settings, layer, site)
    centered = _centered(settings, site, center)
    factor = _scale(settings, scale)
    wide = torch.float64 if tensors["W_dec"].dtype == torch.float64 else torch.float32
    tensors = {name: tensor.to(target, wide) for name, tensor in tensors.items()}
    _fold(tensors, factor, settings.rescale_acts_by_decoder_norm)
    tensors = {name: tensor.to(wanted or wide) for name, tensor in tensors.items()}
    return SAE(
        tensors["W_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        tensors.get("b_enc"),
        tensors.get("threshold"),
        settings.architecture,
        layer,
        site,
        settings.k if settings.architecture == "topk" else None,
        "none" if settings.normalize == "expected_average_only_in" else settings.normalize,
        centered,
        settings.apply_b_dec_to_input,
        *(tensors.get(name) for name in ("b_gate", "b_mag", "r_mag")),
    )


def _place(settings: Settings, layer: int | None, site: str | None) -> tuple[int | None, str | None]:
    said_layer, said_site = place_of(settings.hook) if settings.hook else (settings.layer, None)
    if settings.hook and said_site is None and site is None:
        raise ValueError(
            f"{settings.path}: it reads {settings.hook}, which is no site here: name what it reads by load_sae(..., "
            "layer=, site=)"
        )
    return said_layer if layer is None else layer, site or said_site


def _centered(settings: Settings, site: str | None, center: bool | None) -> bool:
    """Whether x loses its mean over D; TransformerLens centers what is written into the stream, under LayerNorm."""
    if center is not None:
        return center
    model, said = settings.model, settings.centered
    no_matter = site not in (None, *CENTERED_SITES) or settings.normalize == "layer_norm" or RMS_NORM.search(model)
    if said is False or no_matter:
        return False
    if said and site is not None and LAYER_NORM.search(model):
        return True
    if said:
        raise ValueError(
            f"{settings.path}: center_writing_weights is true, and whether TransformerLens centers {site or 'the site'}"
            f" of {model or 'a model without a name'} is not known here: load_sae(..., center=True or False) decides"
        )
    warn(
        f"{settings.path} does not say whether the SAE was trained on activations without their mean over D (as "
        "gpt2-small-res-jb was): they are taken with it; load_sae(..., center=True or False) decides"
    )
    return False


def _scale(settings: Settings, scale: float | None) -> float:
    if settings.normalize != "expected_average_only_in":
        if scale is not None:
            raise ValueError(f"scale is {scale}, and {settings.path} names no normalisation that has one")
        return 1.0
    scale = settings.scale if scale is None else scale
    if scale is None:
        raise ValueError(
            f"{settings.path}: normalize_activations is expected_average_only_in, whose factor is not in the folder: "
            "give it by load_sae(..., scale=), 1.0 where it is in the weights already"
        )
    if not (isinstance(scale, (int, float)) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale!r}, expected a number above 0")
    return float(scale)


def _fold(tensors: dict[str, Tensor], scale: float, by_decoder_norm: bool) -> None:
    """Puts every factor of the activations and of the features into the weights."""
    if (factor_N := tensors.pop("finetuning_scaling_factor", None)) is not None:
        tensors["W_dec"] = tensors["W_dec"] * factor_N[:, None]
    if scale != 1:
        tensors["W_enc"] = tensors["W_enc"] * scale
        tensors["W_dec"], tensors["b_dec"] = tensors["W_dec"] / scale, tensors["b_dec"] / scale
    if by_decoder_norm:  # so that W_dec is what one unit of a feature adds
        norm_N = tensors["W_dec"].norm(dim=-1).clamp_min(1e-8)
        tensors["W_enc"], tensors["b_enc"] = tensors["W_enc"] * norm_N, tensors["b_enc"] * norm_N
        tensors["W_dec"] = tensors["W_dec"] / norm_N[:, None]
