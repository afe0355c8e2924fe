"""jaxserve: an inference and serving engine for large language models on JAX."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine as AsyncEngine
    from jaxserve.engine.engine import LLM as LLM
    from jaxserve.engine.engine import Engine as Engine
    from jaxserve.models.registry import register_model as register_model
    from jaxserve.outputs import CompletionOutput as CompletionOutput
    from jaxserve.outputs import RequestOutput as RequestOutput
    from jaxserve.sampling_params import BeamSearchParams as BeamSearchParams
    from jaxserve.sampling_params import GuidedDecodingParams as GuidedDecodingParams
    from jaxserve.sampling_params import SamplingParams as SamplingParams
    from jaxserve.sampling_params import StructuredOutputsParams as StructuredOutputsParams

# Resolved on first use, so that `jaxserve --help` does not wait for jax.
_HOME = {
    "Engine": "jaxserve.engine.engine",
    "LLM": "jaxserve.engine.engine",
    "AsyncEngine": "jaxserve.engine.async_engine",
    "BeamSearchParams": "jaxserve.sampling_params",
    "GuidedDecodingParams": "jaxserve.sampling_params",
    "SamplingParams": "jaxserve.sampling_params",
    "StructuredOutputsParams": "jaxserve.sampling_params",
    "RequestOutput": "jaxserve.outputs",
    "CompletionOutput": "jaxserve.outputs",
    "register_model": "jaxserve.models.registry",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
