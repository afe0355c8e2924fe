"""Activations by the names that configs give them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x). XLA makes sigmoid from tanh, which has no relative precision far below zero."""
    return x / (1.0 + jnp.exp(-x))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}

GATES = {"silu": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""What kernels call those that they may have."""
