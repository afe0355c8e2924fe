"""The product in C++ (cpu.cc), on weights that are kept in tiles."""

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.matmul.tiles import OUTS

SOURCE = Path(__file__).with_name("cpu.cc")


def matmul(x: jax.Array, tiles: jax.Array, outs: int, used: jax.Array) -> jax.Array:
    """float32 `[N, outs]` of x `[N, in]` and the tiles of w `[outs, in]`: float32, bfloat16 or float16.

    x is read as float32; with bfloat16 weights it is rounded to bfloat16 where the processor multiplies that
    (avx512_bf16, amx_bf16). A row's bits do not depend on the other rows. Those from `used` on are zeros.
    """
    padded = jax.ShapeDtypeStruct((x.shape[0], tiles.shape[0] * OUTS), jnp.float32)
    target = native.target(native.Kernel.of(SOURCE, tiles.dtype), "matmul")
    return jax.ffi.ffi_call(target, padded)(x.astype(jnp.float32), tiles, used)[:, :outs]
