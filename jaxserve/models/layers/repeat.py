"""Decoder layers that are alike, traced once."""

from functools import partial
from typing import Any

import jax
from flax import nnx


def apply(layer: nnx.Module, *args: Any) -> Any:
    """layer(*args) through a jit that all layers of the same structure share: tracing a step of thirty
    layers costs one. XLA inlines the calls, so the program is the same. `args` are pytrees."""
    graph, state = nnx.split(layer)
    return _apply(graph, state, *args)


@partial(jax.jit, static_argnums=0)
def _apply(graph: Any, state: Any, *args: Any) -> Any:
    return nnx.merge(graph, state)(*args)
