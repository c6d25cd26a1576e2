"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .attach import attach, detach
from .episode import Episode
from .episode_state import EpisodeState as Snapshot
from .generation import Step
from .inputs import token_ids
from .probe import Trace
from .report.pictures import heat_map
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .sampling import Sampling
from .state.drift import Drift
from .state.moments import Moment
from .surgery import surgery
from .tokenizer import Tokenizer
from .version import __version__ as __version__
from .weights import load, save

__all__ = [
    "Delta",
    "Drift",
    "Episode",
    "GradientAscent",
    "Hebbian",
    "LocalLeastSquares",
    "Moment",
    "Sampling",
    "Snapshot",
    "Step",
    "Tokenizer",
    "Trace",
    "attach",
    "detach",
    "heat_map",
    "load",
    "save",
    "surgery",
    "token_ids",
]
