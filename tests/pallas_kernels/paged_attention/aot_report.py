"""What attention's kernels become on devices that are not here: python -m tests.aot attention [NAME ...]"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import EngineConfig
from jaxserve.engine.topology import chip, compiler_mesh
from jaxserve.pallas_kernels.paged_attention import AttentionMeta, Masking, PoolShape, paged_attention
from tests.aot import Dump
from tests.hlo import instructions

BLOCKS, BLOCK_SIZE, CONTEXT, LAYERS = 4096, 16, 8192, 2


class Shape(NamedTuple):
    rows: int
    seqs: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str = "bfloat16"
    kv: str | None = None
    masking: Masking = Masking()
    implementation: str = "gpu"
    device: str = "h200"


SHAPES = {
    "llama-8b decode 1": Shape(1, 1, 32, 8, 128),
    "llama-8b decode 64": Shape(64, 64, 32, 8, 128),
    "llama-8b mixed 2048": Shape(2048, 64, 32, 8, 128),
    "llama-8b decode 8 f32": Shape(8, 8, 32, 8, 128, "float32"),
    "llama-8b mixed 512 f32": Shape(512, 8, 32, 8, 128, "float32"),
    "smollm2 decode 64": Shape(64, 64, 9, 3, 64),
    "smollm2 mixed 512": Shape(512, 64, 9, 3, 64),
    "smollm2 mixed 512 f32": Shape(512, 64, 9, 3, 64, "float32"),
    "head size 80 mixed": Shape(512, 16, 32, 32, 80),
    "gemma head size 256 decode": Shape(16, 16, 8, 4, 256, masking=Masking(1024, 50.0)),
    "gemma head size 256 mixed": Shape(512, 16, 8, 4, 256, masking=Masking(1024, 50.0)),
    "head size 256 mixed f32": Shape(512, 16, 8, 4, 256, "float32"),
    "llama-8b mixed 512 int8": Shape(512, 64, 32, 8, 128, kv="int8"),
    "llama-8b mixed 512 fp8": Shape(512, 64, 32, 8, 128, kv="float8_e4m3fn"),
    "head size 256 mixed int8": Shape(512, 16, 8, 4, 256, masking=Masking(1024, 50.0), kv="int8"),
    "head size 256 mixed fp8": Shape(512, 16, 8, 4, 256, masking=Masking(1024, 50.0), kv="float8_e4m3fn"),
    "llama-8b mixed 512 int8 f32": Shape(512, 8, 32, 8, 128, "float32", kv="int8"),
    "mosaic llama-8b decode 64": Shape(64, 64, 32, 8, 128, implementation="mosaic"),
    "mosaic llama-8b mixed 2048": Shape(2048, 64, 32, 8, 128, implementation="mosaic"),
    "mosaic smollm2 mixed 512": Shape(512, 64, 9, 3, 64, implementation="mosaic"),
    "mosaic head size 192 mixed": Shape(512, 16, 8, 8, 192, implementation="mosaic"),
    "mosaic gemma head size 256 mixed": Shape(
        512, 16, 8, 4, 256, masking=Masking(1024, 50.0), implementation="mosaic"
    ),
}
NAMES = list(SHAPES)


def step(layers, q, k, v, meta, shape: Shape):
    """Layers in a row, each with its own pool, as in a model's step."""
    options = {"scale": 0.1, "masking": shape.masking, "implementation": shape.implementation}
    for i, pool in enumerate(layers):
        out, layers[i] = paged_attention(q, k, v, pool, meta, **options)
        q = q + out
    return layers, q


def reports(name: str, dump: Dump) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name]
    mesh = compiler_mesh(EngineConfig(), chip(shape.device))
    where = NamedSharding(mesh, PartitionSpec())

    def array(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    rows, seqs, dtype = shape.rows, shape.seqs, shape.dtype
    like = PoolShape(BLOCKS, shape.kv_heads, BLOCK_SIZE, shape.dim, jnp.dtype(shape.kv or dtype))
    pools = [jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), like.arrays) for _ in range(LAYERS)]
    q, kv = (array(rows, heads, shape.dim, dtype=dtype) for heads in (shape.heads, shape.kv_heads))
    tables = array(seqs, CONTEXT // BLOCK_SIZE)
    meta = AttentionMeta(tables, array(seqs), array(seqs), array(seqs), array(rows), array(rows))
    dump.clear()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(partial(step, shape=shape), donate_argnums=0)
        compiled = jitted.lower(pools, q, kv, kv, meta).compile()
    run, memory = list(instructions(compiled.as_text())), compiled.memory_analysis()
    pool = like.num_blocks * like.block_bytes
    sizes = {array.size for array in jax.tree.leaves(pools)}
    copied = [each for each in run if "copy" in each.name and not sizes.isdisjoint(each.elements)]
    found = {
        "shape": name,
        "implementation": shape.implementation,
        "device": shape.device,
        "jax": jax.__version__,
        "temporaries MiB": round(memory.temp_size_in_bytes / 2**20, 2),
        "of a pool": round(memory.temp_size_in_bytes / pool, 3),
        "pools in place": memory.alias_size_in_bytes >= LAYERS * pool and not copied,
        "loops": sum(each.operation == "while" for each in run),
    }
    for kernel in dump.figures("paged_attention_") if shape.device == "h200" else [{}]:
        yield found | kernel
