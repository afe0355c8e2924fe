"""Devices that are not here: what memory they have, and their compilers, which run on any machine.

Nothing runs on them; a program compiled for one says how much memory it takes. NVIDIA's needs the packages
jax-cuda13-pjrt and jax-cuda13-plugin of jaxlib's version and `ptxas`, a TPU's needs libtpu.
"""

import math
import os
from typing import NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.engine.devices import GPU, TPU, Memory, Platform, gib
from jaxserve.errors import ConfigError


class Chip(NamedTuple):
    """One kind of device."""

    name: str
    platform: Platform
    gib: float
    """Memory that its driver reports."""
    facts: dict[str, float | str]
    """What its compiler asks for: of a TPU the name of its topologies, of a GPU the figures of TARGET."""
    compute_capability: str = ""
    """Of a GPU."""

    @property
    def packages(self) -> str:
        """What its compiler comes from, beside jax."""
        return "libtpu" if self.platform is TPU else "jax-cuda13-pjrt, jax-cuda13-plugin and ptxas"


def _gpu(name: str, gib: float, compute: str, cores: int, shared: int, l2: int, bandwidth: float) -> Chip:
    """`shared`: KiB of shared memory of a core; `l2`: MiB; `bandwidth`: GB/s."""
    major, minor = compute.split(".")
    feature = "feature_extension: ACCELERATED_FEATURES" if major == "9" else ""
    capability = f"major: {major} minor: {minor} {feature}"
    facts: dict[str, float | str] = {"capability": capability, "cores": cores, "shared": shared * 1024}
    facts |= {"optin": (shared - 1) * 1024, "l2": l2 * 2**20, "bandwidth": int(bandwidth * 1e9)}
    return Chip(f"NVIDIA {name}", GPU, gib, facts, compute)


CHIPS = {
    "h200": _gpu("H200", 139.8, "9.0", 132, 228, 50, 4800),
    "h100": _gpu("H100 80GB", 79.1, "9.0", 132, 228, 50, 3350),
    "a100-80": _gpu("A100 80GB", 79.1, "8.0", 108, 164, 40, 2039),
    "a100-40": _gpu("A100 40GB", 39.4, "8.0", 108, 164, 40, 1555),
    "l40s": _gpu("L40S", 44.4, "8.9", 142, 100, 96, 864),
    "l4": _gpu("L4", 21.9, "8.9", 58, 100, 48, 300),
    "a10g": _gpu("A10G", 21.9, "8.6", 80, 100, 6, 600),
    "rtx4090": _gpu("RTX 4090", 23.5, "8.9", 128, 100, 72, 1008),
    "v4": Chip("TPU v4", TPU, 30.75, {"topology": "v4"}),
    "v5e": Chip("TPU v5e", TPU, 15.75, {"topology": "v5e"}),
    "v5p": Chip("TPU v5p", TPU, 95.0, {"topology": "v5p"}),
    "v6e": Chip("TPU v6e", TPU, 31.25, {"topology": "v6e"}),
}
NOT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Keeps libtpu from asking which TPU it is on, and from locking others out."""
TARGET = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  name: "{name}"  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ {capability} }}
  driver_version: "13.0.0"  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
  core_count: {cores}  fpus_per_core: 128  clock_rate_ghz: 1.8  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: {shared}  shared_memory_per_block: 49152  shared_memory_per_block_optin: {optin}
  l2_cache_size: {l2}  device_memory_size: {memory}  memory_bandwidth: {bandwidth}
  pcie_bandwidth: 34359738368  ecc_enabled: true
}}
"""


def chip(name: str) -> Chip:
    """Raises ConfigError naming those that are known."""
    if name not in CHIPS:
        raise ConfigError(f"device must be one of {', '.join(CHIPS)}, not {name!r}")
    return CHIPS[name]


def memory_of_chip(config: EngineConfig, chip: Chip) -> Memory:
    part, size = config.memory_fraction, int(chip.gib * 2**30)
    return Memory(chip.platform, chip.name, int(size * part), 0, f"{part} of {gib(size)}, {chip.name}")


def abstract_mesh(config: EngineConfig) -> AbstractMesh:
    """A replica's mesh of devices of no kind: shapes and shardings, but nothing compiles for it."""
    return AbstractMesh((parse_mesh(config.mesh).tensor,), ("tensor",), axis_types=(AxisType.Auto,))


def compiler_mesh(config: EngineConfig, chip: Chip) -> Mesh:
    """A replica's mesh of devices that programs can be compiled for. Without the packages for it jax raises
    errors of several kinds."""
    count = parse_mesh(config.mesh).tensor
    if chip.platform is GPU:
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        # without a device's allocator the compiler plans for four fifths of the memory, and would squeeze
        memory = int(chip.gib * 2**30 / 0.8)
        target = TARGET.format(name=chip.name, memory=memory, **chip.facts)
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x1x{count}"
        )
    else:
        for variable, value in NOT_A_TPU.items():
            os.environ.setdefault(variable, value)
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{chip.facts['topology']}:{_grid(chip, count)}"
        )
    return Mesh(np.array(topology.devices[:count]), ("tensor",), axis_types=(AxisType.Auto,))


def _grid(chip: Chip, count: int) -> str:
    """A slice with at least so many chips: v5e and v6e are flat, the others have three dimensions."""
    flat = chip.facts["topology"] in ("v5e", "v6e")
    sides = [2, 2] if flat else [2, 2, 1]
    while math.prod(sides) < count:
        sides[max(i for i, side in enumerate(sides) if side == min(sides))] *= 2
    return "x".join(map(str, sides))
