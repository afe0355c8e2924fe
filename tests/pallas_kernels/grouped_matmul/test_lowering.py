"""The kernels lower for CUDA and for TPUs on a machine that has neither, in the shapes of known models."""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxserve.pallas_kernels.grouped_matmul import grouped_matmul

from .aot_report import DEEPSEEK, MIXTRAL, ODD, QWEN, layer

BF16 = jnp.bfloat16


def target(platform: str):
    """Newer releases of jax ask which device the kernel is for."""
    if platform == "cuda" and jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh

    kind = {"cuda": ("NVIDIA H200", 132, "gpu"), "tpu": ("TPU v6 lite", 1, "tpu")}[platform]
    device = AbstractDevice(device_kind=kind[0], num_cores=kind[1], platform=kind[2])
    mesh = AbstractMesh((1,), ("tensor",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def over_a_mesh(layer):
    """Each device with its own experts: on a machine with one device, all of them."""
    mesh = None  # that of `target`
    if jax.__version_info__ < (0, 11):
        mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    mine, whole = PartitionSpec("tensor"), PartitionSpec()
    in_specs = (whole, mine, mine, whole, whole)

    def part(x, gate_up, down, ids, shares):
        ids = ids - jax.lax.axis_index("tensor") * len(down)
        return jax.lax.psum(layer(x, gate_up, down, ids, shares), "tensor")

    return jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=whole, check_vma=False)


def trace(experts, tokens, implementation, dtype=BF16, sharded=False):
    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    weights = (
        array(experts.count, 2 * experts.width, experts.dim),
        array(experts.count, experts.dim, experts.width),
    )
    pairs = array(tokens, experts.k, dtype=jnp.int32), array(tokens, experts.k, dtype=jnp.float32)
    multiply = partial(layer, implementation=implementation)
    jitted = jax.jit(over_a_mesh(multiply) if sharded else multiply)
    return jitted.trace(array(tokens, experts.dim), *weights, *pairs)


def lower(*args, platform="cuda", **options) -> str:
    with target(platform):
        return trace(*args, **options).lower(lowering_platforms=(platform,)).as_text()


def names(text: str) -> list[str]:
    """Of the kernels, as profiles show them."""
    calls = re.findall(r"stablehlo\.custom_call @\S*triton.*", text)
    return [re.search(r"grouped_matmul_m\d+_n\d+_k\d+_s\d+", call).group() for call in calls]


@pytest.mark.parametrize("dtype", [BF16, jnp.float16, jnp.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2048])
@pytest.mark.parametrize("experts", [QWEN, MIXTRAL, DEEPSEEK, ODD], ids=str)
def test_a_product_is_one_kernel_on_a_gpu(experts, tokens, dtype):
    text = lower(experts, tokens, "gpu", dtype=dtype)
    assert len(names(text)) == 2
    assert "stablehlo.while" not in text and "stablehlo.dot" not in text


def test_in_the_shard_map_of_a_mesh():
    assert len(names(lower(QWEN, 64, "gpu", sharded=True))) == 2


def test_a_deep_product_with_few_rows_is_split():
    gate_up, down = names(lower(MIXTRAL, 1, "gpu"))
    assert gate_up.endswith("_s1") and down.endswith("_s2")


@pytest.mark.parametrize("dtype", [BF16, jnp.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 2048])
@pytest.mark.parametrize("experts", [QWEN, MIXTRAL, ODD], ids=str)
def test_a_product_is_one_kernel_on_a_tpu(experts, tokens, dtype):
    text = lower(experts, tokens, "tpu", dtype=dtype, platform="tpu")
    assert text.count("@tpu_custom_call") == 2 and "stablehlo.dot" not in text


def test_float32_is_not_computed_in_tf32_or_in_passes_of_bf16():
    for implementation in ("gpu", "tpu"):
        jaxpr = str(trace(QWEN, 64, implementation, dtype=jnp.float32).jaxpr)
        exact = jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
        assert jaxpr.count("dot_general[") == exact > 0, implementation


def test_xla_has_no_product_of_all_experts():
    """As `lax.ragged_dot` would have on a CPU: a turn of the loop multiplies a tile with one weight."""
    bits = jax.ShapeDtypeStruct((QWEN.count, 1536, QWEN.dim), jnp.uint16)
    x, sizes = jax.ShapeDtypeStruct((512, QWEN.dim), BF16), jax.ShapeDtypeStruct((QWEN.count,), jnp.int32)
    compiled = jax.jit(grouped_matmul).lower(x, bits, sizes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 1536 * QWEN.dim * 4
    assert f"f32[{QWEN.count},1536" not in compiled.as_text()
