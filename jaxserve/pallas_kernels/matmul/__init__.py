"""Products with weights: one seam, several implementations with the same contract.

An implementation keeps a weight `[out, in]` in a form of its own: `kept_shape` and `keep` say which, and
`matmul` and `take` read it. `xla` keeps it as it is, `cpu` in tiles (tiles.py).
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.matmul import tiles

Implementation = Literal["xla", "cpu"]


def kept_shape(outs: int, depth: int, dtype: np.dtype, implementation: Implementation) -> tuple[int, ...]:
    """Of a weight [outs, depth] as an implementation keeps it."""
    return tiles.shape(outs, depth, dtype) if implementation == "cpu" else (outs, depth)


def keep(w: np.ndarray, implementation: Implementation) -> np.ndarray:
    """A weight [out, in] as an implementation keeps it."""
    return tiles.pack(w) if implementation == "cpu" else w


def matmul(
    x: jax.Array,
    w: jax.Array,
    outs: int,
    used: jax.Array | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """float32 `[N, outs]` of x `[N, in]` and a weight `[outs, in]` as it is kept, accumulated in float32.

    `xla` rounds x to w's type. `cpu` reads it as float32, or rounds it to bf16 where the processor multiplies
    that (avx512_bf16, amx_bf16); a row's bits do not depend on the other rows.

    Only the first `used` rows, int32 [], are wanted (all of them when None): `cpu` skips the others.
    """
    if implementation == "cpu":
        from jaxserve.pallas_kernels.matmul import cpu

        return cpu.matmul(x, w, outs, jnp.int32(len(x)) if used is None else used)
    from jaxserve.pallas_kernels.matmul import xla

    return xla.matmul(x, w)


def take(w: jax.Array, rows: jax.Array, depth: int, implementation: Implementation = "xla") -> jax.Array:
    """`[N, depth]`: rows of a weight `[out, depth]` as it is kept; numbers outside of it are clipped."""
    if implementation == "cpu":
        return tiles.take(w, rows, depth)
    return w.at[rows].get(mode="clip")
