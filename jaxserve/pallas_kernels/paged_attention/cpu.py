"""Paged attention in C++ (cpu.cc): the KV write and the attention of a step in one call, for any batch."""

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


def paged_attention(q, k, v, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi):
    """See the seam, `paged_attention/__init__.py`. The output of padding rows is 0.

    The bits of a row depend only on its query, its context and the options, however the batch is made up.
    """
    number = q.dtype if pool.dtype == jnp.uint16 else pool.dtype
    per_head = [jnp.zeros(0) if x is None else x.astype(jnp.float32) for x in (sinks, alibi)]
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(pool.shape, pool.dtype)
    target = native.target(native.Kernel.of(SOURCE, number), "paged_attention")
    call = jax.ffi.ffi_call(target, out, input_output_aliases={3: 1})
    out, pool = call(
        *(q.astype(jnp.float32), k.astype(number), v.astype(number), pool, *per_head, *meta),
        scale=np.float32(scale),
        soft_cap=np.float32(masking.soft_cap),
        window=np.int32(masking.window),
    )
    return out.astype(q.dtype), pool
