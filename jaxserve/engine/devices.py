"""The devices an engine runs on, and the defaults that suit them."""

import contextlib
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh

from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.paged_attention import Implementation, PoolShape

GRID = 64
"""The pool's size is rounded down to this many blocks, so that another reading of free memory does not
change the programs' shapes."""


class Platform(NamedTuple):
    """Defaults for one kind of device."""

    name: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    smallest_decode: int
    """Fewer rows than this are slower, not faster."""
    attention: Implementation
    kv_as_bits: bool
    """Keep 16-bit KV as uint16: XLA's CPU scatter would convert all of it."""


CPU = Platform("cpu", 32, 64, 1024, 4, "xla", True)
GPU = Platform("gpu", 16, 256, 8192, 1, "gpu", False)
TPU = Platform("tpu", 16, 256, 8192, 1, "xla", False)
CPU_POOL_BYTES = 4 * 2**30
"""For all virtual devices together: they share one memory."""
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


def pool_blocks(
    config: EngineConfig, device: jax.Device, block: PoolShape, layers: int, most: int, reserve: int
) -> int:
    """Blocks of the KV pool, the dummy included.

    `block` is one layer's pool on one device, `most` the blocks that all sequences at full length
    need, `reserve` bytes that steps need beside it. Raises ConfigError with the arithmetic when
    nothing useful fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    size = block.block_bytes * layers
    shape = parse_mesh(config.mesh)
    room = CPU_POOL_BYTES // (shape.tensor * shape.data)
    if device.platform != "cpu":
        memory = device.memory_stats()
        limit, used = memory["bytes_limit"], memory["bytes_in_use"]
        room = limit - used - reserve
        if room < 2 * size:
            raise ConfigError(
                f"no room for a KV pool: {limit} bytes (memory_fraction {config.memory_fraction}) "
                f"- {used} in use - {reserve} for steps leaves {room}, a block takes {size}"
            )
    count = min(room // size, most + 1)
    return count // GRID * GRID if GRID < count <= most else count
