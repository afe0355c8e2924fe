"""Paged attention on NVIDIA GPUs: one Pallas kernel (Triton backend) for ragged prefill and decode.

A program takes a tile of one sequence's query rows with all query heads of one KV head (together the M of
the tensor core's products), and one split of the context those rows see. It reads the context page by
page from the pool, which is passed whole and never sliced. Which rows a tile has is data (`tiles.py`).

The Triton backend of Pallas is deprecated in newer releases of jax; everything that depends on it is here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta
from jaxserve.pallas_kernels.paged_attention.pool import decode, parts, write
from jaxserve.pallas_kernels.paged_attention.tiles import (
    LOG2E,
    NEVER,
    NO_ROW,
    Tiles,
    join,
    merge,
    query_tiles,
)
from jaxserve.pallas_kernels.paged_attention.tuning.gpu import Variant, num_splits, variant


def paged_attention(q, k, v, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi, interpret=False):
    """See the seam, `paged_attention/__init__.py`."""
    pool = write(pool, k, v, meta)
    rows, heads, _ = q.shape
    seqs, width = meta.block_tables.shape
    numbers, scales = parts(pool)
    _, _, kv_heads, size, dim = numbers.shape
    group = heads // kv_heads
    singles = min(rows, seqs)  # a batch with sequences of several rows has more rows than sequences
    # the type of both products: 16 bits only where both q and the pool's numbers have it, or these have 8
    own = scales is not None or numbers.dtype == jnp.uint16
    dtype = jnp.promote_types(q.dtype, q.dtype if own else numbers.dtype)
    attend = partial(
        _attend, q, pool=pool, meta=meta, dtype=dtype, scale=scale, masking=masking, sinks=sinks, alibi=alibi,
        interpret=interpret,
    )  # fmt: skip
    one = variant("rows", group, dim, dtype.itemsize, scales is not None)
    splits = num_splits(singles * kv_heads, width * size, one.tile)
    out = attend(singles, None, one, rows=1, splits=splits)
    if rows == singles:
        return out, pool
    many = variant("tiles", group, dim, dtype.itemsize, scales is not None)
    per_tile = max(1, many.block_m // group)
    rest = attend(rows, query_tiles(meta, rows, per_tile), many, rows=per_tile, splits=1)
    return join(out, rest, meta), pool


def _attend(
    q, n, tiles: Tiles | None, v: Variant, *, rows, splits, pool, meta, dtype, scale, masking, sinks, alibi,
    interpret,
):  # fmt: skip
    """out [n, heads, dim] of q's type in the rows that the tiles hold; undefined in others. Without tiles a
    program takes one of the first n rows, where a sequence has only that one."""
    _, heads, dim = q.shape
    kv_heads = parts(pool)[0].shape[2]
    kernel = partial(
        _kernel, rows=rows, group=heads // kv_heads, block_m=v.block_m, tile=v.tile, splits=splits,
        dtype=dtype, scale=scale, masking=masking,
    )  # fmt: skip
    if splits == 1:
        out_shape = [jax.ShapeDtypeStruct((n, heads, dim), q.dtype)]
    else:
        pieces = [(splits, n, heads, dim), (splits, n, heads), (splits, n, heads)]
        out_shape = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in pieces]
    sinks, alibi = (x if x is None else x.astype(jnp.float32) for x in (sinks, alibi))
    outs = pl.pallas_call(
        kernel,
        grid=(len(tiles.seq) if tiles else n, kv_heads, splits),
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=v.num_warps, num_stages=v.num_stages),
        interpret=interpret,
        name=f"paged_attention_q{rows}_m{v.block_m}_t{v.tile}_s{splits}",
    )(tiles, meta, q, pool, sinks, alibi)
    return outs[0] if splits == 1 else merge(*outs).astype(q.dtype)


def _kernel(
    tiles: Tiles | None, meta: AttentionMeta, q_ref, pool, sinks_ref, alibi_ref, *outs,
    rows, group, block_m, tile, splits, dtype, scale, masking,
):  # fmt: skip
    """One tile of one KV head and one split: out, or the split's (weighted sum, maximum, mass)."""
    t, kv_head, split = (pl.program_id(i) for i in range(3))
    numbers_ref, scales_ref = parts(pool)
    block_size, dim = numbers_ref.shape[3:]
    # scales are part of the weights before they are rounded: float16 is too narrow for these, and 8 bits are
    # exact in bfloat16 too
    weight = jnp.bfloat16 if scales_ref is not None and dtype == jnp.float16 else dtype
    seq = tiles.seq[t] if tiles else t
    start, q_len = meta.starts[seq], meta.q_lens[seq]
    first = tiles.first[t] if tiles else jnp.where(q_len == 1, 0, jnp.int32(NO_ROW))

    m = jnp.arange(block_m, dtype=jnp.int32)
    in_seq = first + m // group
    live = (m < rows * group) & (in_seq < q_len)
    # lanes without a row point past the end: interpret mode writes masked lanes too, and drops only those
    row = jnp.where(live, meta.q_rows[seq] + in_seq, q_ref.shape[0])
    head = kv_head * group + jnp.where(live, m % group, 0)
    d = jnp.arange(pl.next_power_of_2(dim), dtype=jnp.int32)
    in_dim = d < dim
    q_at = (row[:, None], head[:, None], d[None, :])
    q_mask = live[:, None] & in_dim[None, :]
    q_pos = (start + in_seq)[:, None]

    # the tiles of context that these rows see, and this split's share of them
    end = start + jnp.minimum(q_len, first + rows)
    lo = jnp.maximum(start + first - masking.window + 1, 0) // tile if masking.window else 0
    hi = pl.cdiv(end, tile)
    share = pl.cdiv(hi - lo, splits)
    lo += split * share
    hi = jnp.minimum(hi, lo + share)

    # float32 stays float32: the default would be TF32
    dot = partial(
        jnp.dot, preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )  # fmt: skip

    def run():
        q = triton.load(q_ref.at[q_at], mask=q_mask, other=0.0)
        slope = triton.load(alibi_ref.at[head])[:, None] if alibi_ref is not None else None

        def body(j, state):
            top, mass, acc = state
            pos = j * tile + jnp.arange(tile, dtype=jnp.int32)
            in_context = pos < end
            # a page for each position: a tile may be a part of a block, or several
            page = triton.load(meta.block_tables.at[seq, pos // block_size], mask=in_context, other=0)
            # masked, not only out of sight: slots that this sequence has not written may hold NaN
            kv_mask = in_context[:, None] & in_dim[None, :]

            slot = pos % block_size

            def load(which, kind):
                at = (page[:, None], which, kv_head, slot[:, None], d[None, :])
                stored = triton.load(numbers_ref.at[at], mask=kv_mask, other=jnp.zeros((), numbers_ref.dtype))
                return decode(stored, q_ref.dtype if numbers_ref.dtype == jnp.uint16 else kind).astype(kind)

            def scaled(x, which):
                """x [M, tile] by the scales of these keys or values."""
                if scales_ref is None:
                    return x
                at = (page, which, kv_head, slot)
                return x * triton.load(scales_ref.at[at], mask=in_context, other=0.0)[None, :]

            logits = scaled(dot(q.astype(dtype), load(0, dtype).T), 0) * scale
            if masking.soft_cap:
                logits = masking.soft_cap * jnp.tanh(logits / masking.soft_cap)
            ahead = pos[None, :] - q_pos
            if alibi_ref is not None:
                logits += slope * ahead.astype(jnp.float32)
            visible = live[:, None] & (ahead <= 0)
            if masking.window:
                visible &= ahead > -masking.window
            logits = jnp.where(visible, logits * LOG2E, NEVER)
            new_top = jnp.maximum(top, logits.max(axis=1))
            # a row that has seen nothing has the maximum NEVER: its weights are 0, not exp2(0)
            weights = jnp.where(visible, jnp.exp2(logits - new_top[:, None]), 0.0)
            keep = jnp.exp2(top - new_top)
            acc = acc * keep[:, None] + dot(scaled(weights, 1).astype(weight), load(1, weight))
            return new_top, mass * keep + weights.sum(axis=1), acc

        top = jnp.full((block_m,), NEVER, jnp.float32)
        mass = jnp.zeros((block_m,), jnp.float32)
        if sinks_ref is not None:  # a sink counts once: in the first split
            top = jnp.where(split == 0, triton.load(sinks_ref.at[head]) * LOG2E, top)
            mass = jnp.where(split == 0, 1.0, mass)
        acc = jnp.zeros((block_m, d.size), jnp.float32)
        top, mass, acc = lax.fori_loop(lo, hi, body, (top, mass, acc))
        if splits == 1:
            out = acc / jnp.where(mass == 0.0, 1.0, mass)[:, None]
            triton.store(outs[0].at[q_at], out.astype(outs[0].dtype), mask=q_mask)
        else:
            triton.store(outs[0].at[split, *q_at], acc, mask=q_mask)
            triton.store(outs[1].at[split, row, head], top, mask=live)
            triton.store(outs[2].at[split, row, head], mass, mask=live)

    pl.when(first < q_len)(run)
