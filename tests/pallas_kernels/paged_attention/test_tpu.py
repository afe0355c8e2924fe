"""The TPU kernel: what it computes in interpret mode, what it does not serve, that it lowers for a TPU."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import EngineConfig
from jaxserve.engine.topology import chip, compiler_mesh
from jaxserve.pallas_kernels.paged_attention import (
    PLAIN,
    AttentionMeta,
    Masking,
    PoolShape,
    paged_attention,
    pool_shape,
    tpu,
    why_not,
)
from jaxserve.pallas_kernels.paged_attention.tuning.tpu import (
    TABLE_BYTES,
    Sizes,
    default_block_size,
    sizes,
    table_bytes,
)

from .cases import BF16, CASES, Case, make, oracle
from .test_values import TOLERANCE, check, run

interpreted = pytest.mark.usefixtures("interpreted_tpu")

PADDING_BETWEEN_ROWS = ["mixed gap"]
"""Which an engine's batches do not have."""


def reason(case: Case) -> str:
    """Why the kernel does not serve a case."""
    given = {"sinks": case.sinks or None, "alibi": case.alibi or None}
    return tpu.why_not(jnp.uint16 if case.bits else case.dtype, case.dim, **given)


SERVED = {case.name: case for case in CASES if not reason(case) and case.name not in PADDING_BETWEEN_ROWS}
QUICK = [
    "decode padded",
    "decode long window",
    "mixed many rows",
    "only padding rows",
    "gqa 3",
    "head size 80",
    "block size 256",
    "window and soft cap",
    "bf16",
    "rotary",
]
"""All of SERVED hold; each takes seconds to compile, and these have all there is among them."""


def test_what_is_not_served():
    assert [case.name for case in CASES if reason(case)] == [
        "decode long sinks",
        "decode long alibi bf16",
        "head size 256",
        "sinks",
        "sinks and window",
        "alibi",
        "everything",
        "bf16 bits",
        "f16 bits",
        "rotary bf16 bits",
        "rotary f16 bits",
    ]


@interpreted
@pytest.mark.parametrize("name", QUICK)
def test_case(name):
    check("tpu", make(SERVED[name]))


@interpreted
def test_a_query_head_for_each_of_many_kv_heads():
    """Which are padded to two in float32, or a program would have too few.

    Two sequences: interpret mode forgets which of two buffers is next when a program of other heads begins.
    """
    check("tpu", make(Case("no groups", (1, 9), (20, 7), heads=6, kv_heads=6, pad_rows=2)))
    lower(64, 8, 6, 6, 96, jnp.float32, layers=1)


@interpreted
@pytest.mark.parametrize("dtype", [jnp.float32, BF16], ids=str)
def test_what_another_sequence_left_behind_is_not_read(dtype):
    x = make(Case("stale", (1, 1, 7), (39, 2, 18), pad_rows=2, pad_seqs=1, dtype=dtype))
    x.pool = jnp.where(x.pool == jnp.asarray(1000.0, dtype), jnp.asarray(jnp.nan, dtype), x.pool)
    out, _ = run("tpu", x)
    want = oracle(x)[0][np.asarray(x.meta.row_pos) >= 0]
    np.testing.assert_allclose(out, want, rtol=0, atol=TOLERANCE[x.q.dtype])


@pytest.mark.parametrize("name", ["sinks", "alibi", "f16 bits"])
def test_what_is_not_served_is_refused(name):
    x = make(next(case for case in CASES if case.name == name))
    with pytest.raises(ValueError, match="on a TPU: it"):
        run("tpu", x)


def test_what_it_computes():
    kinds = ("bfloat16", "float32", "float16", "int8")
    assert [kind for kind in kinds if not why_not("tpu", kind, 128)] == ["bfloat16", "float32"]
    assert [dim for dim in (64, 80, 128, 192) if why_not("tpu", "bfloat16", dim)] == [192]
    assert [alibi for alibi in (False, True) if why_not("tpu", "bfloat16", 128, alibi)] == [True]
    assert not why_not("xla", "float16", 256, alibi=True)


def test_heads_are_padded_to_tiles_on_each_device():
    def pool(kv_heads, dim, dtype, shards=1):
        shape = PoolShape(7, kv_heads, 32, dim, jnp.dtype(dtype))
        return pool_shape(shape, "tpu", shards).shape

    assert pool(8, 128, BF16) == (7, 32, 16, 128)
    assert pool(3, 64, BF16) == (7, 32, 8, 128)
    assert pool(10, 80, BF16) == (7, 32, 32, 128)
    assert pool(6, 128, jnp.float32) == (7, 32, 16, 128)
    assert pool(12, 128, BF16, shards=4) == (7, 32, 32, 128)
    assert pool(8, 128, BF16, shards=8) == (7, 32, 16, 128)


