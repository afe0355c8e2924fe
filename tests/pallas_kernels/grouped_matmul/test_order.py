"""Tokens in the order of their experts and back; and all of a mixture of experts, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.pallas_kernels.grouped_matmul import by_expert, grouped_matmul


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(1, 8), (40, 4), (700, 3)]),
    experts=st.sampled_from([1, 9, 128]),
    seed=st.integers(0, 2**16),
)
def test_rows_lie_by_expert_and_in_order(shape, experts, seed):
    """Ids of no expert, on both sides, come last."""
    ids = np.random.default_rng(seed).integers(-1, experts + 2, shape).astype(np.int32)
    order = jax.jit(by_expert, static_argnums=1)(ids, experts)
    flat = np.where((ids < 0) | (ids >= experts), experts, ids).ravel()
    want = np.argsort(flat, kind="stable")
    np.testing.assert_array_equal(order.token, want // shape[1])
    row = np.asarray(order.row).ravel()
    np.testing.assert_array_equal(row[want], np.where(flat[want] < experts, np.arange(len(flat)), -1))
    np.testing.assert_array_equal(order.sizes, np.bincount(flat, minlength=experts + 1)[:experts])


def test_what_is_of_no_expert_adds_nothing():
    order = by_expert(jnp.array([[0, 5], [1, -1], [7, 7]]), 2)
    y = jnp.full((6, 3), jnp.nan).at[:2].set(jnp.array([[1.0, 2, 3], [4, 5, 6]]))
    out = order.sum(y, jnp.array([[0.5, 9.0], [2.0, 9.0], [9.0, 9.0]]))
    np.testing.assert_array_equal(out, [[0.5, 1, 1.5], [8, 10, 12], [0, 0, 0]])


def mixture(x, gate_up, down, ids, shares, implementation):
    """Each token through its experts, as a layer has it."""
    order = by_expert(ids, len(down))
    how = {"implementation": implementation, "interpret": True}
    gate, up = jnp.split(grouped_matmul(order.rows_of(x), gate_up, order.sizes, **how), 2, axis=1)
    return order.sum(grouped_matmul(jax.nn.silu(gate) * up, down, order.sizes, **how), shares)


@pytest.mark.parametrize("implementation", ["reference", "xla", "gpu", "tpu"])
@pytest.mark.parametrize("tokens, padding", [(1, 0), (50, 14)])
def test_a_mixture_of_experts(tokens, padding, implementation):
    rng = np.random.default_rng(tokens)
    experts, k, dim, width = 16, 4, 40, 24
    x = rng.standard_normal((tokens + padding, dim)).astype(np.float32)
    x[tokens:] = np.nan
    gate_up = rng.standard_normal((experts, 2 * width, dim)).astype(np.float32) / dim**0.5
    down = rng.standard_normal((experts, dim, width)).astype(np.float32) / width**0.5
    # never the first and the last: they are empty
    ids = np.stack([1 + rng.permutation(experts - 2)[:k] for _ in x]).astype(np.int32)
    shares = rng.dirichlet(np.ones(k), len(x)).astype(np.float32)

    want = np.zeros((tokens, dim))
    for token in range(tokens):
        for expert, share in zip(ids[token], shares[token], strict=True):
            gate, up = np.split(gate_up[expert].astype(np.float64) @ x[token], 2)
            want[token] += share * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))

    ids[tokens:] = -1  # padding has no expert: no weight is read for it
    got = jax.jit(mixture, static_argnums=5)(x, gate_up, down, ids, shares, implementation)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[:tokens], want, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(got[tokens:], 0.0)


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
def test_experts_on_several_devices_add_up(implementation):
    """Each device has some of them, and tells its own from others' by their numbers alone."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 16), np.float32)
    gate_up, down = (rng.standard_normal(shape, np.float32) / 4 for shape in [(6, 24, 16), (6, 16, 12)])
    ids = np.stack([rng.permutation(6)[:3] for _ in x]).astype(np.int32)
    ids[15:] = rng.permutation(4)[:3]  # the last device has nothing to do for these
    shares = rng.dirichlet(np.ones(3), 20).astype(np.float32)
    run = jax.jit(mixture, static_argnums=5)
    parts = [
        run(x, gate_up[first : first + 2], down[first : first + 2], ids - first, shares, implementation)
        for first in (0, 2, 4)
    ]
    want = run(x, gate_up, down, ids, shares, "reference")
    np.testing.assert_allclose(sum(parts), want, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(parts[2][15:], 0.0)
