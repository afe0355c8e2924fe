"""What a mixture of experts becomes on devices that are not here: python -m tests.aot experts [NAME ...]"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import EngineConfig
from jaxserve.engine.topology import chip, compiler_mesh
from jaxserve.pallas_kernels.grouped_matmul import by_expert, grouped_matmul
from tests.aot import NO_WORK, Dump
from tests.hlo import instructions

KEPT = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call"}
"""Operations that make nothing."""


class Experts(NamedTuple):
    """Those of one layer: each token has k of them."""

    count: int
    k: int
    dim: int
    width: int
    dtype: str = "bfloat16"


QWEN, MIXTRAL, DEEPSEEK = Experts(128, 8, 2048, 768), Experts(8, 2, 4096, 14336), Experts(256, 8, 7168, 2048)
FLOAT32, ODD = Experts(16, 4, 2048, 1024, "float32"), Experts(60, 4, 1000, 300)


class Shape(NamedTuple):
    experts: Experts
    tokens: int
    device: str = "h200"

    @property
    def implementation(self) -> str:
        return "gpu" if self.device == "h200" else "tpu"


SHAPES = {
    "qwen3-30b 1": Shape(QWEN, 1),
    "qwen3-30b 64": Shape(QWEN, 64),
    "qwen3-30b 512": Shape(QWEN, 512),
    "qwen3-30b 2048": Shape(QWEN, 2048),
    "mixtral-8x7b 1": Shape(MIXTRAL, 1),
    "mixtral-8x7b 2048": Shape(MIXTRAL, 2048),
    "deepseek-v3 64": Shape(DEEPSEEK, 64),
    "odd sizes 40": Shape(ODD, 40),
    "float32 8": Shape(FLOAT32, 8),
    "float32 512": Shape(FLOAT32, 512),
    "qwen3-30b 1, v5e": Shape(QWEN, 1, "v5e"),
    "qwen3-30b 64, v5e": Shape(QWEN, 64, "v5e"),
    "qwen3-30b 8192, v5e": Shape(QWEN, 8192, "v5e"),
    "float32 512, v5e": Shape(FLOAT32, 512, "v5e"),
    "qwen3-30b 64, v6e": Shape(QWEN, 64, "v6e"),
    "mixtral-8x7b 2048, v6e": Shape(MIXTRAL, 2048, "v6e"),
}
NAMES = list(SHAPES)


def layer(x, gate_up, down, ids, shares, implementation):
    order = by_expert(ids, len(down))
    multiply = partial(grouped_matmul, sizes=order.sizes, implementation=implementation)
    gate, up = jnp.split(multiply(order.rows_of(x), gate_up), 2, axis=1)
    return order.sum(multiply(jax.nn.silu(gate) * up, down), shares)


def reports(name: str, dump: Dump) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name]
    (count, k, dim, width, dtype), tokens = shape.experts, shape.tokens
    mesh = compiler_mesh(EngineConfig(), chip(shape.device))
    where = NamedSharding(mesh, PartitionSpec())

    def array(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

    weights = array(count, 2 * width, dim), array(count, dim, width)
    pairs = array(tokens, k, dtype="int32"), array(tokens, k, dtype="float32")
    dump.clear()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(layer, static_argnames="implementation")
        lowered = jitted.lower(array(tokens, dim), *weights, *pairs, implementation=shape.implementation)
        compiled = lowered.compile()
    run = list(instructions(compiled.as_text()))
    sizes = {w.size for w in weights}
    made = [each for each in run if each.operation not in KEPT and "S(1)" not in each.result]
    taken, rows = compiled.memory_analysis().temp_size_in_bytes, tokens * k
    found = {
        "layer": name,
        "device": shape.device,
        "jax": jax.__version__,
        "temporaries MiB": round(taken / 2**20, 2),
        "of the rows": round(taken / (4 * rows * (dim + 3 * width)), 2),
        "made of weights": sum(bool(sizes & set(each.elements)) for each in made),
        "loops": sum(each.operation == "while" for each in run),
    }
    for kernel in kernels(dump) if shape.device == "h200" else [{}]:
        yield found | kernel


def kernels(dump: Dump) -> list[dict[str, Any]]:
    """How many the program has in all, and what a GPU's own assembler says of each product."""
    in_all = sum(n for part in dump.thunks() for kind, n in part.items() if kind not in NO_WORK)
    return [{"kernels": in_all} | kernel for kernel in dump.figures("grouped_matmul_")]
