"""The product as XLA makes it."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.matmul.int8 import quantise_rows

DEPTHS = (((1,), (1,)), ((), ()))
"""Both of [N, in] and of [out, in] have the depth last."""


def matmul(x: jax.Array, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """See the seam, `matmul/__init__.py`. float32 products are kept exact on every device.

    On w `[out, in]` in bf16, with a float32 result, is the form that reaches a CPU's matrix units.
    """
    exact = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return lax.dot_general(x.astype(w.dtype), w, DEPTHS, precision=exact, preferred_element_type=dtype)


def matmul_int8(x: jax.Array, w: jax.Array, scales: jax.Array) -> jax.Array:
    """See the seam. Sharded, a row's largest number is found over all shards: it is one row."""
    x8, scale = quantise_rows(x)
    sums = lax.dot_general(x8, w, DEPTHS, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * scale * scales
