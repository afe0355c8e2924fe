"""The KV pool of one layer: `[num_blocks, 2, kv_heads, block_size, head_dim]`, keys then values.

A block is one contiguous slab, so that copying or moving it is one copy, and a head is an axis, so
that a mesh shards it. Block 0 is the dummy that padding writes to. On the CPU 16-bit floats are kept
as their bits (uint16): XLA's CPU scatter would convert a bf16 pool to float32 and back. A TPU's pool has
another order (`by_token`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta


class PoolShape(NamedTuple):
    """Size and storage type of one layer's pool."""

    num_blocks: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: jnp.dtype
    """Type of the numbers; `storage` is the type of the array."""
    bits: bool = False
    """Keep 16-bit floats as uint16."""
    by_token: bool = False
    """`[num_blocks, block_size, 2 * kv_heads, head_dim]`: what a token has lies together (`tpu.py`)."""

    @property
    def storage(self) -> jnp.dtype:
        return jnp.dtype(jnp.uint16) if self.bits and self.dtype.itemsize == 2 else self.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if self.by_token:
            return (self.num_blocks, self.block_size, 2 * self.kv_heads, self.head_dim)
        return (self.num_blocks, 2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return 2 * self.kv_heads * self.block_size * self.head_dim * self.dtype.itemsize


def encode(x: jax.Array, pool: jax.Array) -> jax.Array:
    """Numbers as the pool stores them; x already has the pool's number type where it keeps bits."""
    return lax.bitcast_convert_type(x, pool.dtype) if pool.dtype == jnp.uint16 else x.astype(pool.dtype)


def decode(stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers of type `dtype` from what the pool stores."""
    return lax.bitcast_convert_type(stored, dtype) if stored.dtype == jnp.uint16 else stored.astype(dtype)


def write(pool: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMeta) -> jax.Array:
    """The pool with k and v `[N, kv_heads, head_dim]` at each row's position, in place when donated."""
    _, _, heads, size, _ = pool.shape
    pos = jnp.maximum(meta.row_pos, 0)
    block = jnp.where(meta.row_pos < 0, 0, meta.block_tables[meta.row_seq, pos // size])
    # indexed as it is: reshaped to one axis and back, a pool of one head would be copied (XLA puts an
    # axis of size one first in the layout it gives to the reshape)
    at = block[:, None, None], jnp.arange(2)[:, None], jnp.arange(heads), (pos % size)[:, None, None]
    return pool.at[at].set(encode(jnp.stack([k, v], axis=1), pool), mode="promise_in_bounds")
