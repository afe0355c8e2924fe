"""Sequences of several query rows: a program for a tile of them and a KV head, with all its query heads.

As in FlashAttention-3 (Shah et al., 2024): one warpgroup brings the context, two have 64 rows each, weights
stay in registers, and while one of the two multiplies the other makes weights (`turns`). A row is a token and
a head: `token * group + head`. TMA copies eight rows at least, and a tile's last rows must not reach the next
sequence: so queries are gathered into tiles, and outputs from them, in XLA.
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
from jaxserve.pallas_kernels.paged_attention.tiles import LOG2E, NEVER, query_tiles, tile_of_rows
from jaxserve.pallas_kernels.paged_attention.tuning.mosaic import ROWS, WARPGROUPS, per_tile, variant

OF_ROWS = OF_PRODUCT.reduce(1)
"""How registers hold a number for each row of a product."""


def prefill(q, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi, interpret):
    """out [N, heads, dim] in the rows of sequences that have several; undefined in others."""
    n, heads, dim = q.shape
    kv_heads, block_size = pool.shape[2:4]
    group = heads // kv_heads
    tokens = ROWS // group  # of a warpgroup
    v = variant("tiles", dim)
    tiles = query_tiles(meta, n, per_tile(group))

    def of_rows(x):
        """[KV heads, ROWS] of [heads]"""
        x = jnp.tile(x.reshape(kv_heads, group), (1, tokens))
        return jnp.pad(x, ((0, 0), (0, ROWS - tokens * group)))

    per_row = [] if sinks is None else [of_rows(sinks.astype(jnp.float32) * LOG2E)]
    per_row += [] if alibi is None else [of_rows(slopes_for(alibi, scale, masking))]
    stream = Stream.scratch(v, block_size, dim, q.dtype, WARPGROUPS)
    shape = (tiles.seq.shape[0], kv_heads, WARPGROUPS, ROWS, dim)
    out = launch(
        partial(
            _kernel, group=group, scale=scale, masking=masking,
            has_sinks=sinks is not None, has_alibi=alibi is not None,
        ),
        _gathered(q, tiles, meta, shape), pool, *tiles, meta.starts, meta.q_lens, meta.block_tables, *per_row,
        out_type=jax.ShapeDtypeStruct(shape, q.dtype),
        scratch_types=[
            operand((WARPGROUPS, ROWS, dim), q.dtype),
            operand((WARPGROUPS, ROWS, v.tile), q.dtype) if interpret else None,
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            (stream, stream),
        ],
        grid=(kv_heads, shape[0]),
        grid_names=("kv_head", "tile"),
        num_threads=WARPGROUPS + 1,
        kernel_name=f"paged_attention_mosaic_q{per_tile(group)}_g{group}_t{v.tile}",
        interpret=interpret,
    )  # fmt: skip
    tile, place = (x[:, None, None] for x in tile_of_rows(meta, per_tile(group)))
    head, member = jnp.arange(kv_heads)[:, None], jnp.arange(group)
    return out[tile, head, place // tokens, place % tokens * group + member].reshape(n, heads, dim)


def _gathered(q, tiles, meta: AttentionMeta, shape):
    """The queries of each tile, as `shape` [tiles, KV heads, WARPGROUPS, ROWS, dim]."""
    n, heads, dim = q.shape
    count, kv_heads = shape[:2]
    group = heads // kv_heads
    tokens = ROWS // group
    row = (meta.q_rows[tiles.seq] + tiles.first)[:, None] + jnp.arange(WARPGROUPS * tokens, dtype=jnp.int32)
    x = q[jnp.minimum(row, n - 1)].reshape(count, WARPGROUPS, tokens, kv_heads, group, dim)
    x = x.transpose(0, 3, 1, 2, 4, 5).reshape(count, kv_heads, WARPGROUPS, tokens * group, dim)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, ROWS - tokens * group), (0, 0)))


def _kernel(
    q_ref, pool_ref, seq_ref, first_ref, starts_ref, lens_ref, tables_ref, *refs,
    group, scale, masking, has_sinks, has_alibi,
):  # fmt: skip
    """The output of one tile of one KV head; nothing where it has no rows."""
    refs = list(refs)
    sinks_ref = refs.pop(0) if has_sinks else None
    slopes_ref = refs.pop(0) if has_alibi else None
    out_ref, rows_at, weights_at, q_ready, turns, streams = refs
    head, t, warpgroup = (lax.axis_index(name) for name in ("kv_head", "tile", "warpgroup"))
    seq, row = seq_ref[t], first_ref[t]
    start, q_len = starts_ref[seq], lens_ref[seq]
    end, tokens = start + q_len, ROWS // group
    tile = streams[0].tiles.shape[1]

    # the tiles of context that these rows see
    live = row < q_len
    low = jnp.maximum(start + row - (masking.window - 1), 0) if masking.window else jnp.int32(0)
    first = div(jnp.where(live, low, 0), tile)
    high = jnp.where(live, jnp.minimum(end, start + row + WARPGROUPS * tokens), 0)
    count = div(high + (tile - 1), tile) - first

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(32, action="decrease")
        produce(streams, pool_ref, tables_ref, seq, head, end, first, count)

    @pl.when(jnp.logical_and(warpgroup < WARPGROUPS, live))
    def _():
        plgpu.set_max_registers(240, action="increase")
        mine = rows_at.at[warpgroup]
        weights_mine = None if weights_at is None else weights_at.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[t, head, warpgroup], mine, q_ready.at[warpgroup])
        plgpu.barrier_wait(q_ready.at[warpgroup])
        keys, values = streams
        by_row = partial(lax.broadcast_in_dim, broadcast_dimensions=(0,))
        position = start + row + warpgroup * tokens  # of the first row
        slopes = load(slopes_ref.at[head], OF_ROWS, optimized=False) if has_alibi else None

        def hand_over():
            """The other warpgroup's turn to multiply, then this one's."""
            plgpu.barrier_arrive(turns)
            plgpu.barrier_wait(turns)

        def turn(j, state, masked=True, last=False):
            acc, top, mass = state
            at = (first + j) * tile
            tile_of_keys = keys.wait(j)

            def run(ref):
                plgpu.wgmma(ref, mine, transposed(tile_of_keys))
                hand_over()
                return ref[...]

            x = pl.run_scoped(run, plgpu.ACC((ROWS, tile), jnp.float32))
            keys.release(j, count)
            iota = partial(plgpu.broadcasted_iota, jnp.int32, x.shape, layout=OF_PRODUCT)
            query = lax.div(iota(0), jnp.int32(group)) + (position - at)
            bias = by_row(slopes, x.shape) if has_alibi else None
            x = logits(x, iota(1), query, bias, scale, masking, masked)
            per_unit = exponent(scale, masking)
            new_top = jnp.maximum(top, x.max(axis=1) * per_unit)
            keep = jnp.exp2(top - new_top)
            # a row that has seen nothing yet has weights for what it does not see: `keep` takes them away
            weights = jnp.exp2(x * per_unit - by_row(new_top, x.shape))
            acc *= by_row(keep, acc.shape)
            mass = mass * keep + weights.sum(axis=1)
            acc, mass, new_top, weights = lax.optimization_barrier(
                (acc, mass, new_top, weights.astype(rows_at.dtype))
            )
            plgpu.barrier_arrive(turns)
            tile_of_values = values.wait(j)
            if last:
                clear_unwritten(tile_of_values, end - at)
            plgpu.barrier_wait(turns)
            acc = _plus_product(acc, weights, tile_of_values, weights_mine)
            values.release(j, count)
            return acc, new_top, mass

        pl.when(warpgroup == 1)(hand_over)
        state, plain = _initial(head, sinks_ref, mine.shape[1]), 0
        if not masking.window:  # tiles that end before the first row's position need no mask
            plain = jnp.minimum(div(position + 1, tile), count - 1)
            state = lax.fori_loop(0, plain, partial(turn, masked=False), state)
        state = lax.fori_loop(plain, count - 1, turn, state)
        acc, _, mass = turn(count - 1, state, last=True)
        pl.when(warpgroup == 0)(hand_over)
        mine[...] = (acc * by_row(1.0 / mass, acc.shape)).astype(mine.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mine, out_ref.at[t, head, warpgroup])
        plgpu.wait_smem_to_gmem(0)


def _initial(head, sinks_ref, dim: int):
    """Weighted sum, maximum and mass before any tile: a sink is a logit whose value is 0."""
    if sinks_ref is None:
        top, mass = filled((ROWS,), NEVER, OF_ROWS), 0.0
    else:
        top, mass = load(sinks_ref.at[head], OF_ROWS, optimized=False), 1.0
    return filled((ROWS, dim), 0.0, OF_PRODUCT), top, filled((ROWS,), mass, OF_ROWS)


def _plus_product(acc, weights, values, at):
    """acc + weights @ values; `at`: interpret mode multiplies only what is in shared memory."""
    if at is not None:
        at[...] = weights
        plgpu.commit_smem()
        return acc + product(at, values)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))
