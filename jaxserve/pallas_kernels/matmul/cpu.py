"""The product in C++ (cpu.cc), for processors without matrix units for bf16."""

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import native

SOURCE = Path(__file__).with_name("cpu.cc")


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """See the seam, `matmul/__init__.py`. w is float32, bfloat16 or float16."""
    out = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    target = native.target(native.Kernel.of(SOURCE, w.dtype), "matmul")
    return jax.ffi.ffi_call(target, out)(x.astype(jnp.float32), w)
