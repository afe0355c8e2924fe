"""The GPU kernels lower for CUDA on a machine without a GPU, for the shapes that are served."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxserve.pallas_kernels.paged_attention import AttentionMeta, Masking, PoolShape, paged_attention
from jaxserve.pallas_kernels.paged_attention.tuning.gpu import num_splits, variant

LLAMA_8B, SMOLLM2 = (32, 8, 128), (9, 3, 64)
CONTEXT, BLOCK_SIZE = 4096, 16
PLAIN = Masking()


def h200():
    """Newer releases of jax ask which device the kernel is for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("tensor",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def trace(
    rows,
    seqs,
    heads,
    kv_heads,
    dim,
    dtype=jnp.bfloat16,
    masking=PLAIN,
    extras=(),
    implementation="gpu",
    sharded=False,
    kv_dtype=None,
):
    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    def attend(q, kv, pool, meta, *per_head):
        options = dict(zip(extras, per_head, strict=True), scale=0.1, masking=masking)
        return paged_attention(q, kv, kv, pool, meta, **options, implementation=implementation)

    meta = AttentionMeta(
        array(seqs, CONTEXT // BLOCK_SIZE), array(seqs), array(seqs), array(seqs), array(rows), array(rows)
    )
    q, kv = array(rows, heads, dim, dtype=dtype), array(rows, kv_heads, dim, dtype=dtype)
    pool = PoolShape(1024, kv_heads, BLOCK_SIZE, dim, jnp.dtype(kv_dtype or dtype)).arrays
    per_head = [array(heads, dtype=jnp.float32) for _ in extras]
    if sharded:
        attend = over_a_mesh(attend)
    return jax.jit(attend).trace(q, kv, pool, meta, *per_head)


def over_a_mesh(attend):
    """As a model has it, each device with its own heads: on a machine with one device, all of them."""
    mesh = None  # that of `h200`
    if jax.__version_info__ < (0, 11):
        mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    pool = PartitionSpec(None, None, "tensor")
    specs = {"in_specs": (heads, heads, pool, whole), "out_specs": (heads, pool)}
    return jax.shard_map(attend, mesh=mesh, check_vma=False, **specs)


def lower(*args, **kwargs) -> str:
    with h200():
        return trace(*args, **kwargs).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text: str) -> list[str]:
    """Names of the paged-attention kernels, as profiles show them."""
    assert "stablehlo.while" not in text
    calls = re.findall(r"stablehlo\.custom_call @\S*triton.*", text)
    names = [re.search(r"paged_attention_q\d+_m\d+_t\d+_s\d+", call) for call in calls]
    return [name.group() for name in names if name] + re.findall(r"custom_call @mosaic_gpu", text)


@pytest.mark.parametrize("implementation", ["gpu", "mosaic"])
@pytest.mark.parametrize("shape", [LLAMA_8B, SMOLLM2], ids=["llama 8b", "smollm2"])
def test_decode_is_one_kernel(shape, implementation):
    assert len(kernels(lower(64, 64, *shape, implementation=implementation))) == 1


@pytest.mark.parametrize("implementation", ["gpu", "mosaic"])
@pytest.mark.parametrize("shape", [LLAMA_8B, SMOLLM2], ids=["llama 8b", "smollm2"])
def test_a_mixed_step_is_two(shape, implementation):
    assert len(kernels(lower(2048, 64, *shape, implementation=implementation))) == 2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32], ids=str)
@pytest.mark.parametrize("dim", [80, 256])
def test_other_types_and_head_sizes(dtype, dim):
    assert len(kernels(lower(64, 8, 8, 2, dim, dtype=dtype))) == 2


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(7, 1, 64), (8, 8, 192), (48, 1, 256)], ids=str)
def test_other_types_and_heads_in_mosaic(dtype, heads):
    assert len(kernels(lower(64, 8, *heads, dtype=dtype, implementation="mosaic"))) == 2


@pytest.mark.parametrize("implementation", ["gpu", "mosaic"])
def test_every_kind_of_masking(implementation):
    options = {"masking": Masking(512, 30.0), "extras": ("sinks", "alibi"), "implementation": implementation}
    assert len(kernels(lower(64, 8, *LLAMA_8B, **options))) == 2


@pytest.mark.parametrize("implementation", ["gpu", "mosaic"])
def test_in_the_shard_map_of_a_mesh(implementation):
    assert len(kernels(lower(64, 8, *LLAMA_8B, implementation=implementation, sharded=True))) == 2


@pytest.mark.parametrize("kv", [jnp.int8, jnp.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32], ids=str)
def test_kv_of_8_bits(kv, dtype):
    options = {"dtype": dtype, "masking": Masking(512, 30.0), "extras": ("sinks", "alibi"), "kv_dtype": kv}
    assert len(kernels(lower(64, 8, *LLAMA_8B, **options))) == 2
    assert len(kernels(lower(64, 8, *LLAMA_8B, dtype=dtype, kv_dtype=kv, sharded=True))) == 2


@pytest.mark.parametrize("kv", [jnp.int8, jnp.float8_e4m3fn], ids=str)
def test_kv_of_8_bits_on_a_tpu(kv):
    traced = trace(64, 8, *LLAMA_8B, kv_dtype=kv, implementation="xla")
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert re.search(r"1024x2x8x16x128xu?i8", text) and "tpu_custom_call" not in text


def test_float32_is_not_computed_in_tf32():
    jaxpr = str(trace(64, 8, *LLAMA_8B, dtype=jnp.float32).jaxpr)
    assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 4


def test_few_long_sequences_split_their_contexts():
    assert [num_splits(8, length, 64) for length in (16, 256, 4096, 131072)] == [1, 4, 16, 16]
    assert [num_splits(programs, 8192, 64) for programs in (1, 64, 200, 4096)] == [16, 4, 1, 1]


def test_a_head_size_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="head size 512"):
        variant("rows", 4, 512, 2)
