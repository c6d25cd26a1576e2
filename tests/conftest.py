"""The real default model, once per session, through the same path as a user's; one thread for each of two workers."""

import os

import pytest
import torch

import fastweights as fw
from fastweights.hub import default_folder

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two workers would wait for each other
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def memory_that_nobody_has_written_is_nan():
    """`torch.empty` gives NaN, so that a read before the first write fails in every run, and not once in a hundred."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the default model in float32; do not change the weights."""
    return fw.load(dtype="float32")


@pytest.fixture(scope="session")
def smollm2_folder(smollm2):
    """The folder of the default model, as transformers reads it; cached once it has been loaded."""
    return default_folder(lambda source, folder: None)
