"""Products with weights: one seam, several implementations with the same contract."""

from typing import Literal

import jax

Implementation = Literal["xla", "cpu"]


def matmul(x: jax.Array, w: jax.Array, implementation: Implementation = "xla") -> jax.Array:
    """float32 `[N, out]` of x `[N, in]` and w `[out, in]`, accumulated in float32.

    `xla` rounds x to w's type. `cpu` reads it as float32, or rounds it to bf16 where the processor multiplies
    that (avx512_bf16); a row's bits do not depend on the other rows.
    """
    if implementation == "cpu":
        from jaxserve.pallas_kernels.matmul import cpu

        return cpu.matmul(x, w)
    from jaxserve.pallas_kernels.matmul import xla

    return xla.matmul(x, w)
