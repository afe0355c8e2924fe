"""Rotary positions as attention applies them to queries and keys (Su et al., 2021)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rotation(NamedTuple):
    """cos and sin of every row's angles: float32 [N, dim // 2]."""

    cos: jax.Array
    sin: jax.Array


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """x [N, ..., dim] turned pairwise (i, i + dim // 2) by its row's angles, in float32."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (-1,)
    cos, sin = rotation.cos.reshape(shape), rotation.sin.reshape(shape)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
