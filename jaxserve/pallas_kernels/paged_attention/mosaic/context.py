"""A sequence's context on its way through shared memory: who brings it, and what a row may see of it."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.paged_attention.mosaic.hopper import OF_PRODUCT, load, operand
from jaxserve.pallas_kernels.paged_attention.tiles import LOG2E, NEVER
from jaxserve.pallas_kernels.paged_attention.tuning.mosaic import Variant

WARPS = 4
"""Of a warpgroup."""


def div(a: Any, b: int) -> jax.Array:
    """Of what is not negative: `//` would compute more."""
    return lax.div(a, jnp.int32(b))


class Stream(NamedTuple):
    """Tiles of keys, or of values, that pass through shared memory."""

    tiles: Any
    """[stages, tile, dim]"""
    ready: Any
    """A barrier for each stage: the tile is there."""
    read: Any
    """And: all consumers have read it. They say so only where another tile follows."""

    @classmethod
    def scratch(cls, v: Variant, block_size: int, dim: int, dtype: Any, consumers: int) -> "Stream":
        stages, boxes = v.stages, v.tile // _box(v.tile, block_size)
        return cls(
            operand((stages, v.tile, dim), dtype),
            plgpu.Barrier(num_arrivals=boxes, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
        )

    def slot(self, j: Any) -> jax.Array:
        return lax.rem(j, jnp.int32(self.tiles.shape[0]))

    def wait(self, j: Any) -> Any:
        """The tile [tile, dim] of turn j, when it is there."""
        slot = self.slot(j)
        plgpu.barrier_wait(self.ready.at[slot])
        return self.tiles.at[slot]

    def release(self, j: Any, count: Any) -> None:
        """Turn j's tile is not needed any more."""

        @pl.when(j + self.tiles.shape[0] < count)
        def _():
            plgpu.barrier_arrive(self.read.at[self.slot(j)])


def _box(tile: int, block_size: int) -> int:
    """Rows that one copy brings: in every tile and in every block they lie side by side."""
    return math.gcd(tile, block_size)


def produce(streams: tuple[Stream, Stream], pool: Any, tables: Any, seq, head, end, first, count) -> None:
    """Bring `count` tiles of a sequence's keys and values, from tile `first` on; `end` is its length.

    For a warpgroup of its own, whose four warps issue the copies. A turn brings all boxes of a tile, those
    past the end from the last block: the barriers count them.
    """
    tile, block_size = streams[0].tiles.shape[1], pool.shape[3]
    box = _box(tile, block_size)
    last = jnp.maximum(div(end - 1, block_size), 0)

    def blocks(j):
        at = (first + j) * tile
        return [tables[seq, jnp.minimum(div(at + row, block_size), last)] for row in range(0, tile, box)]

    def bring(which: int, j, found) -> None:
        stream = streams[which]
        slot = stream.slot(j)
        offsets = [lax.rem((first + j) * tile + i * box, jnp.int32(block_size)) for i in range(len(found))]

        @pl.when(j >= stream.tiles.shape[0])
        def _():
            plgpu.barrier_wait(stream.read.at[slot])

        def copy(i: int) -> None:
            source = pool.at[found[i], which, head, pl.ds(offsets[i], box)]
            place = stream.tiles.at[slot, pl.ds(i * box, box)]
            plgpu.copy_gmem_to_smem(source, place, stream.ready.at[slot])

        @plgpu.warp_map
        def _(warp):
            for i in range(len(found)):
                pl.when(warp == i % WARPS)(lambda i=i: copy(i))

    def turn(j, found):
        bring(0, j, found)
        bring(1, j, found)
        return blocks(j + 1)  # asked for a turn before they are needed

    lax.fori_loop(0, count, turn, blocks(jnp.int32(0)))


def clear_unwritten(values: Any, left: Any) -> None:
    """Zeros in the rows of a tile from `left` on.

    Their weights are 0, but what another sequence left there may be NaN, and 0 * NaN is NaN. Two warpgroups
    may do this to the same tile at once: both write the same.
    """

    @pl.when(left < values.shape[0])
    def _():
        rows, dim = values.shape
        for start, column in itertools.product(range(0, rows, 64), range(0, dim, 64)):  # few registers each
            part = values.at[pl.ds(start, 64), pl.ds(column, 64)]
            x = load(part, OF_PRODUCT)
            row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=OF_PRODUCT)
            part[...] = jnp.where(row < left - start, x, jnp.zeros((), x.dtype))
        plgpu.commit_smem()


def exponent(scale: float, masking: Any) -> float:
    """What makes the log2 of a weight from a logit as `logits` gives it."""
    return (masking.soft_cap or scale) * LOG2E


def slopes_for(alibi: jax.Array, scale: float, masking: Any) -> jax.Array:
    """ALiBi's slopes for `logits`."""
    return alibi.astype(jnp.float32) / (masking.soft_cap or scale)


def logits(products: jax.Array, key, query, slopes, scale: float, masking: Any, masked: bool = True):
    """Logits over their `exponent`, NEVER where they are not seen.

    `key` and `query` are their places, counted from the first of the tile's keys, and `slopes` ALiBi's as
    `slopes_for` gives them, for each product. What lies past the end of a sequence is past all its queries.
    `masked=False`: all is seen.
    """
    x = jnp.tanh(products * (scale / masking.soft_cap)) if masking.soft_cap else products
    if slopes is not None:
        x += slopes * (key - query).astype(jnp.float32)
    if not masked:
        return x
    visible = key <= query
    if masking.window:
        visible = jnp.logical_and(visible, key > query - masking.window)
    return jnp.where(visible, x, NEVER)
