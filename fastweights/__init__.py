"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .anatomy import Anatomy, anatomy
from .attach import attach, detach
from .episode import Episode
from .episode_state import EpisodeState as Snapshot
from .generation import Step
from .inputs import token_ids
from .probe import Trace
from .probes.align import Alignment, align
from .probes.exam import Exam, Scores
from .probes.lens import decompose, lens, ov, rank
from .probes.linear import LinearProbe, linear_probe, slerp
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .sampling import Sampling
from .state.drift import Drift
from .state.moments import Moment
from .surgery import surgery
from .tokenizer import Tokenizer
from .weights import load, save

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "Anatomy",
    "Delta",
    "Drift",
    "Episode",
    "Exam",
    "GradientAscent",
    "Hebbian",
    "LinearProbe",
    "LocalLeastSquares",
    "Moment",
    "Sampling",
    "Scores",
    "Snapshot",
    "Step",
    "Tokenizer",
    "Trace",
    "align",
    "anatomy",
    "attach",
    "decompose",
    "detach",
    "lens",
    "linear_probe",
    "load",
    "ov",
    "rank",
    "save",
    "slerp",
    "surgery",
    "token_ids",
]
