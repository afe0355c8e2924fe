"""The product on NVIDIA GPUs: one Pallas kernel (Triton backend).

A program takes a tile of one expert's rows, a tile of its outputs and one split of the depth. Which rows a
tile has is data (`tiles.py`), so the weight of an expert without rows is not read.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxserve.pallas_kernels.grouped_matmul.tiles import row_tiles
from jaxserve.pallas_kernels.grouped_matmul.tuning.gpu import Variant, num_splits, together, variant


def grouped_matmul(x, w, sizes, dtype, interpret=False) -> jax.Array:
    """See the seam, `grouped_matmul/__init__.py`."""
    rows, depth = x.shape
    experts, outs, _ = w.shape
    v = variant(rows / experts, x.dtype.itemsize)
    tiles, _ = row_tiles(sizes, rows, v.rows)
    across = pl.cdiv(outs, v.outs)
    # the programs that run at a time share a part of an expert's weight, which the cache holds for its rows
    near = together(across, v.outs * depth * w.dtype.itemsize)
    splits = num_splits(across * len(tiles.expert), pl.cdiv(depth, v.depth))
    shape = (rows, outs) if splits == 1 else (splits, rows, outs)
    out = pl.pallas_call(
        partial(_kernel, v=v, near=near, splits=splits),
        grid=(near, len(tiles.expert), pl.cdiv(across, near), splits),
        out_shape=jax.ShapeDtypeStruct(shape, dtype if splits == 1 else jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=v.num_warps, num_stages=v.num_stages),
        interpret=interpret,
        name=f"grouped_matmul_m{v.rows}_n{v.outs}_k{v.depth}_s{splits}",
    )(*tiles, x, w)
    return out if splits == 1 else out.sum(axis=0).astype(dtype)


def _kernel(expert_ref, first_ref, end_ref, x_ref, w_ref, out_ref, *, v: Variant, near: int, splits: int):
    """One tile of rows and outputs: the product, or what one split of the depth gives of it."""
    tile, split = pl.program_id(1), pl.program_id(3)
    rows, depth = x_ref.shape
    outs = w_ref.shape[1]
    expert, first, end = expert_ref[tile], first_ref[tile], end_ref[tile]
    begin = (pl.program_id(2) * near + pl.program_id(0)) * v.outs
    # float32 stays float32: the default would be TF32
    exact = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def run():
        m = first + jnp.arange(v.rows, dtype=jnp.int32)
        n = begin + jnp.arange(v.outs, dtype=jnp.int32)
        # where a tile is not full, something is read and multiplied that is not stored
        row, outp = jnp.minimum(m, rows - 1)[:, None], jnp.minimum(n, outs - 1)[:, None]

        def body(turn, acc):
            k = (turn * v.depth + jnp.arange(v.depth, dtype=jnp.int32))[None, :]
            mask, other = (k < depth, jnp.zeros((), x_ref.dtype)) if depth % v.depth else (None, None)
            x = triton.load(x_ref.at[row, k], mask=mask, other=other)
            w = triton.load(w_ref.at[expert, outp, k], mask=mask, other=other)
            return acc + jnp.dot(x, w.T, preferred_element_type=jnp.float32, precision=exact)

        turns = pl.cdiv(depth, v.depth)
        share = pl.cdiv(turns, splits)
        lo = split * share
        acc = jnp.zeros((v.rows, v.outs), jnp.float32)
        acc = lax.fori_loop(lo, jnp.minimum(turns, lo + share), body, acc)
        live = (m < end)[:, None] & (n < outs)[None, :]
        # rows that are not stored point past the end: interpret mode writes them too, and drops only those
        at = jnp.where(m < end, m, rows)[:, None], n[None, :]
        triton.store(out_ref.at[at if splits == 1 else (split, *at)], acc.astype(out_ref.dtype), mask=live)

    pl.when((first < end) & (begin < outs))(run)
