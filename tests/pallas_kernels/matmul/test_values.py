"""Every implementation against float64, and what the native one promises about bits."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve import processor
from jaxserve.pallas_kernels.matmul import matmul

SHAPES = [(1, 576, 960), (2, 64, 5), (3, 70, 7), (4, 8, 3)]
SHAPES += [(5, 5000, 31), (33, 576, 100), (64, 1, 1), (130, 40, 50)]
"""Rows, depth, outputs: full tiles and blocks of the depth, and what is left over of each."""
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]



def operands(rows: int, depth: int, outs: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((rows, depth), np.float32), rng.standard_normal((outs, depth)).astype(dtype)


def run(x: np.ndarray, w: np.ndarray, implementation: str) -> np.ndarray:
    return np.asarray(jax.jit(partial(matmul, implementation=implementation))(x, w))


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
    x, w = operands(37, 2500, 70, dtype)
    whole = run(x, w, "cpu")
    for first, last in [(0, 1), (3, 5), (8, 12), (20, 29), (0, 36)]:
        assert run(x[first:last], w, "cpu").tobytes() == whole[first:last].tobytes()


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("rows", [1, 9], ids=["read in place", "widened first"])
def test_every_16_bit_number_is_widened_right(rows, dtype):
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    got = run(np.ones((rows, 1), np.float32), numbers[:, None], "cpu")
    want = numbers.astype(np.float32)
    want = np.where(np.abs(want) < np.finfo(np.float32).tiny, 0, want)  # as XLA takes subnormal floats
    np.testing.assert_array_equal(got, np.broadcast_to(want, (rows, 2**16)))


@pytest.mark.compiler
def test_weights_of_other_types_are_refused():
    with pytest.raises(TypeError, match="C\\+\\+ kernels read float32, bfloat16, float16, not int8"):
        matmul(jnp.ones((1, 4)), jnp.ones((2, 4), jnp.int8), "cpu")
