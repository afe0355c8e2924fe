"""Feed-forward blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.layers.linear import GatedLinear, Linear


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
        self.gate_up = GatedLinear((features,), (shards, 2, each), axes, bias=bias, dtype=dtype)
        self.down = Linear((shards, each), (features,), ("embed", "mlp", None), bias=bias, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.gate_up.gated(x, self.activation))

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
