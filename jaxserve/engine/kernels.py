"""Which implementations compute: the best there are for the devices, or those that were asked for."""

import logging
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.engine.devices import Platform, platform_of
from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels import matmul, native, paged_attention, sampling
from jaxserve.pallas_kernels.matmul import cpu as cpu_matmul
from jaxserve.pallas_kernels.paged_attention import cpu as cpu_attention
from jaxserve.pallas_kernels.sampling import cpu as cpu_sampling

log = logging.getLogger(__name__)


class Kernels(NamedTuple):
    attention: paged_attention.Implementation
    matmul: matmul.Implementation
    sampler: sampling.Implementation
    rounded: bool = False
    """Products, summed in float32, are given in bfloat16: half as much to move, and from device to device."""

    def smallest_decode(self, platform: Platform) -> int:
        """Rows of the smallest decode program: fewer are not faster, except with the C++ product."""
        return 1 if self.matmul == "cpu" else platform.smallest_decode


PORTABLE = Kernels("xla", "xla", "xla")
"""Those that run anywhere."""


def cpu_kernels(dtype: Any, quantization: str | None = None) -> list[tuple[str, native.Kernel]]:
    """All C++ kernels of an engine whose weights and KV are of this type, by the field of `Kernels`."""
    kernels = [
        ("attention", native.Kernel.of(cpu_attention.SOURCE, dtype)),
        ("matmul", native.Kernel.of(cpu_matmul.SOURCE, dtype)),
        ("sampler", cpu_sampling.KERNEL),
    ]
    return kernels + ([("matmul", cpu_matmul.INT8)] if quantization == "int8" else [])


def choose_kernels(config: EngineConfig, mesh: Mesh, dtype: Any) -> Kernels:
    """Raises ConfigError for a kernel that was asked for and cannot be had here."""
    chosen = _wanted(config, mesh, dtype)
    kernels = [
        (name, kernel)
        for name, kernel in cpu_kernels(dtype, config.quantization)
        if getattr(chosen, name) == "cpu"
    ]
    native.prepare(*(kernel for _, kernel in kernels))
    for name, kernel in kernels:
        if missing := _missing(mesh, name, kernel):
            if getattr(config, name) == "cpu":
                raise ConfigError(f"{name}=cpu cannot be had: {missing}")
            log.warning("slower without the C++ kernel for %s: %s", name, missing)
            chosen = Kernels(**(chosen._asdict() | {name: "xla"}))
    return chosen


def _wanted(config: EngineConfig, mesh: Mesh, dtype: Any) -> Kernels:
    """What was asked for, or would be best."""
    device = mesh.devices.flat[0]
    platform = platform_of(device)
    chosen = kernels_for(config, platform, dtype)
    check_device(config, chosen, device.device_kind, getattr(device, "compute_capability", ""))
    if platform.name == "cpu" and mesh.size == 1:  # XLA shards a mesh's weights and logits
        native: Any = {name: "cpu" for name in ("matmul", "sampler") if getattr(config, name) == "auto"}
        chosen = chosen._replace(**native)
    return chosen


def kernels_for(config: EngineConfig, platform: Platform, dtype: Any) -> Kernels:
    """What was asked for, or would be best on such a device without C++. Raises as `attention_for`."""
    product: Any = "xla" if config.matmul == "auto" else config.matmul
    rounded = platform.name != "cpu" and dtype == jnp.bfloat16
    return Kernels(attention_for(config, platform), product, sampler_for(config, platform), rounded)


def attention_for(config: EngineConfig, platform: Platform) -> paged_attention.Implementation:
    """What was asked for, or would be best.

    Raises ConfigError for a TPU's kernel on another device, and for one without KV of 8 bits where that is
    asked for too.
    """
    if config.attention == "tpu" and platform.name != "tpu":
        raise ConfigError(f"attention=tpu cannot be had: it is for TPUs, and this is a {platform.name}")
    best: Any = "cpu" if platform.name == "cpu" else platform.attention
    attention: paged_attention.Implementation = best if config.attention == "auto" else config.attention
    missing = paged_attention.why_not_scaled(attention)
    if config.kv_cache_dtype == "auto" or not missing:
        return attention
    other: paged_attention.Implementation = "gpu" if platform.name == "gpu" else "xla"
    if config.attention != "auto":
        raise ConfigError(
            f"attention={attention} cannot be had with kv_cache_dtype={config.kv_cache_dtype}: {missing}; "
            f"attention={other} can"
        )
    log.warning("attention=%s for kv_cache_dtype=%s: %s", other, config.kv_cache_dtype, missing)
    return other


def sampler_for(config: EngineConfig, platform: Platform) -> sampling.Implementation:
    """What was asked for, or would be best. Raises ConfigError for a GPU's kernel on another device."""
    if config.sampler == "gpu" and platform.name != "gpu":
        raise ConfigError(f"sampler=gpu cannot be had: it is for GPUs, and this is a {platform.name}")
    return platform.sampler if config.sampler == "auto" else config.sampler


def serving(kernels: Kernels, dtype: Any, head_dim: int, alibi: bool = False) -> Kernels:
    """These, with XLA's attention where the chosen one does not serve such heads."""
    if missing := paged_attention.why_not(kernels.attention, dtype, head_dim, alibi):
        log.warning("slower without the kernel for attention: %s", missing)
        return kernels._replace(attention="xla")
    return kernels


def check_attention(kernels: Kernels, group: int, pool: paged_attention.PoolShape) -> None:
    """Raises ConfigError where the attention that was asked for cannot serve a model's layers.

    `group` query heads share a KV head, and `pool` is a layer's.
    """
    if kernels.attention == "mosaic":
        from jaxserve.pallas_kernels.paged_attention import mosaic

        if missing := mosaic.why_not(group, pool.head_dim, pool.block_size, pool.dtype, pool.storage):
            raise ConfigError(f"attention=mosaic cannot serve this model: it {missing}; attention=gpu can")


def check_device(config: EngineConfig, kernels: Kernels, kind: str, capability: str) -> None:
    """Raises ConfigError for what such a device cannot do; `capability` is a GPU's, as in "9.0"."""
    if kernels.attention == "mosaic" and not capability.startswith("9."):
        raise ConfigError(f"attention=mosaic cannot be had: it is for Hopper GPUs, and this is a {kind}")
    converts = tuple(map(int, capability.split("."))) >= (8, 9) if capability else True
    if kernels.attention == "gpu" and config.kv_cache_dtype == "fp8" and not converts:
        raise ConfigError(
            f"kv_cache_dtype=fp8 cannot be had: it is for GPUs from Ada on, and this is a {kind}; "
            f"int8 has no such limit"
        )


def _missing(mesh: Mesh, name: str, kernel: native.Kernel) -> str:
    """Why a C++ kernel cannot be used; empty when it can."""
    platform = mesh.devices.flat[0].platform
    if platform != "cpu":
        return f"it is for CPUs, and this is a {platform}"
    if name != "attention" and mesh.size > 1:
        return "on a mesh that is XLA's"
    return native.why_not(kernel)
