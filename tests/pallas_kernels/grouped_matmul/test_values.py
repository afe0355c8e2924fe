"""Every implementation against the float64 oracle, over the case table and over random groups."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.pallas_kernels.grouped_matmul import grouped_matmul
from jaxserve.pallas_kernels.grouped_matmul.tuning import gpu
from jaxserve.pallas_kernels.grouped_matmul.tuning.gpu import TABLE, num_splits, together, variant
from jaxserve.pallas_kernels.paged_attention.tuning.measure import QUICK_COMPILE

from .cases import BF16, CASES, Case, make, oracle

IMPLEMENTATIONS = ["reference", "xla", "xla of bits", "gpu", "tpu"]
TOLERANCE = {jnp.dtype(jnp.float32): 1.2e-7, jnp.dtype(BF16): 2**-8, jnp.dtype(jnp.float16): 2**-11}
"""One rounding of a number of the result's type."""


def run(implementation: str, case: Case, x, w, sizes, options=QUICK_COMPILE) -> np.ndarray:
    """The rows of experts."""
    if implementation == "xla of bits":
        implementation, w = "xla", w.view(np.uint16)
    multiply = partial(grouped_matmul, dtype=case.out_dtype, implementation=implementation, interpret=True)
    out = jax.jit(multiply).lower(x, w, sizes).compile(options)(x, w, sizes)
    assert (out.dtype, out.shape) == (case.out_dtype, (len(x), w.shape[1]))
    return np.asarray(out, np.float64)[: sum(sizes)]


def serves(implementation: str, case: Case) -> bool:
    if implementation == "tpu":
        return case.dtype != jnp.float16
    return implementation != "xla of bits" or case.dtype != jnp.float32


def check(implementation: str, case: Case, seed: int = 0, **how) -> None:
    x, w, sizes = make(case, seed)
    got, want = run(implementation, case, x, w, sizes, **how), oracle(x, w, sizes)
    # sums of as many roundings as numbers grow with their root; the rounding of the result is one more
    exact = 1.2e-7 * (case.depth + 64)
    np.testing.assert_allclose(got, want, rtol=TOLERANCE[jnp.dtype(case.out_dtype)], atol=exact)


SERVED = [(name, case) for name in IMPLEMENTATIONS for case in CASES if serves(name, case)]


@pytest.mark.parametrize("implementation, case", SERVED, ids=str)
def test_case(implementation, case):
    check(implementation, case)


@st.composite
def groups(draw) -> Case:
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 1, 2, 7, 16, 17, 64, 90]), min_size=1, max_size=9))
    pad = draw(st.integers(0 if sum(sizes) else 1, 9))
    shape = {"depth": draw(st.integers(1, 300)), "outs": draw(st.integers(1, 200))}
    dtype = draw(st.sampled_from([BF16, jnp.float32]))
    return Case("drawn", tuple(sizes), pad_rows=pad, dtype=dtype, **shape)


@pytest.mark.parametrize("implementation", ["xla", "gpu", "tpu"])
@settings(max_examples=5, deadline=None, derandomize=True)
@given(case=groups(), seed=st.integers(0, 2**16))
def test_random_groups(implementation, case, seed):
    check(implementation, case, seed)


def test_weights_in_parts_that_the_cache_holds(monkeypatch):
    monkeypatch.setattr(gpu, "CACHED", 5 * 64 * 40 * 2)  # 5 of 18 tiles of outputs
    check("gpu", Case("wide", (2, 1, 0, 40), depth=40, outs=1100, dtype=BF16))


def test_a_program_of_the_gpu_writes_no_rows_but_its_own():
    """Rows of others would have what the last program wrote; past them all it is seen."""
    x, w, sizes = make(Case("padded", (3, 0, 17), pad_rows=40))
    out = jax.jit(partial(grouped_matmul, implementation="gpu", interpret=True))(np.nan_to_num(x), w, sizes)
    assert np.isnan(out[20:]).all() and not np.isnan(out[:20]).any()


def test_float16_is_refused_on_a_tpu():
    case = Case("float16", (2, 1), dtype=jnp.float16)
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        run("tpu", case, *make(case))


def test_sizes_of_the_gpu_kernel():
    assert [variant(rows, 2).rows for rows in (0.1, 16, 17, 64, 500)] == [16, 16, 64, 64, 128]
    assert {size for _, size in TABLE} == {2, 4}
    # a row of Mixtral 8x7B: two experts, 4096 outputs, a depth of 14336
    assert num_splits(2 * 64, 112) == 2
    assert [num_splits(programs, 16) for programs in (1, 60, 264, 4000)] == [4, 4, 1, 1]
    assert together(12, 128 * 2048 * 2) == 12 and together(224, 128 * 4096 * 2) == 8
