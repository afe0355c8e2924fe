"""A new pool holds zeros, whatever its memory held before, and takes memory only when it is written to."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import PoolShape, empty_pool

pytestmark = pytest.mark.compiler


def make(shape: PoolShape) -> jax.Array:
    return jax.jit(lambda: empty_pool(shape, "cpu"))()


@pytest.mark.parametrize("blocks", [1, 3, 100, 5000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_zero_where_something_was_before(blocks, dtype):
    shape = PoolShape(blocks, 1, 16, 20, jnp.dtype(dtype), bits=True)
    for _ in range(5):
        pool = make(shape)
        assert pool.shape == shape.shape and pool.dtype == shape.storage
        assert not np.asarray(pool).any()
        written = jax.jit(lambda x: x + 1, donate_argnums=0)(pool)
        assert np.asarray(written).all()
        written.delete()


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_taken_when_it_is_written_to():
    shape = PoolShape(4096, 1, 64, 128, jnp.dtype(jnp.float32))  # 256 MiB
    make(shape._replace(num_blocks=1))
    before = resident()
    pool = jax.block_until_ready(make(shape))
    assert resident() - before < 2**26 < pool.nbytes
    pool = jax.jit(lambda x: x.at[7].set(1.0), donate_argnums=0)(pool)
    assert float(pool[7].min()) == 1.0 and not np.asarray(pool[8:]).any()
