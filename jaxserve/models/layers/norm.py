"""Normalisations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.models.layers.param import weight


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, features: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.weight = weight((features,), (None,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * self.weight[...].astype(jnp.float32)
