"""What an RMS norm can give, and from what: a norm behind an MLP gives vectors of an ellipsoid alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .model import RMSNorm


@dataclass(frozen=True)
class Reach:
    """The input of an RMS norm that makes it give a vector, or the nearest that it can give.

    With factor w it gives y = w d / √(mean d² + eps), so mean (y / w)² < 1. Such a y is given by d = (y / w) √(s + eps)
    with s = mean d² = eps ρ² / (1 − ρ²), ρ² = mean (y / w)². Any other is replaced by the nearest of ρ² = 1 − 1e-6:
    y_i ← y_i w_i² / (w_i² + λ), with the λ > 0 that fits.

    before: d [D]. exact: whether y itself is given.
    """

    before: Tensor
    exact: bool

    @classmethod
    def of(cls, norm: RMSNorm, y_D: Tensor) -> Reach:
        """Computed in float64."""
        y, w, most = y_D.double(), norm.factor.double(), 1 - 1e-6
        ratio = torch.where(w == 0, 0.0, y / w)
        exact = bool(ratio.square().mean() <= most) and not bool(((w == 0) & (y != 0)).any())
        if not exact:
            least, largest = torch.zeros_like(y[0]), (y * w).square().mean().sqrt() / most + w.square().max()
            for _ in range(80):  # the mean falls as λ grows
                middle = (least + largest) / 2
                inside = (y * w / (w.square() + middle)).square().mean() <= most
                least, largest = torch.where(inside, least, middle), torch.where(inside, middle, largest)
            ratio = y * w / (w.square() + largest)
        rho = ratio.square().mean()
        square = norm.eps * rho / (1 - rho)
        return cls((ratio * (square + norm.eps).sqrt()).to(y_D.dtype), exact)
