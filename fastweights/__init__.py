"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .drift import Drift
from .episode import Episode
from .generation import Step
from .inputs import token_ids
from .moments import Moment
from .plastic import attach, detach
from .probing import Trace
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .sampling import Sampling
from .snapshot import Snapshot
from .surgery import surgery
from .tokenizer import Tokenizer
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
    "load",
    "save",
    "surgery",
    "token_ids",
]
