"""Which query rows a program of a GPU kernel takes, and how the parts of a split context become one.

Computed on the device from the meta alone, so XLA computes it once for all layers.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta

LOG2E = math.log2(math.e)
NEVER = -1e30
"""A logit that takes no part. Finite: the difference of two of them must not be NaN."""
NO_ROW = 1 << 30
"""First row of a tile that has none: past the end of every sequence."""


class Tiles(NamedTuple):
    """int32 [tiles]: the sequence of each tile, and its first query row counted from the sequence's."""

    seq: jax.Array
    first: jax.Array


def query_tiles(meta: AttentionMeta, rows: int, per_tile: int) -> Tiles:
    """The rows of the sequences that have several, `per_tile` to a tile, and tiles without rows."""
    seqs = meta.q_lens.shape[0]
    count, ends = _tiles_of(meta, per_tile)
    t = jnp.arange(rows // per_tile + seqs, dtype=jnp.int32)  # as many as any batch needs
    # compare_all: the default method becomes a while loop on a GPU
    seq = jnp.searchsorted(ends, t, side="right", method="compare_all").astype(jnp.int32)
    live = seq < seqs
    seq = jnp.where(live, seq, 0)
    first = (t - ends[seq] + count[seq]) * per_tile
    return Tiles(seq, jnp.where(live, first, NO_ROW).astype(jnp.int32))


def tile_of_rows(meta: AttentionMeta, per_tile: int) -> tuple[jax.Array, jax.Array]:
    """int32 [N] each: the tile of `query_tiles` that has a row, and the row's place in it."""
    count, ends = _tiles_of(meta, per_tile)
    row = jnp.arange(meta.row_seq.shape[0], dtype=jnp.int32) - meta.q_rows[meta.row_seq]
    return (ends - count)[meta.row_seq] + row // per_tile, row % per_tile


def _tiles_of(meta: AttentionMeta, per_tile: int) -> tuple[jax.Array, jax.Array]:
    """int32 [S] each: the tiles of a sequence, and where they end."""
    count = jnp.where(meta.q_lens > 1, -(-meta.q_lens // per_tile), 0)
    return count, jnp.cumsum(count)


def join(singles: jax.Array, rest: jax.Array, meta: AttentionMeta) -> jax.Array:
    """out [N, heads, dim]: `rest`, and the rows of sequences that have only one from `singles` [M, ...].

    Scattered, which XLA does in place: a slice of `rest` that depends on it would be a copy of it all.
    """
    row = jnp.arange(len(singles), dtype=jnp.int32)
    row = jnp.where(meta.q_lens[: len(singles)] == 1, row, len(rest))
    return rest.at[row].set(singles, mode="drop", unique_indices=True)


def merge(acc: jax.Array, top: jax.Array, mass: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
    """float32 [N, heads, dim] from the splits' weighted sums, maxima (log2) and masses, and sinks [heads]."""
    highest = top.max(axis=0)
    if sinks is not None:
        highest = jnp.maximum(highest, sinks * LOG2E)
    share = jnp.exp2(top - highest)
    mass = (mass * share).sum(axis=0)
    if sinks is not None:
        mass += jnp.exp2(sinks * LOG2E - highest)
    return (acc * share[..., None]).sum(axis=0) / jnp.where(mass == 0.0, 1.0, mass)[..., None]
