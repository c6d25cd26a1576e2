"""Triton's tests without a GPU: a file of tests once more, in a process of its own, in which kernels are interpreted.

The interpreter must be chosen before a kernel is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run_interpreted(file, *options):
    """Fails unless every chosen test of the file passes there."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            *options,
            str(file),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert "[100%]" in done.stdout, done.stdout


@pytest.fixture(autouse=True)
def nan_filled_outputs():
    """torch.empty gives NaN, so that what a kernel forgets to write is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # and fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(False)
