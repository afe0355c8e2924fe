"""Every implementation against the float64 oracle, over the case table and over random ragged batches."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention import Scaled, paged_attention
from jaxserve.pallas_kernels.paged_attention.pool import quantise

from .cases import BF16, CASES, FP8, IN_8_BITS, INT8, Case, Inputs, make, numbers, oracle, plain, stored_for

NATIVE = pytest.param("cpu", marks=pytest.mark.compiler)
FOR_8_BITS = ["reference", "xla", "gpu"]
IMPLEMENTATIONS = [*FOR_8_BITS, NATIVE]
# nearly all of the time is compilation, and the arrays are tiny
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # the option is gone in newer releases
    QUICK_COMPILE["xla_cpu_use_fusion_emitters"] = False

TOLERANCE = {
    # a few hundred float32 roundings (eps 6e-8) of numbers of size 1, and exp2 in place of exp
    jnp.dtype(jnp.float32): 1e-5,
    # one rounding of the weights (half an ulp, 2**-9) and one of the output, both of numbers up to about 3
    jnp.dtype(jnp.bfloat16): 2 * 3 * 2**-9,
    jnp.dtype(jnp.float16): 2 * 3 * 2**-12,
}


def run(implementation: str, x: Inputs, options=QUICK_COMPILE) -> tuple[np.ndarray, Any]:
    """(out of the live rows in float64, pool without the dummy block)"""
    attend = jax.jit(partial(paged_attention, **x.options, implementation=implementation, interpret=True))
    args = (x.q, x.k, x.v, stored_for(implementation, x.pool), x.meta, x.rotation)
    out, pool = attend.lower(*args).compile(options)(*args)
    assert (out.dtype, out.shape) == (x.q.dtype, x.q.shape)
    live = np.asarray(x.meta.row_pos) >= 0
    pool = plain(implementation, pool, x.pool)
    return np.asarray(out, np.float64)[live], jax.tree.map(lambda array: array[1:], pool)


def tolerance(x: Inputs) -> float:
    """With 8 bits, weights with scales in them are rounded to bfloat16 where numbers have 16 bits. A rotation
    that is rounded otherwise may move a number of a key by a step, and so a logit by about 0.01."""
    if not isinstance(x.pool, Scaled):
        return TOLERANCE[x.dtype]
    kind = jnp.dtype(BF16) if x.dtype.itemsize == 2 else x.dtype
    return TOLERANCE[kind] + (0.01 if x.rotation else 0.0)


def check(implementation: str, x: Inputs, **how) -> None:
    out, pool = run(implementation, x, **how)
    want, want_pool = oracle(x)
    want = want[np.asarray(x.meta.row_pos) >= 0]
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerance(x))
    want_pool = jax.tree.map(lambda array: array[1:], want_pool)
    if x.rotation is None:
        for array, wanted in zip(*map(jax.tree.leaves, (pool, want_pool)), strict=True):
            assert array.tobytes() == wanted.tobytes()
    else:  # whose sums of two products are not rounded alike
        pools = (numbers(each, x.dtype) for each in (pool, want_pool))
        near = {"rtol": 2 * jnp.finfo(x.dtype).eps, "atol": 1e-6}
        if isinstance(pool, Scaled):  # a step of 8 bits, of numbers below 8
            near = {"rtol": jnp.finfo(FP8).eps} if pool.numbers.dtype == np.uint8 else {"atol": 8 / 127}
        np.testing.assert_allclose(*pools, **near)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case, implementation):
    check(implementation, make(case))


@pytest.mark.parametrize("implementation", FOR_8_BITS)
@pytest.mark.parametrize("case", IN_8_BITS, ids=str)
def test_case_in_8_bits(case, implementation):
    check(implementation, make(case))


@pytest.mark.parametrize("number", [INT8, FP8])
def test_small_values_of_8_bits_keep_their_digits_in_float16(number):
    """Weights times their scales would be subnormal in float16."""
    x = make(Case("small", (1, 9), (20, 7), dtype=jnp.float16, pool_dtype=number, pad_rows=2))
    x.v = (x.v * 1e-4).astype(x.v.dtype)
    x.pool = x.pool._replace(scales=x.pool.scales.at[:, 1].multiply(1e-4))
    out, _ = run("gpu", x)
    want = oracle(x)[0][np.asarray(x.meta.row_pos) >= 0]
    assert abs(out - want).max() < 0.006 * abs(want).max()


@pytest.mark.parametrize("storage", [jnp.int8, jnp.uint8])
def test_rows_too_small_for_a_scale_are_zeros(storage):
    made = quantise(jnp.asarray([[1e-36, -1e-36], [1e-40, 0.0], [0.0, 0.0]]), jnp.dtype(storage))
    sign = 0x80 if storage == jnp.uint8 else 0  # of zero, in fp8
    assert not (np.asarray(made.numbers) & ~np.array(sign, storage)).any()
    assert np.isfinite(made.scales).all()


@pytest.mark.parametrize("implementation", ["cpu", "mosaic", "tpu"])
def test_who_has_no_8_bits_says_so(implementation):
    x = make(IN_8_BITS[0])
    with pytest.raises(ValueError, match="of the weights' type, not of 8 bits"):
        paged_attention(x.q, x.k, x.v, x.pool, x.meta, **x.options, implementation=implementation)


@st.composite
def batches(draw, pool_dtypes=(None,)) -> Case:
    singles = draw(st.integers(0, 3))
    chunks = draw(st.lists(st.integers(2, 20), max_size=2))
    lens = (*[1] * singles, *chunks)
    starts = tuple(draw(st.integers(0, 50)) for _ in lens)
    pads = {name: draw(st.integers(0, 3)) for name in ("pad_seqs", "pad_rows", "extra_width")}
    if not lens:
        pads["pad_seqs"] = pads["pad_rows"] = 1
    if chunks:  # more rows than sequences
        pads["pad_rows"] = max(pads["pad_rows"], len(lens) + pads["pad_seqs"] + 1 - sum(lens))
    number = draw(st.sampled_from(pool_dtypes))
    return Case("drawn", lens, starts, window=draw(st.sampled_from([0, 0, 1, 7])), pool_dtype=number, **pads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(case=batches(), seed=st.integers(0, 2**16))
def test_random_batches(implementation, case, seed):
    check(implementation, make(case, seed), options=None if implementation == "xla" else QUICK_COMPILE)


@pytest.mark.parametrize("implementation", ["xla", "gpu"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(case=batches(pool_dtypes=(INT8, FP8)), seed=st.integers(0, 2**16))
def test_random_batches_in_8_bits(implementation, case, seed):
    check(implementation, make(case, seed))


@st.composite
def layers(draw) -> Case:
    """Batches of any layer, long contexts among them."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    singles = draw(st.integers(0, 4))
    chunks = draw(st.lists(st.integers(2, 60), min_size=not singles, max_size=2))
    lens = (*[1] * singles, *chunks)
    dtype = draw(st.sampled_from([BF16, BF16, jnp.float32, jnp.float16]))
    sizes = {
        "dim": draw(st.sampled_from([8, 20, 32, 40, 64, 80, 128])),
        "block_size": draw(st.sampled_from([2, 16, 20, 32, 48, 64, 128])),
    }
    options = {name: draw(st.booleans()) for name in ("sinks", "alibi", "rotary")}
    options["window"] = draw(st.sampled_from([0, 0, 3, 100, 300]))
    options["soft_cap"] = draw(st.sampled_from([0.0, 0.0, 4.0]))
    starts = tuple(draw(st.sampled_from([0, 1, 15, 30, 63, 200, 255, 300, 600])) for _ in lens)
    pads = {"pad_seqs": draw(st.integers(0, 2)), "pad_rows": len(lens) + 3 if chunks else 0}
    return Case(
        "drawn", lens, starts, group * kv_heads, kv_heads, dtype=dtype, bits=True, **sizes, **options, **pads
    )


