"""What the GPU kernel becomes on an H200, compiled on a machine that has none: a line of JSON per shape.

    python aot_report.py [name ...]

Needs jax-cuda13-plugin and jax-cuda13-pjrt of jaxlib's version (pip install --no-deps) and `ptxas`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

DUMP = Path(tempfile.mkdtemp())
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": f"--xla_dump_to={DUMP} --xla_dump_hlo_as_text --xla_gpu_dump_llvmir",
}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import NamedSharding, PartitionSpec  # noqa: E402

from jaxserve.pallas_kernels.paged_attention import AttentionMeta, Masking, paged_attention  # noqa: E402

H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H200"  device_vendor: "NVIDIA Corporation"  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_core: 233472  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800  device_memory_size: 151397597184  memory_bandwidth: 4800000000000
  pcie_bandwidth: 34359738368  ecc_enabled: true
}
"""

BLOCKS, BLOCK_SIZE, CONTEXT, LAYERS = 4096, 16, 8192, 2
# name: rows, sequences, heads, KV heads, head size, dtype, masking
SHAPES = {
    "llama-8b decode 1": (1, 1, 32, 8, 128, "bfloat16", Masking()),
    "llama-8b decode 64": (64, 64, 32, 8, 128, "bfloat16", Masking()),
    "llama-8b mixed 2048": (2048, 64, 32, 8, 128, "bfloat16", Masking()),
    "llama-8b decode 8 f32": (8, 8, 32, 8, 128, "float32", Masking()),
    "llama-8b mixed 512 f32": (512, 8, 32, 8, 128, "float32", Masking()),
    "smollm2 decode 64": (64, 64, 9, 3, 64, "bfloat16", Masking()),
    "smollm2 mixed 512": (512, 64, 9, 3, 64, "bfloat16", Masking()),
    "smollm2 mixed 512 f32": (512, 64, 9, 3, 64, "float32", Masking()),
    "head size 80 mixed": (512, 16, 32, 32, 80, "bfloat16", Masking()),
    "gemma head size 256 decode": (16, 16, 8, 4, 256, "bfloat16", Masking(1024, 50.0)),
    "gemma head size 256 mixed": (512, 16, 8, 4, 256, "bfloat16", Masking(1024, 50.0)),
    "head size 256 mixed f32": (512, 16, 8, 4, 256, "float32", Masking()),
}


def step(layers, q, k, v, meta, masking):
    """Layers in a row, each with its own pool, as in a model's step."""
    for i, pool in enumerate(layers):
        out, layers[i] = paged_attention(
            q, k, v, pool, meta, scale=0.1, masking=masking, implementation="gpu"
        )
        q = q + out
    return layers, q


def report(name: str, topology) -> dict:
    rows, seqs, heads, kv_heads, dim, dtype, masking = SHAPES[name]
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    where = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    pools = [array(BLOCKS, 2, kv_heads, BLOCK_SIZE, dim, dtype=dtype) for _ in range(LAYERS)]
    q, kv = array(rows, heads, dim, dtype=dtype), array(rows, kv_heads, dim, dtype=dtype)
    tables = array(seqs, CONTEXT // BLOCK_SIZE)
    meta = AttentionMeta(tables, array(seqs), array(seqs), array(seqs), array(rows), array(rows))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(partial(step, masking=masking), donate_argnums=0)
        compiled = jitted.lower(pools, q, kv, kv, meta).compile()
    memory = compiled.memory_analysis()
    hlo = compiled.as_text()
    pool = ",".join(map(str, pools[0].shape))
    return {
        "name": name,
        "jax": jax.__version__,
        "temp_mib": round(memory.temp_size_in_bytes / 2**20, 2),
        "pool_mib": round(pools[0].size * pools[0].dtype.itemsize / 2**20, 2),
        "pools_aliased": memory.alias_size_in_bytes >= LAYERS * pools[0].size * pools[0].dtype.itemsize,
        "pool_copies": len(re.findall(rf"\[{pool}\]\S* (?:copy|copy-start|dynamic-slice)\(", hlo)),
        "whiles": len(re.findall(r" while\(", hlo)),
        "fusions": len(re.findall(r" fusion\(", hlo)),
        "kernels": kernels(),
    }


def kernels() -> list[dict]:
    """What ptxas says of each paged-attention kernel compiled since the last call."""
    found = {}
    for file in DUMP.glob("*.ptx"):
        ptx = file.read_text()
        if "paged_attention" in ptx:
            command = ["ptxas", "-v", "-arch=sm_90a", str(file), "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            pattern = r"function '(paged_attention\w*)'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
            for kernel, spills, registers in re.findall(pattern, said, re.S):
                products = set(re.findall(r"(wgmma\.mma_async|mma\.sync)", ptx))
                loads = len(re.findall(r"cp\.async\.c[ag]", ptx))
                found[kernel] = {
                    "kernel": kernel,
                    "registers": int(registers),
                    "spill_bytes": int(spills),
                    "products": sorted(products) or ["fma"],
                    "async_copies": loads,
                }
    for file in DUMP.glob("*thunk_sequence.txt"):
        for line in file.read_text().splitlines():
            if kernel := next((k for k in found if k in line), None):
                found[kernel]["shared_bytes"] = int(re.search(r"shared_memory: (\d+)", line).group(1))
    for file in DUMP.iterdir():
        file.unlink()
    return list(found.values())


if __name__ == "__main__":
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    for name in sys.argv[1:] or SHAPES:
        print(json.dumps(report(name, topology)), flush=True)
