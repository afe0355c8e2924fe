"""The product on TPUs: the grouped matmul that jax ships (megablox)."""

import contextlib

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

from jaxserve.pallas_kernels.grouped_matmul.tuning.tpu import tiling


def grouped_matmul(x, w, sizes, dtype, interpret=False) -> jax.Array:
    """See the seam, `grouped_matmul/__init__.py`. ValueError for types but float32 and bfloat16."""
    rows, (experts, outs, depth) = len(x), w.shape
    tile = tiling(rows, experts, depth, outs, x.dtype.itemsize)
    x = jnp.pad(x, ((0, -rows % tile[0]), (0, 0)))
    exact = jax.default_matmul_precision("highest") if x.dtype == jnp.float32 else contextlib.nullcontext()
    with exact:
        out = gmm(x, w, sizes, dtype, tile, transpose_rhs=True, interpret=interpret)
    return out[:rows]
