"""Paged attention in C++ (cpu.cc): the KV write and the attention of a step in one call, for any batch.

The pool has the shape that `pool.py` says, but another order in what a block has of a head: that is made of
cells of four bytes, a float or two 16-bit numbers, as processors multiply them. With n numbers in a cell keys
are `[dim / n, block_size, n]` and values `[block_size / n, dim, n]`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta
from jaxserve.pallas_kernels.paged_attention.pool import PoolShape

SOURCE = Path(__file__).with_name("cpu.cc")


def empty_pool(shape: PoolShape) -> jax.Array:
    """See the seam. Its memory is taken when it is touched first."""
    target = native.target(native.Kernel.of(SOURCE, shape.dtype), "empty_pool")
    pool: jax.Array = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape.shape, shape.storage))()
    return pool


def paged_attention(q, k, v, pool, meta: AttentionMeta, rotation, *, dtype, scale, masking, sinks, alibi):
    """See the seam, `paged_attention/__init__.py`. The output of padding rows is 0.

    Where `dtype` is not float32, softmax weights may be rounded to it before they multiply values, and q may
    not be rounded; k and v are rounded once, to the pool's type. The bits of a row depend only on its query,
    its context and the options, however the batch is made up.
    """
    if pool.dtype.itemsize == 2 and (pool.shape[3] % 2 or pool.shape[4] % 2):
        size, dim = pool.shape[3:]
        raise ValueError(f"16-bit KV in C++: block size {size} and head size {dim} must be even")
    number = dtype if pool.dtype == jnp.uint16 else pool.dtype
    cos, sin = rotation or [jnp.zeros((0, 0))] * 2
    per_head = [jnp.zeros(0) if x is None else x for x in (sinks, alibi)]
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    target = native.target(native.Kernel.of(SOURCE, number), "paged_attention")
    call = jax.ffi.ffi_call(target, out, input_output_aliases={3: 1})
    q_k_v, floats = (
        [x.astype(jnp.float32) for x in arrays] for arrays in ((q, k, v), (cos, sin, *per_head))
    )
    out, pool = call(
        *(*q_k_v, pool, *floats, *meta),
        scale=np.float32(scale),
        soft_cap=np.float32(masking.soft_cap),
        window=np.int32(masking.window),
        exact=dtype == jnp.float32,
    )
    return out.astype(q.dtype), pool


def read(pool: jax.Array, blocks: jax.Array, slots: jax.Array) -> jax.Array:
    """Keys and values `[N, 2, kv_heads, dim]` in these slots of these blocks, as the pool stores them."""
    shape, n = pool.shape, 4 // pool.dtype.itemsize
    heads, size, dim = shape[2:]
    cells = pool.reshape(shape[0], 2, heads, dim // n, size, n)
    keys = cells[blocks, 0, :, :, slots]
    cells = pool.reshape(shape[0], 2, heads, size // n, dim, n)
    values = cells[blocks, 1, :, slots // n, :, slots % n]
    return jnp.stack([keys.reshape(values.shape), values], axis=1)
