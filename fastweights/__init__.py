"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .attach import attach, detach
from .episode import Episode
from .episode_state import EpisodeState as Snapshot
from .generation import Step
from .inputs import token_ids
from .probes.capture import capture, edited
from .probes.edits import Edit, ablate, patch, project_out, steer
from .probes.exam import Exam, Scores
from .probes.sites import SITES
from .probes.trace import Trace
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .sampling import Sampling
from .state.drift import Drift
from .state.moments import Moment
from .surgery import surgery
from .tokenizer import Tokenizer
from .weights import load, save

__version__ = "0.1.0"

__all__ = [
    "SITES",
    "Delta",
    "Drift",
    "Edit",
    "Episode",
    "Exam",
    "GradientAscent",
    "Hebbian",
    "LocalLeastSquares",
    "Moment",
    "Sampling",
    "Scores",
    "Snapshot",
    "Step",
    "Tokenizer",
    "Trace",
    "ablate",
    "attach",
    "capture",
    "detach",
    "edited",
    "load",
    "patch",
    "project_out",
    "save",
    "steer",
    "surgery",
    "token_ids",
]
