"""What the forms in JAX share: the search for a filter's threshold, and a place in running sums."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

SMALLEST_TEMPERATURE = 1e-30
"""Smaller ones, which float32 may flush to zero, draw the same tokens."""
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def threshold(
    above: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    target: jax.Array,
    least: jax.Array,
    most: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """float32 [...]: the largest t from `least` to `most` above which there is a mass of `target`.

    `above(t)` is the mass and the number, float32 [...], of what is not below t; `count` is the number at
    `least` (at most 1: nothing is looked for). Bisection over the floats in their order, at most 32 turns,
    until at most one value is left.
    """

    def is_open(state: State) -> jax.Array:
        low, high, low_count, high_count = state
        left = (low_count - high_count > 1) & (_middle(low, high) > low)
        return left.any() if left.ndim else left

    def halve(state: State) -> State:
        low, high, low_count, high_count = state
        middle = _middle(low, high)
        mass, count = above(_from_key(middle))
        enough = mass >= target
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, count, low_count),
            jnp.where(enough, high_count, count),
        )

    start = _to_key(least), _to_key(most) + 1, count, jnp.zeros_like(count)
    return _from_key(lax.while_loop(is_open, halve, start)[0])


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    """floor((low + high) / 2) without overflow."""
    return (low & high) + ((low ^ high) >> 1)


def _to_key(x: jax.Array) -> jax.Array:
    """float32 as int32 of the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _from_key(key: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def first_above(weights: jax.Array, sums: jax.Array, goal: jax.Array) -> jax.Array:
    """int32 [...]: the first index in [..., N] whose running sum exceeds goal, else the last; only of those
    with weight. `goal` is [..., 1], or a scalar.

    Rounding may leave no sum above the goal, and running sums that are made in parallel need not even rise.
    """
    axis = weights.ndim - 1
    index = lax.broadcasted_iota(jnp.int32, weights.shape, axis)
    last = jnp.max(jnp.where(weights > 0.0, index, 0), axis=axis, keepdims=axis > 0)
    return jnp.min(jnp.where((weights > 0.0) & (sums > goal), index, last), axis=axis)
