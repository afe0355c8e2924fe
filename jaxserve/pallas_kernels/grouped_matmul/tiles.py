"""Which rows a tile has: computed on the device from the sizes of the groups alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tiles(NamedTuple):
    """int32 [tiles] each: rows `first` to `end`, not included, of an expert. Tiles without rows come last."""

    expert: jax.Array
    first: jax.Array
    end: jax.Array


def row_tiles(sizes: jax.Array, rows: int, per_tile: int) -> tuple[Tiles, jax.Array]:
    """Tiles of at most `per_tile` rows, as many as any sizes need; and how many have rows, int32 []."""
    expert = jnp.arange(len(sizes), dtype=jnp.int32)
    tiles = lax.div(sizes + (per_tile - 1), jnp.int32(per_tile))
    t = jnp.arange(min(rows, rows // per_tile + len(sizes)), dtype=jnp.int32)[:, None]
    # sums over all experts, not running ones and searches: two kernels on a GPU instead of six
    until = expert <= expert[:, None]
    end, last = jnp.where(until, jnp.stack([sizes, tiles])[:, None], 0).sum(axis=2, dtype=jnp.int32)
    mine = (t >= last - tiles) & (t < last)
    first = end - sizes + (t - last + tiles) * per_tile
    found = (expert, first, jnp.minimum(first + per_tile, end))
    return Tiles(*(jnp.where(mine, x, 0).sum(axis=1, dtype=jnp.int32) for x in found)), last[-1]
