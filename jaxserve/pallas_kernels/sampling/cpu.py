"""Choosing tokens in C++ (cpu.cc): a row is one thread's, so its token depends on nothing else."""

from pathlib import Path

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels import native

KERNEL = native.Kernel(Path(__file__).with_name("cpu.cc"))


def uniform(seed: jax.Array, sample_index: jax.Array, positions: jax.Array) -> jax.Array:
    """float32 [R] in [0, 1), of uint32 [R, 2], int32 [R] and int32 [R]: the bits that jax.random gives."""
    call = jax.ffi.ffi_call(
        native.target(KERNEL, "uniform"), jax.ShapeDtypeStruct(positions.shape, jnp.float32)
    )
    return call(seed, sample_index, positions)


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    top_k: jax.Array,
    u: jax.Array,
) -> jax.Array:
    """int32 [R]: a token of each row's filtered distribution, at quantile u; the likeliest at temperature 0.

    logits float32 [R, vocab]; the others float32 [R], top_k int32 [R], 0 for all.
    """
    call = jax.ffi.ffi_call(native.target(KERNEL, "sample"), jax.ShapeDtypeStruct(u.shape, jnp.int32))
    return call(logits, temperature, top_p, min_p, top_k, u)


def logprobs(logits: jax.Array, tokens: jax.Array, top: int) -> tuple[jax.Array, ...]:
    """Of float32 logits [R, vocab]: the tokens' logprobs float32 [R], their ranks int32 [R], 1 for the
    likeliest, and the `top` likeliest tokens int32 [R, top] with their logprobs, of equal ones the first."""
    rows = logits.shape[0]
    shapes = (rows,), (rows,), (rows, top), (rows, top)
    dtypes = jnp.float32, jnp.int32, jnp.int32, jnp.float32
    out = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    return tuple(jax.ffi.ffi_call(native.target(KERNEL, "logprobs"), out)(logits, tokens))
