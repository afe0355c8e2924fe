"""The KV pool of one layer: `[num_blocks, 2, kv_heads, block_size, head_dim]`, keys then values.

A block is one contiguous slab, so that copying or moving it is one copy, and a head is an axis, so
that a mesh shards it. Block 0 is the dummy that padding writes to. On the CPU 16-bit floats are kept
as their bits (uint16): XLA's CPU scatter would convert a bf16 pool to float32 and back. A TPU's pool has
another order (`by_token`).

In 8 bits a pool is two arrays (`Scaled`): each key and each value of a head has a scale, made when it is
written, so that nothing is calibrated. float8_e4m3fn is kept as its bits everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta

LARGEST = {jnp.dtype(jnp.int8): np.float32(127), jnp.dtype(jnp.uint8): np.float32(448)}
"""The largest 8-bit number, by the type it is stored as: uint8 holds float8_e4m3fn."""
TINY = np.float32(1e-35)
"""Rows of no larger numbers are rows of zeros."""


class Scaled(NamedTuple):
    """A pool of 8-bit numbers that mean `numbers * scales`."""

    numbers: jax.Array
    """int8, or uint8 for float8_e4m3fn: `[num_blocks, 2, kv_heads, block_size, head_dim]`."""
    scales: jax.Array
    """float32 `[num_blocks, 2, kv_heads, block_size]`: the largest number of a row / 127, or / 448."""


Pool = jax.Array | Scaled


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
        if self.dtype == jnp.float8_e4m3fn:
            return jnp.dtype(jnp.uint8)
        return jnp.dtype(jnp.uint16) if self.bits and self.dtype.itemsize == 2 else self.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if self.by_token:
            return (self.num_blocks, self.block_size, 2 * self.kv_heads, self.head_dim)
        return (self.num_blocks, 2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        row = self.head_dim * self.dtype.itemsize + (4 if self.scaled else 0)
        return 2 * self.kv_heads * self.block_size * row

    @property
    def scaled(self) -> bool:
        return self.dtype.itemsize == 1

    @property
    def arrays(self) -> Pool:
        """The pool's arrays, abstract."""
        numbers = jax.ShapeDtypeStruct(self.shape, self.storage)
        return Scaled(numbers, jax.ShapeDtypeStruct(self.shape[:-1], jnp.float32)) if self.scaled else numbers


def parts(pool: Pool) -> tuple[jax.Array, jax.Array | None]:
    """A pool's numbers, and their scales where it has them."""
    return pool if isinstance(pool, Scaled) else (pool, None)


def encode(x: jax.Array, pool: jax.Array) -> jax.Array:
    """Numbers as the pool stores them; x already has the pool's number type where it keeps bits."""
    return lax.bitcast_convert_type(x, pool.dtype) if pool.dtype == jnp.uint16 else x.astype(pool.dtype)


def decode(stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Numbers of type `dtype` from what the pool stores, without their scales: exact from 8 bits."""
    if stored.dtype == jnp.uint16:
        return lax.bitcast_convert_type(stored, dtype)
    if stored.dtype == jnp.uint8:
        stored = lax.bitcast_convert_type(stored, jnp.float8_e4m3fn)
    return stored.astype(dtype)


def quantise(x: jax.Array, storage: jnp.dtype) -> Scaled:
    """Rows x `[..., dim]` in 8 bits, and the float32 scale `[...]` of each."""
    x, largest = x.astype(jnp.float32), LARGEST[storage]
    top = jnp.abs(x).max(axis=-1)
    x *= jnp.where(top > TINY, largest / top, 0.0)[..., None]
    if storage == jnp.int8:
        numbers = jnp.round(x).astype(jnp.int8)
    else:
        numbers = lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)
    return Scaled(numbers, top * (1 / largest))


def write(pool: Pool, k: jax.Array, v: jax.Array, meta: AttentionMeta) -> Pool:
    """The pool with k and v `[N, kv_heads, head_dim]` at each row's position, in place when donated."""
    numbers, scales = parts(pool)
    _, _, heads, size, _ = numbers.shape
    pos = jnp.maximum(meta.row_pos, 0)
    block = jnp.where(meta.row_pos < 0, 0, meta.block_tables[meta.row_seq, pos // size])
    # indexed as it is: reshaped to one axis and back, a pool of one head would be copied (XLA puts an
    # axis of size one first in the layout it gives to the reshape)
    at = block[:, None, None], jnp.arange(2)[:, None], jnp.arange(heads), (pos % size)[:, None, None]
    rows = jnp.stack([k, v], axis=1)
    new = encode(rows, numbers) if scales is None else quantise(rows, numbers.dtype)
    return jax.tree.map(lambda old, new: old.at[at].set(new, mode="promise_in_bounds"), pool, new)