def test_block_tables_fit_scalar_memory():
    assert default_block_size(128, 131072) == 128
    assert default_block_size(256, 131072) == 256
    assert default_block_size(128, 2**20) == 1024
    assert default_block_size(10**6, 100) == 128  # no size would do
    for seqs, length in ((256, 8192), (100, 40_000), (512, 131072)):
        assert table_bytes(seqs, -(-length // default_block_size(seqs, length))) <= TABLE_BYTES


def test_sizes_of_its_work():
    llama = partial(sizes, group=4, token_bytes=4096, table_width=1024)
    assert llama(128, 128, block_size=128) == Sizes(4, 8)
    assert llama(2048, 128, block_size=128) == Sizes(4, 32)
    assert llama(2048, 128, block_size=16) == Sizes(16, 32)
    assert llama(2048, 128, block_size=1024) == Sizes(1, 32)
    assert llama(4, 4, block_size=128) == Sizes(4, 4)
    assert sizes(2048, 128, 24, 4096, 128, 2) == Sizes(2, 8)


LLAMA_8B, LLAMA_70B_OF_4, SMOLLM2 = (32, 8, 128), (16, 2, 128), (9, 3, 64)
"""Heads, KV heads and the size of one."""
CONTEXT, BLOCKS = 4096, 1024


def a_tpu():
    """jax asks which one the kernel is for."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def trace(where, rows, seqs, heads, kv_heads, dim, dtype=BF16, masking=PLAIN, block_size=128, layers=2):
    """Layers in a row, each with its own pool, as in a model's step."""

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def step(pools, q, kv, meta):
        for i, pool in enumerate(pools):
            out, pools[i] = paged_attention(
                q, kv, kv, pool, meta, scale=0.1, masking=masking, implementation="tpu"
            )
            q = q + out
        return pools, q

    shape = pool_shape(PoolShape(BLOCKS, kv_heads, block_size, dim, jnp.dtype(dtype)), "tpu")
    pools = [array(*shape.shape, dtype=dtype)] * layers
    tables = array(seqs, CONTEXT // block_size)
    meta = AttentionMeta(tables, array(seqs), array(seqs), array(seqs), array(rows), array(rows))
    q, kv = array(rows, heads, dim, dtype=dtype), array(rows, kv_heads, dim, dtype=dtype)
    return jax.jit(step, donate_argnums=0).trace(pools, q, kv, meta)


def lower(*args, **options) -> str:
    with a_tpu():
        return trace(None, *args, **options).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("rows", [8, 64, 512])
@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B_OF_4, SMOLLM2], ids=str)
def test_a_layer_is_two_kernels(shape, rows):
    text = lower(rows, min(rows, 64), *shape)
    names = set(re.findall(r'kernel_name = "(\w+)"', text))
    assert names == {"write_kv", "ragged_paged_attention_kernel"}
    assert "stablehlo.while" not in text and "stablehlo.scatter" not in text


@pytest.mark.parametrize("dtype", [BF16, jnp.float32], ids=str)
@pytest.mark.parametrize("masking", [Masking(100), Masking(0, 30.0)], ids=str)
def test_every_kind_of_masking(masking, dtype):
    lower(64, 8, 8, 2, 96, dtype, masking, 16, layers=1)


@pytest.mark.aot("tpu")
@pytest.mark.parametrize("device", ["v5e", "v6e"])
@pytest.mark.parametrize("rows", [8, 64, 512])
@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B_OF_4, SMOLLM2, (32, 32, 80)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, jnp.float32], ids=str)
def test_it_fits_a_tpu_and_leaves_pools_in_place(dtype, shape, rows, device):
    mesh = compiler_mesh(EngineConfig(), chip(device))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        where = NamedSharding(mesh, PartitionSpec())
        program = trace(where, rows, min(rows, 64), *shape, dtype).lower().compile()
    memory, (pools, *_), _ = program.memory_analysis(), *program.in_avals
    nbytes = sum(pool.size * pool.dtype.itemsize for pool in pools)
    assert memory.alias_size_in_bytes >= nbytes
    assert memory.temp_size_in_bytes < 2**24 < nbytes / 2
    assert " while(" not in program.as_text() and " scatter(" not in program.as_text()
