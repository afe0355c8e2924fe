"""Feed-forward blocks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.layers.linear import Linear


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


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020).

    gate and up are one weight [shards, 2, width // shards, embed], so that a shard is a slice of it.
    """

    def __init__(
        self, features: int, width: int, activation: str, shards: int, *, bias: bool, dtype: jnp.dtype
    ):
        self.activation = activation
        each = width // shards
        axes = ("mlp", None, None, "embed")
        self.gate_up = Linear((features,), (shards, 2, each), axes, bias=bias, dtype=dtype)
        self.down = Linear((shards, each), (features,), ("embed", "mlp", None), bias=bias, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        both = self.gate_up(x)
        return self.down(ACTIVATIONS[self.activation](both[:, :, 0]) * both[:, :, 1])

    @staticmethod
    def fuse(shards: int, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """[shards, 2, width // shards, ...] from gate and up [width, ...], padded with zeros to fit."""
        parts = [GatedMLP.split(shards, x) for x in (gate, up)]
        return np.stack(parts, axis=1)

    @staticmethod
    def split(shards: int, x: np.ndarray) -> np.ndarray:
        """[shards, width // shards, ...] from [width, ...], padded with zeros to fit."""
        short = -len(x) % shards
        x = np.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)) if short else x
        return x.reshape(shards, -1, *x.shape[1:])
