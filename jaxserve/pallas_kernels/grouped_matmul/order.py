"""Tokens in the order of their experts, and back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Order(NamedTuple):
    """The pairs of a token and one of its k experts as rows, those of an expert side by side and in order."""

    token: jax.Array
    """int32 [N * k]: of each row. Pairs without an expert have the rows past all others."""
    row: jax.Array
    """int32 [N, k]: of each pair; -1 where it has no expert."""
    sizes: jax.Array
    """int32 [experts]: rows of each."""

    def rows_of(self, x: jax.Array) -> jax.Array:
        """`[N * k, dim]` from tokens `[N, dim]`."""
        return x[self.token]

    def sum(self, y: jax.Array, shares: jax.Array) -> jax.Array:
        """float32 `[N, dim]` of rows `[N * k, dim]`: those of each token by its shares `[N, k]`, added up."""
        y = jnp.where(self.row[..., None] >= 0, y[self.row].astype(jnp.float32), 0.0)
        return (y * shares[..., None].astype(jnp.float32)).sum(axis=1)


def by_expert(ids: jax.Array, experts: int) -> Order:
    """The order of tokens whose experts are ids, int32 `[N, k]`, numbered from 0.

    Pairs with other numbers have no expert: those of padding, or of experts on another device.
    """
    n, k = ids.shape
    rows, expert = jnp.arange(n * k, dtype=jnp.int32), jnp.arange(experts, dtype=jnp.int32)
    ids = ids.reshape(-1)
    live = (ids >= 0) & (ids < experts)
    sizes = (ids == expert[:, None]).sum(axis=1, dtype=jnp.int32)
    # stable. Counting would be more kernels on a GPU, and slower on a CPU
    pair = jnp.argsort(jnp.where(live, ids, experts)).astype(jnp.int32)
    row = jnp.zeros_like(rows).at[pair].set(rows, unique_indices=True)
    return Order(pair // k, jnp.where(live, row, -1).reshape(n, k), sizes)
