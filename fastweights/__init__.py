"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .attach import attach, detach
from .drift import Drift
from .episode import Episode
from .inputs import token_ids
from .moments import Moment
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .surgery import surgery
from .weights import load, save

__all__ = [
    "Delta",
    "Drift",
    "Episode",
    "GradientAscent",
    "Hebbian",
    "LocalLeastSquares",
    "Moment",
    "attach",
    "detach",
    "load",
    "save",
    "surgery",
    "token_ids",
]
