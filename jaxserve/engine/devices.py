"""The devices an engine runs on, and the defaults that suit them."""

import contextlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels import paged_attention, sampling
from jaxserve.pallas_kernels.paged_attention.tuning import tpu


class Platform(NamedTuple):
    """Defaults for one kind of device."""

    name: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    smallest_decode: int
    """Fewer rows than this are slower, not faster."""
    attention: paged_attention.Implementation
    sampler: sampling.Implementation
    kv_as_bits: bool
    """Keep 16-bit KV as uint16: XLA's CPU scatter would convert all of it."""


CPU = Platform("cpu", 32, 64, 1024, 4, "xla", "xla", True)
GPU = Platform("gpu", 16, 256, 8192, 1, "gpu", "gpu", False)
TPU = Platform("tpu", tpu.BLOCK_SIZE, 128, 8192, 8, "tpu", "xla", False)
CGROUPS = [
    (f"/sys/fs/cgroup/{limit}", f"/sys/fs/cgroup/{used}")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
]
"""Where a container's limit and use stand, in the new and the old form."""
CPU_DEVICES = "--xla_force_host_platform_device_count"
"""The part of XLA_FLAGS that says how many virtual devices a CPU is."""


def platform_of(device: jax.Device) -> Platform:
    return {"cpu": CPU, "gpu": GPU, "tpu": TPU}[device.platform]


def make_mesh(config: EngineConfig, replica: int) -> Mesh:
    """The mesh of one replica. Raises ConfigError when there are too few devices."""
    shape = parse_mesh(config.mesh)
    count = shape.tensor * shape.data
    _make_cpu_devices(count)
    # read when jax starts: the part of a GPU's memory that it takes
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(config.memory_fraction))
    devices = jax.devices()
    if count > len(devices):
        kind = devices[0].platform
        hint = f"; make the engine before jax is used, or set XLA_FLAGS={CPU_DEVICES}={count}"
        raise ConfigError(
            f"mesh {config.mesh} needs {count} devices, this machine has {len(devices)} ({kind})"
            + (hint if kind == "cpu" else "")
        )
    mine = devices[replica * shape.tensor : (replica + 1) * shape.tensor]
    return jax.make_mesh((shape.tensor,), ("tensor",), axis_types=(AxisType.Auto,), devices=mine)


def _make_cpu_devices(count: int) -> None:
    """On a CPU a mesh is made of virtual devices; only possible before jax has started."""
    if count > 1 and CPU_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        # started already: make_mesh counts what there is
        with contextlib.suppress(RuntimeError):
            if jax.config.jax_num_cpu_devices < count:  # type: ignore[attr-defined]
                jax.config.update("jax_num_cpu_devices", count)


def weight_type(name: str, checkpoint: Any, platform: Platform) -> Any:
    """The type for weights and KV: the one asked for, or the checkpoint's where the device is good at it."""
    if name != "auto":
        return jnp.dtype(name)
    stored = checkpoint.get("dtype") or checkpoint.get("torch_dtype")
    return jnp.dtype(jnp.float16 if stored == "float16" and platform is GPU else jnp.bfloat16)


def kv_type(name: str, weights: Any) -> Any:
    """The type of the KV pool's numbers."""
    return jnp.dtype({"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}.get(name, weights))


class Memory(NamedTuple):
    """What one device has for an engine, before anything is loaded."""

    platform: Platform
    device: str
    limit: int
    """Bytes that may be in use."""
    used: int
    """Bytes of them that others use."""
    about: str
    """Where the limit comes from, for a person."""


def memory_of(config: EngineConfig, device: jax.Device) -> Memory:
    """The memory of a device that is here."""
    part, platform, name = config.memory_fraction, platform_of(device), device.device_kind
    if platform is CPU:
        shape, free = parse_mesh(config.mesh), host_memory()
        count = shape.tensor * shape.data
        shared = f" for {count} virtual devices" if count > 1 else ""
        about = f"{part} of {gib(free)} of free memory{shared}"
        return Memory(platform, name, int(free * part) // count, 0, about)
    stats = device.memory_stats()
    limit, used = stats["bytes_limit"], stats["bytes_in_use"]
    if platform is GPU:  # whose allocator was told the fraction
        return Memory(platform, name, limit, used, f"{part} of {name}")
    return Memory(platform, name, int(limit * part), used, f"{part} of {gib(limit)}, {name}")


def host_memory() -> int:
    """Bytes that a new program can have: what is free, within the limit of the container it is in."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as info:
        free = next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable:"))
    for limit, used in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()) + _reclaimable(limit))
    return max(free, 0)


def _reclaimable(limit: str) -> int:
    """Bytes of files that a container's use counts and that give way to programs."""
    lines = Path(limit).with_name("memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def gib(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
