"""The real default model, once per session, through the same path as a user's."""

import pytest

import fastweights as fw
from fastweights.hub import default_folder


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of the default model in float32; do not change the weights."""
    return fw.load(dtype="float32")


@pytest.fixture(scope="session")
def smollm2_folder(smollm2):
    """The folder of the default model, as transformers reads it; cached once it has been loaded."""
    return default_folder(lambda source, folder: None)
