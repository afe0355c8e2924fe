"""Paged attention on Hopper GPUs: two Pallas kernels (Mosaic GPU backend), with TMA and wgmma.

`decode.py` takes the sequences of one query row, `prefill.py` the longer ones; `context.py` brings the
pages of a sequence to both, from the pool where it lies.
"""

from typing import Any

import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta
from jaxserve.pallas_kernels.paged_attention.mosaic.decode import decode
from jaxserve.pallas_kernels.paged_attention.mosaic.prefill import prefill
from jaxserve.pallas_kernels.paged_attention.pool import write
from jaxserve.pallas_kernels.paged_attention.tiles import join
from jaxserve.pallas_kernels.paged_attention.tuning.mosaic import HEAD_DIMS, LARGEST_GROUP


def paged_attention(q, k, v, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi, interpret=False):
    """See the seam, `paged_attention/__init__.py`. Raises ValueError for what `why_not` names."""
    rows, heads, dim = q.shape
    kv_heads, block_size = pool.shape[2:4]
    if missing := why_not(heads // kv_heads, dim, block_size, q.dtype, pool.dtype):
        raise ValueError(f"the Mosaic kernel {missing}")
    pool = write(pool, k, v, meta)
    attend = {"scale": scale, "masking": masking, "sinks": sinks, "alibi": alibi, "interpret": interpret}
    singles = min(rows, meta.block_tables.shape[0])
    out = decode(q[:singles], pool, meta, **attend)
    if rows == singles:  # a batch with sequences of several rows has more rows than sequences
        return out, pool
    rest = prefill(q, pool, meta, **attend)
    return join(out, rest, meta), pool


def why_not(group: int, head_dim: int, block_size: int, dtype: Any, pool_dtype: Any) -> str:
    """Why the kernels cannot serve a layer with `group` query heads for a KV head; empty when they can."""
    dtype, pool_dtype = jnp.dtype(dtype), jnp.dtype(pool_dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"multiplies bfloat16 and float16, not {dtype}"
    if pool_dtype != dtype:
        return f"reads KV of the queries' type, {dtype}, not {pool_dtype}"
    if head_dim not in HEAD_DIMS:
        return f"has head sizes {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if block_size % 8:
        return f"copies eight positions at a time: blocks of {block_size} are no multiple"
    if group > LARGEST_GROUP:
        return f"has up to {LARGEST_GROUP} query heads for a KV head, not {group}"
    return ""
