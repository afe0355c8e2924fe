"""Decoding: the sequences with one query row, a program for each, its KV head and a split of its context.

The product of a tile of keys with the queries is [positions, heads]: the 64 rows that a product on Hopper
has at least are positions, and a KV head with few query heads wastes nothing. Likewise the output is
[dim, heads].
Only one warpgroup consumes: reductions over the rows of a product go through one place in shared memory,
which several would overwrite for each other.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta
from jaxserve.pallas_kernels.paged_attention.mosaic.context import (
    Stream,
    clear_unwritten,
    div,
    exponent,
    logits,
    produce,
    slopes_for,
)
from jaxserve.pallas_kernels.paged_attention.mosaic.hopper import (
    OF_PRODUCT,
    filled,
    launch,
    load,
    operand,
    product,
    transposed,
)
from jaxserve.pallas_kernels.paged_attention.tiles import NEVER, merge
from jaxserve.pallas_kernels.paged_attention.tuning.gpu import num_splits
from jaxserve.pallas_kernels.paged_attention.tuning.mosaic import variant

OF_HEADS = OF_PRODUCT.reduce(0)
"""How registers hold a number for each column of a product."""


def columns(group: int) -> int:
    """Columns of a product for `group` query heads: a multiple of 8."""
    return -(-group // 8) * 8


def decode(q, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi, interpret):
    """out [N, heads, dim] of the first N sequences where they have one row; undefined where they have not."""
    n, heads, dim = q.shape
    kv_heads, block_size = pool.shape[2:4]
    group = heads // kv_heads
    width = columns(group)
    v = variant("rows", dim)
    splits = num_splits(n * kv_heads, meta.block_tables.shape[1] * block_size, v.tile)

    def padded(x):
        """[..., KV heads, width, ...] of [..., heads, ...] at axis -2 of x [..., heads, dim]"""
        x = x.reshape(*x.shape[:-2], kv_heads, group, x.shape[-1])
        return jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, width - group), (0, 0)])

    slopes = [] if alibi is None else [padded(slopes_for(alibi, scale, masking)[:, None])[..., 0]]
    ends = jnp.where(meta.q_lens[:n] == 1, meta.starts[:n] + 1, 0)
    stream = Stream.scratch(v, block_size, dim, q.dtype, consumers=1)
    per_head = plgpu.SMEM((width,), jnp.float32)
    parts = [(splits, n, kv_heads, width, dim), *[(splits, n, kv_heads, width)] * 2]
    acc, top, mass = launch(
        partial(_kernel, scale=scale, masking=masking, has_alibi=alibi is not None),
        padded(q), pool, meta.block_tables, ends, *slopes,
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in parts],
        scratch_types=[
            operand((width, dim), q.dtype),
            operand((width, v.tile), q.dtype),
            operand((width, dim), jnp.float32),
            per_head,
            per_head,
            plgpu.Barrier(),
            (stream, stream),
        ],
        grid=(n, kv_heads, splits),
        grid_names=("sequence", "kv_head", "split"),
        num_threads=2,
        kernel_name=f"paged_attention_mosaic_q1_g{width}_t{v.tile}_s{splits}",
        interpret=interpret,
    )  # fmt: skip
    acc = acc[:, :, :, :group].reshape(splits, n, heads, dim)
    top, mass = (x[..., :group].reshape(splits, n, heads) for x in (top, mass))
    return merge(acc, top, mass, sinks).astype(q.dtype)


def _kernel(q_ref, pool_ref, tables_ref, ends_ref, *refs, scale, masking, has_alibi):
    """A split's weighted sum, maximum and mass."""
    slopes_ref, refs = (refs[0], refs[1:]) if has_alibi else (None, refs)
    *outs, q, weights_at, acc_at, top_at, mass_at, q_ready, streams = refs
    seq, head, split = (lax.axis_index(name) for name in ("sequence", "kv_head", "split"))
    warpgroup = lax.axis_index("warpgroup")
    tile, end = weights_at.shape[1], ends_ref[seq]

    # the tiles of context that the row sees, and this split's share of them
    first = div(jnp.maximum(end - masking.window, 0), tile) if masking.window else jnp.int32(0)
    tiles = div(end + (tile - 1), tile) - first
    share = div(tiles + (outs[0].shape[0] - 1), outs[0].shape[0])
    first += split * share
    count = jnp.maximum(jnp.minimum(tiles - split * share, share), 0)

    @pl.when(warpgroup == 1)
    def _():
        produce(streams, pool_ref, tables_ref, seq, head, end, first, count)

    @pl.when(warpgroup == 0)
    def _():
        plgpu.copy_gmem_to_smem(q_ref.at[seq, head], q, q_ready)
        plgpu.barrier_wait(q_ready)
        width, dim = q.shape
        keys, values = streams
        by_head = partial(lax.broadcast_in_dim, broadcast_dimensions=(1,))
        slopes = load(slopes_ref.at[head], OF_HEADS, optimized=False) if has_alibi else None

        def turn(j, state):
            acc, top, mass = state
            at = (first + j) * tile
            x = product(keys.wait(j), transposed(q))
            keys.release(j, count)
            key = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=OF_PRODUCT)
            bias = by_head(slopes, x.shape) if has_alibi else None
            x = logits(x, key, end - 1 - at, bias, scale, masking) * exponent(scale, masking)
            new_top = jnp.maximum(top, x.max(axis=0))
            keep = jnp.exp2(top - new_top)
            weights = jnp.exp2(x - by_head(new_top, x.shape))
            mass = mass * by_head(keep, mass.shape) + weights
            transposed(weights_at)[...] = plgpu.layout_cast(
                weights.astype(q.dtype), plgpu.Layout.WGMMA_TRANSPOSED
            )
            plgpu.commit_smem()
            tile_of_values = values.wait(j)
            clear_unwritten(tile_of_values, end - at)
            gained = product(transposed(tile_of_values), transposed(weights_at))
            values.release(j, count)
            return acc * by_head(keep, acc.shape) + gained, new_top, mass

        start = filled((dim, width), 0.0, OF_PRODUCT), filled((width,), NEVER, OF_HEADS)
        # the mass of each row of a product, added up once at the end
        acc, top, mass = lax.fori_loop(0, count, turn, (*start, filled((tile, width), 0.0, OF_PRODUCT)))
        transposed(acc_at)[...] = plgpu.layout_cast(acc, plgpu.Layout.WGMMA_TRANSPOSED)
        top_at[...] = top
        mass_at[...] = mass.sum(axis=0)
        plgpu.commit_smem()
        for ref, out in zip((acc_at, top_at, mass_at), outs, strict=True):
            plgpu.copy_smem_to_gmem(ref, out.at[split, seq, head])
        plgpu.wait_smem_to_gmem(0)
