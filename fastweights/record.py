"""What an experiment returns, and the folder that it is saved to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from .files import warn, write_tensors, write_text
from .report import write
from .state.drift import Drift


@dataclass(frozen=True)
class Event:
    """One write: the `number`-th (from 1), made by the token at `position`.

    logprob [A] and distance [L+1] are of the probe after it; None where `probe_every` left it out.
    """

    number: int
    position: int
    token_id: int
    token: str
    generated: bool
    logprob: Tensor | None = None
    distance: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """What an experiment returns. Row 0 of every array is the untouched model without the context.

    Its arrays are on the CPU, wherever the model is.

    settings: rule, layers, linears, … as the caller gave them, and the versions that ran.
    tokens, token_ids: what was read (and generated, if asked for).
    events: every event; `probed` [N] tells which row stands behind how many events.
    logprob [N, A]: log-probability of each answer after the question, summed over its tokens, in nats.
    target_logprob [A]: the same of the untouched model with the context in front.
    distance, cosine, relative [N, L+1]: of the hidden state at the answer position from the one with context:
        ‖test − target‖, 1 − cos(test, target), ‖test − target‖ / ‖target‖. Column ℓ is the residual stream
        after ℓ layers (0 = embedding, L = before the final norm).
    top: the likeliest next tokens after the question, per row: (token, log-probability).
    delta_norm [N]: Frobenius norm of ΔW over all plastic linears together.
    drift: what had changed at the end, and where.
    lens [3, L+1]: of the untouched model, of the last row and of the target, what `top` would be if the final norm
        and the unembedding came after ℓ layers.
    """

    tokens: list[str]
    token_ids: list[int]
    question_ids: list[int]
    answers: list[str]
    answer_ids: list[list[int]]
    events: list[Event]
    probed: list[int]
    logprob: Tensor
    target_logprob: Tensor
    distance: Tensor
    cosine: Tensor
    relative: Tensor
    delta_norm: Tensor
    top: list[list[tuple[str, float]]]
    target_top: list[tuple[str, float]]
    drift: Drift
    settings: dict = field(default_factory=dict)
    lens: list[list[list[tuple[str, float]]]] = field(default_factory=list)

    ARRAYS: ClassVar = ("logprob", "target_logprob", "distance", "cosine", "relative", "delta_norm")

    def to_dict(self) -> dict:
        """Everything as plain JSON values."""
        whole = {key: value for key, value in self.__dict__.items() if key not in (*self.ARRAYS, "events", "drift")}
        whole["drift"] = self.drift.to_list()
        whole |= {name: getattr(self, name).tolist() for name in self.ARRAYS}
        drop = ("logprob", "distance")  # they are the record's rows
        whole["events"] = [
            {key: value for key, value in asdict(event).items() if key not in drop} for event in self.events
        ]
        return whole

    def save(self, folder: str | Path) -> list[str]:
        """Writes the record and its report into `folder`, which is made if need be; returns the names of the files.

        record.json holds everything, arrays.safetensors the arrays, exact, report.html and the PNGs are for people.
        The report needs matplotlib (`pip install "fastweights[report]"`). Without it, record.json and
        arrays.safetensors are written, a warning says so, and `fastweights.report.write` can make the report later.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "arrays.safetensors", {name: getattr(self, name) for name in self.ARRAYS}, {})
        write_text(folder / "record.json", json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n")
        names = ["record.json", "arrays.safetensors"]
        try:
            return names + write(self, folder)
        except ImportError as error:
            warn(f"{folder} holds {' and '.join(names)}, and no report of them: {error}")
            return names
