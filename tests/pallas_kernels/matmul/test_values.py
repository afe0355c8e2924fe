"""Every implementation against float64, and what the native one promises about bits."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve import processor
from jaxserve.pallas_kernels.matmul import keep, kept, matmul, take, tiles

SHAPES = [(1, 576, 960), (2, 64, 5), (3, 70, 7), (4, 8, 3), (16, 64, 80), (50, 96, 64)]
SHAPES += [(5, 5000, 31), (33, 576, 100), (64, 1, 1), (130, 40, 50), (200, 33, 17)]
"""Rows, depth, outputs: full tiles, tasks and blocks of the depth, and what is left over of each."""
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def operands(rows: int, depth: int, outs: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, depth), np.float32), rng.standard_normal((outs, depth)).astype(dtype)


def run(x: np.ndarray, w: np.ndarray, implementation: str) -> np.ndarray:
    multiply = jax.jit(matmul, static_argnums=(2, 4))
    return np.asarray(multiply(x, keep(w, implementation), len(w), None, implementation))


@pytest.mark.parametrize("implementation", ["xla", pytest.param("cpu", marks=pytest.mark.compiler)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value(shape, dtype, implementation):
    x, w = operands(*shape, dtype)
    if implementation == "xla" or (dtype == ml_dtypes.bfloat16 and processor.has("avx512_bf16")):
        x = x.astype(dtype).astype(np.float32)  # as they do
    got = run(x, w, implementation)
    assert got.dtype == np.float32
    want = x.astype(np.float64) @ w.astype(np.float64).T
    # as many roundings as numbers, of sums that grow with their root
    np.testing.assert_allclose(got, want, rtol=0, atol=1.2e-7 * (shape[1] + 64))


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_row_has_the_same_bits_in_any_company(dtype):
    x, w = operands(237, 2500, 70, dtype)
    whole = run(x, w, "cpu")
    for first, last in [(0, 1), (3, 5), (8, 12), (20, 29), (0, 36), (190, 194)]:
        assert run(x[first:last], w, "cpu").tobytes() == whole[first:last].tobytes()


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("place", [0, 1], ids=["even", "odd"])
def test_every_16_bit_number_is_widened_right(place, dtype):
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    w, x = np.zeros((2**16, 2), dtype), np.zeros((2, 2), np.float32)
    w[:, place], x[:, place] = numbers, 1
    got = run(x, w, "cpu")
    want = numbers.astype(np.float32)
    want = np.where(np.abs(want) < np.finfo(np.float32).tiny, 0, want)  # as XLA takes subnormal floats
    np.testing.assert_array_equal(got, np.broadcast_to(want, (2, 2**16)))


@pytest.mark.compiler
@pytest.mark.parametrize("used", [0, 1, 5, 8, 9])
def test_rows_of_padding_are_skipped(used):
    x, w = operands(8, 64, 48, ml_dtypes.bfloat16)
    x[used:] = np.nan
    got = jax.jit(matmul, static_argnums=(2, 4))(x, keep(w, "cpu"), 48, jnp.int32(used), "cpu")
    np.testing.assert_array_equal(np.asarray(got)[:used], run(x[:used], w, "cpu") if used else got[:0])
    assert not np.asarray(got)[used:].any()


@pytest.mark.compiler
def test_weights_of_other_types_are_refused():
    with pytest.raises(TypeError, match="C\\+\\+ kernels read float32, bfloat16, float16, not int16"):
        run(np.ones((1, 4), np.float32), np.ones((2, 4), np.int16), "cpu")


@pytest.mark.compiler
def test_a_weight_that_is_not_in_tiles_is_refused():
    with pytest.raises(jax.errors.JaxRuntimeError, match="not in tiles"):
        jax.block_until_ready(matmul(jnp.ones((1, 32)), jnp.ones((1, 8, 4, 1)), 4, None, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 33), (40, 100)], ids=str)
def test_tiles_hold_every_number_once(shape, dtype):
    w = np.arange(1, shape[0] * shape[1] + 1).reshape(shape).astype(dtype)
    packed = tiles.pack(w)
    assert packed.shape == kept(*shape, np.dtype(dtype), "cpu").shape and packed.dtype == dtype
    assert sorted(packed[packed != 0].tolist()) == sorted(w.ravel().tolist())
    per_cell = packed.shape[-1]
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1), (shape[0] // 2, shape[1] // 3)]:
        assert packed[row // 16, column // per_cell, row % 16, column % per_cell] == w[row, column]


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_rows_are_taken_from_what_is_kept(dtype, implementation):
    w = np.random.default_rng(0).standard_normal((37, 70)).astype(dtype)
    rows = jnp.array([36, 0, 17, 17])
    got = jax.jit(take, static_argnums=(2, 3))(keep(w, implementation), rows, 70, implementation)
    np.testing.assert_array_equal(np.asarray(got), w[np.asarray(rows)])
