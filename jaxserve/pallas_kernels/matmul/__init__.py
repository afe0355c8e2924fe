"""Products with weights: one seam, several implementations with the same contract.

An implementation keeps a weight `[out, in]`, of floats or in 8 bits (int8.py), in a form of its own: `kept`
and `keep` say which, and `matmul`, `matmul_int8` and `take` read it. `xla` keeps it as it is, `cpu` in tiles
(tiles.py).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.matmul import tiles
from jaxserve.pallas_kernels.matmul.int8 import quantise

__all__ = ["Implementation", "gated", "keep", "kept", "matmul", "matmul_int8", "quantise", "take"]

Implementation = Literal["xla", "cpu"]
FLOAT32 = jnp.dtype(jnp.float32)


def kept(outs: int, depth: int, dtype: np.dtype, implementation: Implementation) -> jax.ShapeDtypeStruct:
    """Shape and type of a weight [outs, depth] as an implementation keeps it."""
    if implementation == "cpu":
        return tiles.kept(outs, depth, dtype)
    return jax.ShapeDtypeStruct((outs, depth), dtype)


def keep(w: np.ndarray, implementation: Implementation) -> np.ndarray:
    """A weight [out, in] as an implementation keeps it."""
    return tiles.pack(w) if implementation == "cpu" else w


def matmul(
    x: jax.Array,
    w: jax.Array,
    outs: int,
    used: jax.Array | None = None,
    implementation: Implementation = "xla",
    dtype: jnp.dtype = FLOAT32,
) -> jax.Array:
    """`[N, outs]` of x `[N, in]` and a weight `[outs, in]` as it is kept, accumulated in float32.

    `xla` rounds x to w's type and gives `dtype`. `cpu` reads x as float32, or rounds it to bf16 where the
    processor multiplies that (avx512_bf16, amx_bf16), and gives float32; a row's bits do not depend on the
    other rows.

    Only the first `used` rows, int32 [], are wanted (all of them when None): `cpu` skips the others.
    """
    if implementation == "cpu":
        from jaxserve.pallas_kernels.matmul import cpu

        return cpu.matmul(x, w, outs, jnp.int32(len(x)) if used is None else used)
    from jaxserve.pallas_kernels.matmul import xla

    return xla.matmul(x, w, dtype)


def matmul_int8(
    x: jax.Array,
    w: jax.Array,
    scales: jax.Array,
    used: jax.Array | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """float32 `[N, outs]` of x `[N, in]` and a weight `[outs, in]` in 8 bits as it is kept, with its scales.

    x is brought to 8 bits by row. The same bits from every implementation and in any company, of the first
    `used` rows (all of them when None).
    """
    if implementation == "cpu":
        from jaxserve.pallas_kernels.matmul import cpu

        return cpu.matmul_int8(x, w, scales, jnp.int32(len(x)) if used is None else used)
    from jaxserve.pallas_kernels.matmul import xla

    return xla.matmul_int8(x, w, scales)


def gated(
    x: jax.Array,
    w: jax.Array,
    outs: int,
    scales: jax.Array | None,
    gate: str,
    used: jax.Array | None = None,
    implementation: Implementation = "xla",
) -> jax.Array | None:
    """float32 `[N, outs / 2]`: what the first half of a weight's outputs gives, through `gate`, times what
    the other half gives; `scales` are those of a weight in 8 bits. None where an implementation has no form
    of its own for it."""
    if implementation != "cpu":
        return None
    from jaxserve.pallas_kernels.matmul import cpu

    if gate not in cpu.GATES or outs % (2 * tiles.OUTS):
        return None
    return cpu.gated(x, w, scales, gate, jnp.int32(len(x)) if used is None else used)


def take(w: jax.Array, rows: jax.Array, depth: int, implementation: Implementation = "xla") -> jax.Array:
    """`[N, depth]`: rows of a weight `[out, depth]` as it is kept; numbers outside of it are clipped."""
    if implementation == "cpu":
        return tiles.take(w, rows, depth)
    if len(rows) == 1:  # XLA would slice the row out, and to do that bring a sharded weight together
        return w.at[jnp.repeat(rows, 2)].get(mode="clip")[:1]
    return w.at[rows].get(mode="clip")
