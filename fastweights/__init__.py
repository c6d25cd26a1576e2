"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .anatomy import Anatomy, anatomy
from .attach import attach, detach
from .episode import Episode
from .episode_state import EpisodeState as Snapshot
from .generation import Step
from .inputs import token_ids
from .perplexity import Perplexity, perplexity
from .probes.align import Alignment, align
from .probes.capture import capture, edited
from .probes.edits import Edit, ablate, patch, project_out, steer
from .probes.exam import Exam, Scores
from .probes.lens import decompose, lens, ov, rank
from .probes.linear import LinearProbe, linear_probe, slerp
from .probes.sites import SITES
from .probes.trace import Trace
from .report.pictures import heat_map
from .rules import Delta, GradientAscent, Hebbian, LocalLeastSquares
from .sae import SAE, load_sae
from .sampling import Sampling
from .state.drift import Drift
from .state.moments import Moment
from .surgery import surgery
from .tokenizer import Tokenizer
from .version import __version__ as __version__
from .weights import load, save

__all__ = [
    "SAE",
    "SITES",
    "Alignment",
    "Anatomy",
    "Delta",
    "Drift",
    "Edit",
    "Episode",
    "Exam",
    "GradientAscent",
    "Hebbian",
    "LinearProbe",
    "LocalLeastSquares",
    "Moment",
    "Perplexity",
    "Sampling",
    "Scores",
    "Snapshot",
    "Step",
    "Tokenizer",
    "Trace",
    "ablate",
    "align",
    "anatomy",
    "attach",
    "capture",
    "decompose",
    "detach",
    "edited",
    "heat_map",
    "lens",
    "linear_probe",
    "load",
    "load_sae",
    "ov",
    "patch",
    "perplexity",
    "project_out",
    "rank",
    "save",
    "slerp",
    "steer",
    "surgery",
    "token_ids",
]
