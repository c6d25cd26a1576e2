"""Directions: linear probes on activations, and the way between two vectors on the sphere.

Shape suffixes: L layers, N examples, D width, C classes, F folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe found, layer by layer.

    score: [L, F] float64 on held-out examples: share that is right, or R² of a regression.
    control: [L, F] the same with shuffled labels, which is what no information looks like.
    weights: [L, C, D] of a fit on all examples, for x as it was given: x @ weights[l].T + bias[l] are the scores of
        the classes (their softmax the probabilities), or the predicted number (C = 1). In x's dtype, on its device.
    bias: [L, C].
    classes: the labels, in the order of C; empty for a regression.
    """

    score: Tensor
    control: Tensor
    weights: Tensor
    bias: Tensor
    classes: list

    def __repr__(self) -> str:
        what = f"{len(self.classes)} classes" if self.classes else "a regression"
        best = int(self.score.mean(1).argmax())
        score, control = float(self.score[best].mean()), float(self.control[best].mean())
        return (
            f"LinearProbe of {what}, layers {len(self.score)}, folds {self.score.shape[1]}: "
            f"best at index {best}, score {score:.3f}, control {control:.3f}"
        )


def linear_probe(x: Tensor, y: Sequence | Tensor | np.ndarray, folds: int = 5, seed: int = 0) -> LinearProbe:
    """Whether a label can be read off activations by a linear map: cross-validated, beside shuffled labels.

    Every layer is fitted by itself, on standardised x, with scikit-learn's LogisticRegression (L2, C = 1) on
    stratified folds, or its Ridge (alpha = 1) where y holds floats.

    Args:
        x: [L, N, D], or [N, D] of one layer.
        y: [N] labels: whole numbers, texts or bools are classes; floats are regressed.
        folds: parts of the cross-validation; a class needs at least as many examples.
        seed: of the folds and the shuffled labels.

    Raises:
        ValueError: lengths that differ, a single class, a class with too few examples, numbers that are not finite.
        ImportError: scikit-learn is not there: pip install "fastweights[probes]".
    """
    x = torch.as_tensor(x).detach()
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"linear_probe() got x {list(x.shape)} of {x.dtype}: expected floats [L, N, D] or [N, D]")
    x_LND = (x if x.dim() == 3 else x[None]).double().cpu().numpy()
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"linear_probe(folds={folds!r}): expected a whole number, 2 or more")
    y_N, classes = _labels(y, x_LND.shape[1], folds)
    if not np.isfinite(x_LND).all():
        raise ValueError("linear_probe() got x with numbers that are not finite")
    try:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.model_selection import KFold, StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ImportError:
        raise ImportError('linear_probe() needs scikit-learn: pip install "fastweights[probes]"') from None
    make: Callable[[], Any] = (lambda: LogisticRegression(max_iter=1000)) if classes else Ridge
    split = (StratifiedKFold if classes else KFold)(folds, shuffle=True, random_state=seed)
    shuffled_N = np.random.default_rng(seed).permutation(y_N)
    score, control, weights, bias = [], [], [], []
    with threadpool_limits(1):  # the products are small: threads wait for each other longer than they compute
        for x_ND in x_LND:
            score.append(cross_val_score(make_pipeline(StandardScaler(), make()), x_ND, y_N, cv=split))
            control.append(cross_val_score(make_pipeline(StandardScaler(), make()), x_ND, shuffled_N, cv=split))
            scaler, fit = StandardScaler(), make()
            fit.fit(scaler.fit_transform(x_ND), y_N)
            w_CD = np.atleast_2d(fit.coef_) / scaler.scale_
            b_C = np.atleast_1d(fit.intercept_) - w_CD @ scaler.mean_
            if len(classes) == 2:  # one row of log-odds: half for the second class, half against the first
                w_CD, b_C = np.concatenate([-w_CD, w_CD]) / 2, np.concatenate([-b_C, b_C]) / 2
            weights.append(w_CD)
            bias.append(b_C)
    return LinearProbe(
        torch.from_numpy(np.stack(score)),
        torch.from_numpy(np.stack(control)),
        torch.from_numpy(np.stack(weights)).to(x),
        torch.from_numpy(np.stack(bias)).to(x),
        classes,
    )


