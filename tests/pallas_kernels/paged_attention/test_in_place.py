"""A donated pool is written where it is: no implementation makes a copy or a temporary of its size."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxserve.pallas_kernels.paged_attention import PoolShape, empty_pool, paged_attention, ragged_meta
from jaxserve.pallas_kernels.paged_attention.pool import write

LAYERS, ROWS, SEQS, HEADS = 3, 8, 4, 4


def attend_layers(pools, q, k, v, meta, implementation="xla"):
    for i, pool in enumerate(pools):
        out, pools[i] = paged_attention(q, k, v, pool, meta, scale=0.1, implementation=implementation)
        q = q + out
    return pools, q


attend_natively = partial(attend_layers, implementation="cpu")


def write_layers(pools, q, k, v, meta):
    return [write(pool, k, v, meta) for pool in pools], q


NATIVE = pytest.param(attend_natively, marks=pytest.mark.compiler, id="native")
STEPS = [attend_layers, NATIVE, write_layers]


def compiled(step, bits: bool, dtype, blocks: int = 4096, number=None):
    shape = PoolShape(blocks, 2, 16, 32, jnp.dtype(number or dtype), bits)

    def arrays():
        meta = ragged_meta(
            jnp.zeros((SEQS, 16), jnp.int32), jnp.zeros(SEQS, jnp.int32), jnp.ones(SEQS, jnp.int32), ROWS
        )
        kv = jnp.zeros((ROWS, shape.kv_heads, shape.head_dim), dtype)
        pools = [empty_pool(shape)] * LAYERS
        return pools, jnp.zeros((ROWS, HEADS, shape.head_dim), dtype), kv, kv, meta

    step = jax.jit(step, donate_argnums=0)
    return step.lower(*jax.eval_shape(arrays)).compile(), shape


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float32, False), (jnp.bfloat16, True)], ids=str)
def test_layers_leave_their_pools_in_place(step, dtype, bits):
    program, shape = compiled(step, bits, dtype)
    memory, pool_bytes = program.memory_analysis(), shape.num_blocks * shape.block_bytes
    assert memory.alias_size_in_bytes >= LAYERS * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 2
    assert not pool_sized_copies(program.as_text(), shape)


@pytest.mark.parametrize("step", [attend_layers, write_layers])
@pytest.mark.parametrize("number", [jnp.int8, jnp.float8_e4m3fn], ids=str)
def test_pools_of_8_bits_stay_in_place_with_their_scales(step, number):
    program, shape = compiled(step, True, jnp.bfloat16, number=number)
    memory, pool_bytes = program.memory_analysis(), shape.num_blocks * shape.block_bytes
    assert memory.alias_size_in_bytes >= LAYERS * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 2
    for array in jax.tree.leaves(shape.arrays):
        assert not copies_of_size(program.as_text(), array.size)


@pytest.mark.parametrize("step", STEPS)
def test_temporaries_do_not_grow_with_the_pool(step):
    small, large = (compiled(step, True, jnp.bfloat16, blocks)[0].memory_analysis() for blocks in (512, 4096))
    assert large.temp_size_in_bytes == pytest.approx(small.temp_size_in_bytes, rel=0.05)


def pool_sized_copies(hlo: str, shape: PoolShape) -> list[str]:
    """Instructions of the optimised program that make another array with as many elements as a pool."""
    return copies_of_size(hlo, math.prod(shape.shape))


def copies_of_size(hlo: str, size: int) -> list[str]:
    made = re.findall(r"\w+\[([\d,]+)\]\S* (copy|copy-start|convert|transpose|broadcast)\(", hlo)
    return [op for dims, op in made if math.prod(map(int, dims.split(","))) == size]


def test_a_copy_would_be_found():
    def reads_the_old_pool_late(pools, q, k, v, meta):
        new, q = write_layers(pools, q, k, v, meta)
        return new, [old + now for old, now in zip(pools, new, strict=True)]

    program, shape = compiled(reads_the_old_pool_late, True, jnp.bfloat16)
    assert pool_sized_copies(program.as_text(), shape)
