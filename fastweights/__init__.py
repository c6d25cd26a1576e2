"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .drift import Drift
from .episode import Episode
from .inputs import token_ids
from .moments import Moment
from .plastic import attach, detach
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .surgery import surgery
from .weights import load, save

__version__ = "0.1.0"

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
