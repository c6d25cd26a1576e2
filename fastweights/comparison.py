"""A model with a context, without it, and without it but patched: what they say, and how far apart they are.

Shape suffixes: T query tokens, V vocabulary, L layers, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

Seen = tuple[Tensor, Tensor]  # logits [T, V] and the stream behind every layer [T, L, D]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same tokens in three runs; tensors are on the CPU.

    Attributes:
        reference, unpatched, patched: logits [T, V] with the context, without it, and without it but patched.
        layer_error, unpatched_layer_error: [T, L] float64, ‖stream − stream_C‖ / ‖stream_C‖ behind each layer, patched
            and not.
    """

    reference: Tensor
    unpatched: Tensor
    patched: Tensor
    layer_error: Tensor
    unpatched_layer_error: Tensor

    def __repr__(self) -> str:
        return (
            f"Comparison(tokens={len(self.reference)}, agreement={self.agreement:.3g} "
            f"({self.unpatched_agreement:.3g} unpatched), difference={self.difference:.3g} "
            f"({self.unpatched_difference:.3g}))"
        )

    @classmethod
    def of(cls, reference: Seen, unpatched: Seen, patched: Seen) -> Comparison:
        """Of what the three runs saw."""
        logits = (run[0].detach().cpu() for run in (reference, unpatched, patched))
        target_TLD, bare_TLD, own_TLD = (run[1].detach().cpu().double() for run in (reference, unpatched, patched))
        norm_TL = target_TLD.norm(dim=-1)
        errors = ((stream_TLD - target_TLD).norm(dim=-1) / norm_TL for stream_TLD in (own_TLD, bare_TLD))
        return cls(*logits, *errors)

    @property
    def agreement(self) -> float:
        """The share of tokens after which the patched model's first choice is the reference's."""
        return _agreement(self.reference, self.patched)

    @property
    def unpatched_agreement(self) -> float:
        """The same of the unpatched model."""
        return _agreement(self.reference, self.unpatched)

    @property
    def difference(self) -> float:
        """The largest difference of a logit between the patched model and the reference."""
        return _difference(self.reference, self.patched)

    @property
    def unpatched_difference(self) -> float:
        """The same of the unpatched model."""
        return _difference(self.reference, self.unpatched)

    def to_dict(self) -> dict[str, Any]:
        """Its numbers as JSON holds them: shares, differences, and the errors of each token and layer."""
        names = ("agreement", "unpatched_agreement", "difference", "unpatched_difference")
        errors = {name: getattr(self, name).tolist() for name in ("layer_error", "unpatched_layer_error")}
        return {name: getattr(self, name) for name in names} | errors


def _agreement(a_TV: Tensor, b_TV: Tensor) -> float:
    return float((a_TV.argmax(-1) == b_TV.argmax(-1)).double().mean())


def _difference(a_TV: Tensor, b_TV: Tensor) -> float:
    return float((a_TV.double() - b_TV.double()).abs().max())
