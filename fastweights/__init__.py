"""fastweights: a Llama whose MLP weights change while it reads and writes."""

from .anatomy import Anatomy, anatomy
from .attach import attach, detach
from .comparison import Comparison
from .context import Patch, context_patch
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
from .ridge import RidgePatch, ridge_patch
from .rules import ContextPatch, Delta, GradientAscent, Hebbian, LocalLeastSquares
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
    "Comparison",
    "ContextPatch",
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
    "Patch",
    "Perplexity",
    "RidgePatch",
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
    "context_patch",
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
    "ridge_patch",
    "save",
    "slerp",
    "steer",
    "surgery",
    "token_ids",
]
