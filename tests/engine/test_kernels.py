"""Kernels that are asked for are had, or refused with the reason."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.kernels import Kernels, check_attention, choose_kernels
from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.paged_attention import PoolShape

MOSAIC = EngineConfig(attention="mosaic")


def mesh_of(**device):
    """Stands for a mesh of one such device."""
    return SimpleNamespace(devices=SimpleNamespace(flat=[SimpleNamespace(**device)]), size=1)


@pytest.mark.parametrize(
    "device",
    [
        {"platform": "cpu", "device_kind": "cpu"},
        {"platform": "gpu", "device_kind": "NVIDIA A100", "compute_capability": "8.0"},
        {"platform": "gpu", "device_kind": "NVIDIA B200", "compute_capability": "10.0"},
    ],
    ids=lambda device: device["device_kind"],
)
def test_mosaic_is_for_hopper(device):
    with pytest.raises(ConfigError, match=f"attention=mosaic.*Hopper.*{device['device_kind']}"):
        choose_kernels(MOSAIC, mesh_of(**device), jnp.bfloat16)


def test_a_hopper_gpu_has_it_where_it_is_asked_for():
    mesh = mesh_of(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    assert choose_kernels(MOSAIC, mesh, jnp.bfloat16).attention == "mosaic"
    assert choose_kernels(EngineConfig(), mesh, jnp.bfloat16).attention == "gpu"


def test_a_gpu_has_a_kernel_that_chooses_tokens_and_no_other_device_has():
    mesh = mesh_of(platform="gpu", device_kind="NVIDIA A100")
    assert choose_kernels(EngineConfig(), mesh, jnp.bfloat16).sampler == "gpu"
    assert choose_kernels(EngineConfig(sampler="xla"), mesh, jnp.bfloat16).sampler == "xla"
    for platform in ("cpu", "tpu"):
        mesh = mesh_of(platform=platform, device_kind="one")
        with pytest.raises(ConfigError, match=f"sampler=gpu cannot be had: .* this is a {platform}"):
            choose_kernels(EngineConfig(sampler="gpu"), mesh, jnp.bfloat16)


def test_an_older_gpu_has_a_kv_cache_of_int8_and_none_of_fp8():
    mesh = mesh_of(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")
    assert choose_kernels(EngineConfig(kv_cache_dtype="int8"), mesh, jnp.bfloat16).attention == "gpu"
    with pytest.raises(ConfigError, match=r"kv_cache_dtype=fp8 cannot be had: .* A100; int8"):
        choose_kernels(EngineConfig(kv_cache_dtype="fp8"), mesh, jnp.bfloat16)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_only_bfloat16_products_of_accelerators_are_rounded(platform):
    mesh = SimpleNamespace(devices=mesh_of(platform=platform, device_kind="one").devices, size=2)
    kinds = map(jnp.dtype, ("bfloat16", "float16"))
    rounded = [choose_kernels(EngineConfig(), mesh, kind).rounded for kind in kinds]
    assert rounded == [platform != "cpu", False]


@pytest.mark.parametrize(
    ("group", "pool", "reason"),
    [
        (4, PoolShape(9, 8, 16, 128, jnp.dtype(jnp.float32)), "not float32"),
        (4, PoolShape(9, 8, 16, 80, jnp.dtype(jnp.bfloat16)), "not 80"),
        (4, PoolShape(9, 8, 12, 128, jnp.dtype(jnp.bfloat16)), "blocks of 12"),
    ],
    ids=["type", "head size", "block size"],
)
def test_a_model_it_cannot_serve_is_refused(group, pool, reason):
    with pytest.raises(ConfigError, match=f"attention=mosaic.*{reason}"):
        check_attention(Kernels("mosaic", "xla", "xla"), group, pool)
    check_attention(Kernels("gpu", "xla", "xla"), group, pool)


def test_a_model_it_can_serve():
    pool = PoolShape(9, 8, 16, 128, jnp.dtype(jnp.bfloat16))
    check_attention(Kernels("mosaic", "xla", "xla"), 4, pool)
