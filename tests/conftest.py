"""Shared by all tests: the CPU (unless JAX_PLATFORMS says otherwise) and the default model.

`$JAXSERVE_HOME` is the user's own, so that the model is fetched once and compiled programs last between runs.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's .gguf file, fetched as a user's first start would."""
    from jaxserve.config import DEFAULT_MODEL
    from jaxserve.loading.hub import resolve

    return resolve(DEFAULT_MODEL)
