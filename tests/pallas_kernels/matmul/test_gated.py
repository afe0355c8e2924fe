"""A product whose halves gate each other, beside the product and the activation apart."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve.models.layers.activation import ACTIVATIONS, GATES
from jaxserve.pallas_kernels.matmul import gated, keep, matmul, matmul_int8, quantise

pytestmark = pytest.mark.compiler
NUMBERS = [np.float32, ml_dtypes.bfloat16, np.float16, np.int8]


def both(x, w, number, activation, used=None):
    """(gated in one call, the same from the whole product) of w float32 [2 * width, depth]."""
    outs, scales = len(w), None
    if number == np.int8:
        w, scales = quantise(w)
        kept = keep(w, "cpu")
        whole = matmul_int8(x, kept, scales.reshape(outs), used, "cpu")
    else:
        kept = keep(w.astype(number), "cpu")
        whole = matmul(x, kept, outs, used, "cpu")
    one = gated(jnp.asarray(x), kept, outs, scales, GATES[activation], used, "cpu")
    gate, up = jnp.split(whole, 2, axis=1)
    return np.asarray(one), np.asarray(ACTIVATIONS[activation](gate) * up)


def operands(rows, depth, width):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((2 * width, depth), np.float32) * np.float32(depth**-0.5)
    return 3 * rng.standard_normal((rows, depth), np.float32), w


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("number", NUMBERS, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(1, 576, 1536), (5, 100, 16), (64, 70, 80), (250, 64, 48)], ids=str)
def test_value(shape, number, activation):
    one, apart = both(*operands(*shape), number, activation)
    # 1 + tanh(x) has no relative precision far below zero, in XLA neither
    np.testing.assert_allclose(one, apart, rtol=2e-6, atol=1e-5 if activation.startswith("gelu") else 1e-6)


def test_far_from_zero_a_gate_is_open_or_shut():
    gate, up = np.eye(16, dtype=np.float32), np.ones((16, 16), np.float32)
    x = np.diag(np.array([-1e4, -200, -100, -80, 0, 80, 200, 1e4] * 2, np.float32))
    one, apart = both(x, np.concatenate([gate, up]), np.float32, "silu")
    np.testing.assert_allclose(one, apart, rtol=2e-6, atol=1e-28)


@pytest.mark.parametrize("activation", GATES)
def test_what_is_no_number_stays_none(activation):
    """nan"""
    gate, up = np.eye(16, dtype=np.float32), np.ones((16, 16), np.float32)
    x = np.ones((2, 16), np.float32)
    x[1, 3] = np.nan
    one, _ = both(x, np.concatenate([gate, up]), np.float32, activation)
    assert np.isfinite(one[0]).all() and np.isnan(one[1]).all()


def test_rows_of_padding_are_zeros():
    x, w = operands(6, 64, 32)
    x[4:] = np.nan
    one, apart = both(x, w, ml_dtypes.bfloat16, "silu", jnp.int32(4))
    np.testing.assert_allclose(one, apart, rtol=2e-6, atol=1e-6)
    assert not one[4:].any()


def test_a_half_that_is_no_whole_tile_is_left_to_others():
    x, w = operands(2, 64, 24)
    assert gated(jnp.asarray(x), keep(w, "cpu"), 48, None, "silu", None, "cpu") is None
    assert gated(jnp.asarray(x), jax.device_put(w), 48, None, "silu", None, "xla") is None