def _labels(y: Any, examples: int, folds: int) -> tuple[np.ndarray, list]:
    """(class numbers or floats [N], the classes or [])."""
    if isinstance(y, Tensor):
        y = y.detach().cpu()
        y = (y.float() if y.dtype == torch.bfloat16 else y).numpy()
    if isinstance(y, Sequence) and not isinstance(y, str):
        y = [each.item() if isinstance(each, Tensor) and each.dim() == 0 else each for each in y]
        kinds = {type(each) for each in y}
        if str in kinds and len(kinds) > 1:  # numpy would write the numbers out as texts
            raise ValueError("linear_probe() got y of texts and other things: expected labels of one kind")
    try:
        given = np.asarray(y)
    except ValueError:
        raise ValueError("linear_probe() got y that is no list of labels: expected [N]") from None
    if given.ndim != 1 or given.dtype.kind not in "biufU":
        got = f"{list(given.shape)} of {given.dtype}"
        raise ValueError(f"linear_probe() got y {got}: expected [N] whole numbers, texts, bools or floats")
    if len(given) != examples:
        raise ValueError(f"linear_probe() got {len(given)} labels for {examples} examples: x is [L, N, D], y is [N]")
    if given.dtype.kind == "f":
        if not np.isfinite(given).all():
            raise ValueError("linear_probe() got y with numbers that are not finite")
        if len(given) < 2 * folds:
            raise ValueError(f"linear_probe(folds={folds}) got {len(given)} examples: a regression needs {2 * folds}")
        if (given == given[0]).all():
            raise ValueError(f"linear_probe() got y of one value, {given[0]}: expected numbers that differ")
        return given.astype(np.float64), []
    labels, numbers, counts = np.unique(given, return_inverse=True, return_counts=True)
    if len(labels) == 1:
        raise ValueError(f"linear_probe() got a single class, {labels[0].item()!r}: expected two or more")
    if counts.min() < folds:
        few = labels[counts.argmin()].item()
        raise ValueError(
            f"linear_probe(folds={folds}) got {counts.min()} of the class {few!r}: every class needs {folds} "
            "(floats in y are regressed)"
        )
    return numbers.reshape(-1), labels.tolist()


def slerp(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """Spherical interpolation from a to b along the last axis, in their dtype; norms are interpolated linearly.

    Args:
        a, b: [.., D], broadcast against each other.
        share: 0 gives a, 1 gives b; a number, or a tensor that broadcasts against [..].

    Raises:
        ValueError: widths that differ, a share outside 0 to 1, a vector of zeros, or opposite vectors: between those
            lie many ways.

    Nearly parallel vectors are interpolated linearly, which is the same there to rounding.
    """
    if not (a.is_floating_point() and b.is_floating_point()) or not (a.dim() and b.dim()):
        raise ValueError(
            f"slerp() got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}: expected floats [.., D]"
        )
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"slerp() got widths {a.shape[-1]} and {b.shape[-1]}: expected the same")
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = a.to(wide), b.to(a.device, wide)
    s = torch.as_tensor(share, dtype=wide, device=a.device)
    if not bool(((s >= 0) & (s <= 1)).all()):
        raise ValueError(f"slerp(share={share!r}): expected a share from 0 to 1")
    s = s[..., None] if s.dim() else s
    long_a, long_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    if not bool((long_a > 0).all() & (long_b > 0).all()):
        raise ValueError("slerp() got a vector without a direction: expected finite vectors that are not all zeros")
    a, b = a / long_a, b / long_b
    near = math.sqrt(torch.finfo(wide).eps)
    apart, sum = (a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True)
    if bool((sum < near).any()):
        raise ValueError("slerp() got opposite vectors: there is no single shortest way between them")
    angle = 2 * torch.atan2(apart, sum)  # exact to rounding for small angles, where acos is not
    parallel = apart < near
    sine = torch.where(parallel, 1, angle.sin())
    share_a = torch.where(parallel, 1 - s, ((1 - s) * angle).sin() / sine)
    share_b = torch.where(parallel, s, (s * angle).sin() / sine)
    return ((share_a * a + share_b * b) * ((1 - s) * long_a + s * long_b)).to(dtype)
