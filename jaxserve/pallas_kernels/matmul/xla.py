"""The product as XLA makes it."""

import jax
import jax.numpy as jnp
from jax import lax


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See the seam, `matmul/__init__.py`. float32 products are kept exact on every device.

    On w `[out, in]` in bf16, with a float32 result, is the form that reaches a CPU's matrix units.
    """
    exact = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return lax.dot_general(
        x.astype(w.dtype),
        w,
        (((1,), (1,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
