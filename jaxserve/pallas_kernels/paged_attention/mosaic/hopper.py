"""Hopper's matrix units as Pallas' Mosaic GPU backend gives them, in the releases of jax that differ."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

OF_PRODUCT = plgpu.Layout.WGMMA
"""How the registers of a warpgroup hold the result of a product."""


def operand(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for what TMA copies and wgmma multiplies, without bank conflicts."""
    numbers = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, numbers)), plgpu.SwizzleTransform(128))
    )


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))


def load(ref: Any, layout: Any, optimized: bool = True) -> jax.Array:
    at = ((),) if jax.__version_info__ < (0, 11) else ()  # an argument that newer releases do not have
    return plgpu.load(ref, *at, layout=layout, optimized=optimized)


def filled(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def product(a: Any, b: Any) -> jax.Array:
    """float32 a @ b, of 16-bit references in shared memory."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def launch(kernel, *operands: jax.Array, interpret: bool, **how: Any) -> Any:
    """plgpu.kernel's results. Raises NotImplementedError for interpret mode before jax 0.11."""
    if interpret:
        if not hasattr(plgpu, "InterpretGPUParams"):
            raise NotImplementedError(f"jax {jax.__version__} cannot interpret Mosaic GPU kernels; 0.11 can")
        how["interpret"] = plgpu.InterpretGPUParams()
    params = plgpu.CompilerParams(approx_math=True)
    return plgpu.kernel(kernel, compiler_params=params, thread_name="warpgroup", **how)(*operands)