@pytest.mark.compiler
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=layers(), seed=st.integers(0, 2**16))
def test_random_layers_in_cpp(case, seed):
    check("cpu", make(case, seed))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "layer", [{}, {"dtype": BF16, "bits": True, "block_size": 32}], ids=["float32", "bf16 bits"]
)
def test_what_another_sequence_left_behind_is_not_read(implementation, layer):
    """NaN in slots that hold none of a sequence's tokens stays there."""
    x = make(Case("stale", (1, 1, 7), (39, 2, 18), pad_rows=2, pad_seqs=1, **layer))
    stale, nan = (np.asarray(number, x.q.dtype).view(x.pool.dtype) for number in (1000.0, np.nan))
    x.pool = jnp.where(x.pool == stale, nan, x.pool)
    holds_what_is_seen(implementation, x)


@pytest.mark.parametrize("implementation", FOR_8_BITS)
@pytest.mark.parametrize("number", [INT8, FP8])
def test_what_another_sequence_left_behind_is_not_read_in_8_bits(implementation, number):
    """Neither NaN among the numbers nor as a scale."""
    x = make(Case("stale", (1, 1, 7), (39, 2, 18), pad_rows=2, pad_seqs=1, pool_dtype=number))
    stale = x.pool.scales == x.pool.scales.max()
    nan = np.asarray(np.nan, FP8).view(np.uint8).astype(x.pool.numbers.dtype)
    numbers = jnp.where(stale[..., None], nan, x.pool.numbers)
    x.pool = Scaled(numbers, jnp.where(stale, np.nan, x.pool.scales))
    holds_what_is_seen(implementation, x)


def holds_what_is_seen(implementation: str, x: Inputs) -> None:
    out, _ = run(implementation, x)
    want = oracle(x)[0][np.asarray(x.meta.row_pos) >= 0]
    np.testing.assert_allclose(out, want, rtol=0, atol=TOLERANCE[x.q.dtype])
