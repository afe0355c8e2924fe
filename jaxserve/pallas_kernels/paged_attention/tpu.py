"""Paged attention on TPUs: the ragged paged attention kernel that jax ships, over a pool laid out for it.

A token's keys and values of all heads lie side by side, key and value of a head in turn, and heads are padded
to what a TPU's tiles hold. So a block is one copy into the chip's memory and is read where it lies. Rows are
written in place by a small kernel of ours. The batch has its rows of padding after all others.
"""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import get_min_heads_per_blk

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta
from jaxserve.pallas_kernels.paged_attention.pool import PoolShape
from jaxserve.pallas_kernels.paged_attention.tuning.tpu import sizes

LANES = 128
"""Numbers in a row of a tile, and in every head of the pool."""
TILE_BYTES = 32
"""Of one lane: keys and values of all heads fill such tiles, or an even part of one."""
IN_FLIGHT = 64
"""Rows on their way to the pool at a time."""


def why_not(dtype: Any, head_dim: int, *, sinks: object = None, alibi: object = None) -> str:
    """Why the kernel does not serve these; empty when it does."""
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float32"):
        return f"it computes in bfloat16 and float32, not in {name}"
    if head_dim > LANES:
        return f"its heads have up to {LANES} numbers, and these have {head_dim}"
    if sinks is not None or alibi is not None:
        return "it has neither attention sinks nor ALiBi"
    return ""


def pool_shape(shape: PoolShape, shards: int) -> PoolShape:
    """The pool for these heads over so many devices, each of which has whole tiles."""
    heads = _in_tiles(shape.kv_heads // shards, shape.dtype.itemsize) * shards
    return shape._replace(kv_heads=heads, head_dim=LANES, bits=False, by_token=True)


def paged_attention(q, k, v, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi, interpret=False):
    """See the seam, `paged_attention/__init__.py`. Raises ValueError where `why_not` has a reason."""
    for dtype in (q.dtype, pool.dtype):
        if why := why_not(dtype, q.shape[2], sinks=sinks, alibi=alibi):
            raise ValueError(f"paged attention on a TPU: {why}")
    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    places, width = pool.shape[2] // 2, pool.shape[3]
    members = _members(group, places, pool.dtype.itemsize)
    q = _pad(q.reshape(rows, kv_heads, group, dim), places, members, width)
    q, k, v = q.reshape(rows, -1, width), _pad(k, places, width), _pad(v, places, width)
    # a batch of padding alone has one row of the dummy block: the kernel waits for what it has asked for
    lens = jnp.maximum(meta.q_lens, jnp.arange(meta.q_lens.shape[0]) == 0)
    with _modes(interpret, q.dtype):
        pool = _write(pool, k, v, meta)
        out = ragged_paged_attention(
            q,
            pool,
            meta.starts + lens,
            meta.block_tables,
            jnp.pad(jnp.cumsum(lens, dtype=jnp.int32), (1, 0)),
            jnp.maximum(jnp.sum(meta.q_lens > 0, dtype=jnp.int32), 1)[None],
            sm_scale=scale,
            sliding_window=masking.window or None,
            soft_cap=masking.soft_cap or None,
            **_sizes(q, pool, meta),
        )
    out = out.reshape(rows, places, members, width)[:, :kv_heads, :group, :dim]
    return out.reshape(rows, heads, dim), pool


def read(pool: jax.Array, blocks: jax.Array, slots: jax.Array) -> jax.Array:
    """Keys and values `[N, 2, kv_heads, dim]` in these slots of these blocks, heads padded."""
    found = pool[blocks, slots]
    return found.reshape(len(found), -1, 2, pool.shape[3]).swapaxes(1, 2)


def _modes(interpret: bool, dtype: Any) -> contextlib.ExitStack:
    """How what is traced inside is computed: full float32 where that is asked for, as everywhere."""
    modes = contextlib.ExitStack()
    if interpret:  # True: as XLA. The interpreter that plays a TPU's memory has no views of another shape
        modes.enter_context(pltpu.force_tpu_interpret_mode(True))
    if dtype == jnp.float32:
        modes.enter_context(jax.default_matmul_precision("highest"))
    return modes


def _sizes(q, pool, meta: AttentionMeta) -> dict[str, int]:
    _, at_once = get_min_heads_per_blk(q.shape[1], pool.shape[2], q.dtype, pool.dtype)
    token = at_once * pool.shape[3] * pool.dtype.itemsize
    group = q.shape[1] // (pool.shape[2] // 2)
    found = sizes(q.shape[0], meta.q_lens.shape[0], group, token, pool.shape[1], meta.block_tables.shape[1])
    return {"num_kv_pages_per_block": found.pages, "num_queries_per_block": found.queries}


def _write(pool, k, v, meta: AttentionMeta):
    """The pool with k and v `[N, kv_heads, dim]` at each row's position, in place."""
    size = pool.shape[1]
    pos = jnp.maximum(meta.row_pos, 0)
    slots = meta.block_tables[meta.row_seq, pos // size] * size + pos % size
    rows = jnp.stack([k, v], axis=2).reshape(-1, *pool.shape[2:]).astype(pool.dtype)
    flat = pool.reshape(-1, *pool.shape[2:])
    somewhere = pl.BlockSpec(memory_space=pl.ANY)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(1,),
        in_specs=[somewhere, somewhere],
        out_specs=somewhere,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
    )
    written = pl.pallas_call(
        _write_kernel,
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct(flat.shape, flat.dtype),
        input_output_aliases={3: 0},
        name="write_kv",
    )(slots, jnp.sum(meta.q_lens)[None], rows, flat)
    return written.reshape(pool.shape)


def _write_kernel(slots_ref, count_ref, rows_ref, _, pool_ref, done):
    """Copies the first `count` rows to their slots."""
    count = count_ref[0]

    def copy(row):
        return pltpu.make_async_copy(rows_ref.at[row], pool_ref.at[slots_ref[row]], done)

    def begin(row, _):
        @pl.when(row >= IN_FLIGHT)
        def _():
            copy(row - IN_FLIGHT).wait()

        copy(row).start()

    lax.fori_loop(0, count, begin, None)
    lax.fori_loop(jnp.maximum(count - IN_FLIGHT, 0), count, lambda row, _: copy(row).wait(), None)


def _in_tiles(kv_heads: int, itemsize: int) -> int:
    """KV heads, padding included, whose keys and values fill tiles or one evenly."""
    tile = TILE_BYTES // (2 * itemsize)
    return 1 << (kv_heads - 1).bit_length() if kv_heads <= tile else _multiple(kv_heads, tile)


def _members(group: int, places: int, itemsize: int) -> int:
    """Query heads of a KV head, padding included: a program's share of many has eight at least."""
    tile = TILE_BYTES // (2 * itemsize)
    return max(group, 8 // tile) if places > tile else group


def _multiple(x: int, of: int) -> int:
    return math.ceil(x / of) * of


def _pad(x: jax.Array, *sizes: int) -> jax.Array:
    """x [N, *sizes], with zeros after what it has."""
    return jnp.pad(x, [(0, 0), *((0, size - have) for size, have in zip(sizes, x.shape[1:], strict=True))])
