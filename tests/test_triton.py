"""The Triton backend inside the model: the same numbers as torch, in prompts, single tokens and probes.

Without a GPU the kernels run in Triton's interpreter, in a process of their own, as in test_kernels.
"""

from pathlib import Path

import pytest
import torch
from interpreted import run_interpreted
from tiny import tiny

import fastweights as fw

if torch.cuda.is_available():
    from triton_backend import *  # noqa: F403
else:

    def test_every_test_of_triton_backend_passes_interpreted():
        run_interpreted(Path(__file__).with_name("triton_backend.py"))


@pytest.mark.parametrize(
    ("rule", "dtype", "message"),
    [
        (fw.GradientAscent(rate=0.1), torch.float32, "GradientAscent has no Triton twin, use 'torch'"),
        (fw.Hebbian(), torch.float64, "computes in float32: use 'torch' for a float64 model"),
        (fw.Hebbian(), torch.float32, "needs CUDA .or TRITON_INTERPRET=1.: this model is on cpu"),
    ],
)
def test_triton_is_refused_where_it_cannot_run_and_nothing_falls_back(rule, dtype, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=message):
        fw.attach(tiny(dtype), [1], rule, backend="triton")


def test_auto_on_a_cpu_is_torch():
    fast = fw.attach(tiny(torch.float32), [1], fw.Hebbian())
    assert {linear.backend for linear in fast.linears.values()} == {"torch"}
