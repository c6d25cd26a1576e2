"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .attach import attach, detach
from .episode import Episode
from .episode_state import EpisodeState as Snapshot
from .inputs import token_ids
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .state.drift import Drift
from .state.moments import Moment
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
    "Snapshot",
    "attach",
    "detach",
    "load",
    "save",
    "surgery",
    "token_ids",
]
