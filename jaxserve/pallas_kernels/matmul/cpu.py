"""The products in C++ (cpu.cc, int8.cc), on weights that are kept in tiles."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.matmul.tiles import OUTS

SOURCE = Path(__file__).with_name("cpu.cc")
GATES = ("silu", "gelu_tanh", "relu")
"""In the order of native/tiled_product.h."""
INT8 = native.Kernel(Path(__file__).with_name("int8.cc"), "uint8_t")


def matmul(x: jax.Array, tiles: jax.Array, outs: int, used: jax.Array) -> jax.Array:
    """float32 `[N, outs]` of x `[N, in]` and the tiles of w `[outs, in]`: float32, bfloat16 or float16.

    x is read as float32; with bfloat16 weights it is rounded to bfloat16 where the processor multiplies that
    (avx512_bf16, amx_bf16). A row's bits do not depend on the other rows. Those from `used` on are zeros.
    """
    target = native.target(native.Kernel.of(SOURCE, tiles.dtype), "matmul")
    return jax.ffi.ffi_call(target, _padded(x, tiles))(x.astype(jnp.float32), tiles, used)[:, :outs]


def matmul_int8(x: jax.Array, tiles: jax.Array, scales: jax.Array, used: jax.Array) -> jax.Array:
    """float32 `[N, outs]` of x `[N, in]`, the tiles of w `[outs, in]` in 8 bits and their scales `[outs]`.

    Rows from `used` on are zeros.
    """
    call = jax.ffi.ffi_call(native.target(INT8, "matmul_int8"), _padded(x, tiles))
    return call(x.astype(jnp.float32), tiles, scales, used)[:, : len(scales)]


def gated(
    x: jax.Array, tiles: jax.Array, scales: jax.Array | None, gate: str, used: jax.Array
) -> jax.Array:
    """float32 `[N, outs / 2]`: the first half of a product's outputs, through one of GATES, times the other.

    The product itself is never in memory. `scales` are those of a weight in 8 bits. A half has whole tiles.
    Rows from `used` on are zeros.
    """
    half = jax.ShapeDtypeStruct((x.shape[0], tiles.shape[0] // 2 * OUTS), jnp.float32)
    number = np.int32(GATES.index(gate))
    if scales is None:
        call = jax.ffi.ffi_call(native.target(native.Kernel.of(SOURCE, tiles.dtype), "gated"), half)
        return call(x.astype(jnp.float32), tiles, used, gate=number)
    call = jax.ffi.ffi_call(native.target(INT8, "gated_int8"), half)
    return call(x.astype(jnp.float32), tiles, scales, used, gate=number)


def _padded(x: jax.Array, tiles: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], tiles.shape[0] * OUTS), jnp.float32)
