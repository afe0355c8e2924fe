"""The product as XLA makes it best: a loop over tiles of rows, as many as there are.

`lax.ragged_dot` would multiply every row with every expert, on CPUs and on GPUs. Here a turn takes one
expert's weight for one product.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.grouped_matmul.tiles import row_tiles
from jaxserve.pallas_kernels.matmul.xla import matmul

PER_TILE = 8, 64
"""Fewest and most rows of a tile: few take as long as one on a CPU, and those of others are made in vain."""


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """See the seam, `grouped_matmul/__init__.py`."""
    rows, outs, kind = len(x), w.shape[1], x.dtype
    least, most = PER_TILE
    per_tile = min(max(1 << (rows // len(w)).bit_length(), least), most)
    tiles, used = row_tiles(sizes, rows, per_tile)
    x = jnp.pad(x, ((0, per_tile), (0, 0)))

    def body(t, out):
        mine = lax.dynamic_slice_in_dim(x, tiles.first[t], per_tile)
        weight = lax.dynamic_index_in_dim(w, tiles.expert[t], keepdims=False)
        if w.dtype == jnp.uint16:
            weight = lax.bitcast_convert_type(weight, kind)
        y = matmul(mine, weight, jnp.float32).astype(dtype)
        # what a tile writes past its rows the next one writes over: their order is that of the rows
        return lax.dynamic_update_slice_in_dim(out, y, tiles.first[t], 0)

    out = jnp.zeros((rows + per_tile, outs), dtype)
    return lax.fori_loop(0, used, body, out)[:rows]
