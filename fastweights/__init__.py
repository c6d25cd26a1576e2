"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .attach import attach, detach
from .episode import Episode
from .episode_state import EpisodeState as Snapshot
from .generation import Step
from .inputs import token_ids
from .probe import Trace
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .sae import SAE, load_sae
from .sampling import Sampling
from .state.drift import Drift
from .state.moments import Moment
from .surgery import surgery
from .tokenizer import Tokenizer
from .weights import load, save

__version__ = "0.1.0"

__all__ = [
    "SAE",
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
    "load",
    "load_sae",
    "save",
    "surgery",
    "token_ids",
]
