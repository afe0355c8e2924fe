"""Normalisations."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.models.layers.param import Features, Scope, plain


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axes, in float32 (Zhang & Sennrich, 2019).

    `features` may be spread over several axes and padded with zeros, which count for nothing. `offset` is
    added to the weight (Gemma's are kept around zero).
    """

    def __init__(self, scope: Scope, features: int | Features, eps: float, offset: float = 0.0):
        sized = isinstance(features, int)
        self.eps, self.offset = eps, offset
        self.count = features if sized else features.count
        self.weight = scope.weight("weight", plain(features) if sized else features)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...].astype(jnp.float32)
        x = x.astype(jnp.float32)
        square = jnp.sum(x * x, axis=tuple(range(-weight.ndim, 0)), keepdims=True) / self.count
        return x * lax.rsqrt(square + self.eps) * (weight + self.offset if self.offset else weight)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last axis, in float32 (Ba et al., 2016)."""

    def __init__(
        self, scope: Scope, features: int | Features, eps: float, *, weight: bool = True, bias: bool = True
    ):
        features = plain(features) if isinstance(features, int) else features
        self.eps = eps
        self.weight = scope.weight("weight", features) if weight else None
        self.bias = scope.weight("bias", features) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        if self.weight is not None:
            x = x * self.weight[...].astype(jnp.float32)
        return x if self.bias is None else x + self.bias[...].astype(jnp.float32)
