"""Products of rows with the weights of their experts: one seam, several implementations.

    order = by_expert(ids, experts)                                  each token's experts -> rows by expert
    y = grouped_matmul(order.rows_of(x), w, order.sizes)             each row with its own expert's weight
    out = order.sum(y, shares)                                       each token's rows, weighted

`reference.py` is the specification. An expert without rows costs nothing: its weight is not read.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.grouped_matmul.order import Order, by_expert

__all__ = ["Implementation", "Order", "by_expert", "grouped_matmul"]

Implementation = Literal["reference", "xla", "gpu", "tpu"]


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    implementation: Implementation = "xla",
    interpret: bool = False,
) -> jax.Array:
    """`[N, out]` of x `[N, in]` and w `[experts, out, in]`; the first `sizes[0]` rows are those of expert 0.

    `sizes`, int32 `[experts]`, has a sum of at most N; rows past it are undefined. x is rounded to the type
    of w, products are added up in float32 (float32 ones exactly, never in TF32) and the result is rounded to
    `dtype`. For `xla`, w may be the bits (uint16) of numbers of x's type: jax 0.10 on a CPU reads those where
    they lie, and converts others, of all experts, in every call. `tpu` takes float32 and bfloat16.
    `interpret` runs Pallas kernels in interpret mode.
    """
    if w.dtype != jnp.uint16:
        x = x.astype(w.dtype)
    if implementation == "gpu":
        from jaxserve.pallas_kernels.grouped_matmul import gpu

        return gpu.grouped_matmul(x, w, sizes, dtype, interpret)
    if implementation == "tpu":
        from jaxserve.pallas_kernels.grouped_matmul import tpu

        return tpu.grouped_matmul(x, w, sizes, dtype, interpret)
    if implementation == "reference":
        from jaxserve.pallas_kernels.grouped_matmul import reference

        return reference.grouped_matmul(x, w, sizes, dtype)
    from jaxserve.pallas_kernels.grouped_matmul import xla

    return xla.grouped_matmul(x, w, sizes, dtype)
