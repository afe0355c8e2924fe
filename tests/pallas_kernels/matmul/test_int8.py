"""Products in 8 bits: every implementation gives the bits of the scheme as numpy computes it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.pallas_kernels.matmul import keep, kept, matmul_int8, quantise, tiles

IMPLEMENTATIONS = ["xla", pytest.param("cpu", marks=pytest.mark.compiler)]
SHAPES = [(1, 576, 960), (2, 64, 5), (3, 70, 7), (4, 9, 3), (16, 64, 80), (33, 577, 100)]
SHAPES += [(5, 9000, 31), (64, 1, 1), (130, 40, 50), (200, 130, 17)]
"""Rows, depth, outputs: full tiles, tasks and blocks of the depth, and what is left over of each."""


def oracle(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The scheme: integers are summed in 64 bits, and every float is rounded as float32."""

    def bring(rows):
        largest = np.maximum(np.abs(rows).max(axis=1), np.float32(1e-30))
        return np.rint(rows * (np.float32(127) / largest)[:, None]).astype(np.int64), largest * STEP

    (x8, x_scale), (w8, w_scale) = bring(x), bring(w.astype(np.float32))
    assert max(abs(x8).max(), abs(w8).max()) <= 127
    return (x8 @ w8.T).astype(np.float32) * x_scale[:, None] * w_scale


STEP = np.float32(1 / 127)


def operands(rows: int, depth: int, outs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 3, (rows, 1))).astype(np.float32)
    x = rng.standard_normal((rows, depth), np.float32) * spread
    return x, rng.standard_normal((outs, depth), np.float32)


def run(x: np.ndarray, w: np.ndarray, implementation: str) -> np.ndarray:
    w8, scales = quantise(w)
    multiply = jax.jit(matmul_int8, static_argnums=4)
    return np.asarray(multiply(x, keep(w8, implementation), scales, None, implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit(shape, implementation):
    x, w = operands(*shape)
    got = run(x, w, implementation)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, oracle(x, w))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 60)), st.integers(0, 2**32 - 1))
@settings(max_examples=8)
def test_every_bit_of_random_cases(implementation, shape, seed):
    x, w = operands(*shape, seed)
    np.testing.assert_array_equal(run(x, w, implementation), oracle(x, w))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("x", "w"), [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_largest_sums_do_not_saturate(x, w, implementation):
    """Pairs of products of bytes that do not fit 16 bits, on a depth of more than a block."""
    x, w = np.full((7, 5001), x, np.float32), np.full((33, 5001), w, np.float32)
    np.testing.assert_array_equal(run(x, w, implementation), oracle(x, w))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_zeros_and_of_almost_nothing(implementation):
    x, w = operands(3, 50, 20)
    x[0], x[1] = 0, x[1] * np.float32(1e-37)
    w[0], w[1] = 0, 1e-36
    got = run(x, w, implementation)
    assert (got[0] == 0).all() and (got[:, 0] == 0).all() and np.isfinite(got).all() and got[2, 2:].all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 20, 69])
def test_what_is_no_number_spoils_its_row_alone(bad, place, implementation):
    x, w = operands(3, 70, 7)
    x[1, place] = bad
    got = run(x, w, implementation)
    assert not np.isfinite(got[1]).any()
    np.testing.assert_array_equal(got[[0, 2]], oracle(x[[0, 2]], w))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_has_the_same_bits_in_any_company(implementation):
    x, w = operands(237, 600, 70)
    whole = run(x, w, implementation)
    for first, last in [(0, 1), (3, 5), (20, 29), (0, 36), (190, 194)]:
        assert run(x[first:last], w, implementation).tobytes() == whole[first:last].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(1, 1), (700, 1001), (3, 400_000)], ids=str)
def test_weights_are_off_by_half_a_step_at_most(shape, dtype):
    w = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    w8, scales = quantise(w)
    assert (w8.dtype, w8.shape, scales.shape) == (np.int8, w.shape, (len(w),))
    assert (np.abs(w8).max(axis=1) == 127).all()
    error = np.abs(w8 * scales.astype(np.float64)[:, None] - w.astype(np.float64))
    assert (error <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (40, 200)], ids=str)
def test_tiles_hold_every_byte_once(shape):
    w = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    packed, form = tiles.pack(w), kept(*shape, np.dtype(np.int8), "cpu")
    assert packed.shape == form.shape and packed.dtype == form.dtype == np.uint8
    outs, depth = np.indices(shape)
    found = packed[outs // 16, depth // 4, outs % 16, depth % 4]
    np.testing.assert_array_equal(found.astype(int) - 128, w)


@pytest.mark.compiler
@pytest.mark.parametrize("form", [(1, 8, 4, 4), (1, 16, 16, 2)], ids=str)
def test_a_weight_that_is_not_in_tiles_is_refused(form):
    with pytest.raises(jax.errors.JaxRuntimeError, match="not in tiles"):
        w = jnp.ones(form, jnp.uint8)
        jax.block_until_ready(matmul_int8(jnp.ones((1, 8)), w, jnp.ones(4), None, "cpu"))


@pytest.mark.compiler
@pytest.mark.parametrize(("depth", "outs"), [(65, 16), (64, 17)])
def test_shapes_that_do_not_fit_are_refused(depth, outs):
    w = jnp.zeros((1, 16, 16, 4), jnp.uint8)
    with pytest.raises(jax.errors.JaxRuntimeError, match="wrong shapes"):
        jax.block_until_ready(matmul_int8(jnp.ones((1, depth)), w, jnp.ones(outs), None, "cpu"))


@pytest.mark.compiler
@pytest.mark.parametrize("used", [0, 1, 5, 8, 9])
def test_rows_of_padding_are_skipped(used):
    x, w = operands(8, 64, 48)
    x[used:] = np.nan
    w8, scales = quantise(w)
    got = jax.jit(matmul_int8, static_argnums=4)(x, keep(w8, "cpu"), scales, jnp.int32(used), "cpu")
    np.testing.assert_array_equal(np.asarray(got)[:used], oracle(x[:used], w) if used else got[:0])
    assert not np.asarray(got)[used:].any()
