"""One layer's attention in bf16: ours, and what jax has, by batch and context."""

from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from bench.gpu.check import IMPLEMENTATIONS
from bench.gpu.job import Job
from jaxserve.pallas_kernels.paged_attention.tuning.measure import CALLS, Heads, Layers, Work, normal
from jaxserve.pallas_kernels.timing import seconds_per_call

HEADS = Heads(32, 8, 128)
DECODES = [Work(n, 1, c - 1) for c in (4096, 1024) for n in (32, 1, 8, 64, 128, 256) if n * c <= 2**19]
PREFILLS = [Work(1, 2048, 0), Work(1, 8192, 0), Work(8, 1024, 0), Work(1, 2048, 6144)]
WORKS = [*DECODES, Work(1, 1, 32767), *PREFILLS]
DRY_HEADS = Heads(4, 2, 16)
DRY_WORKS = [Work(2, 1, 31), Work(1, 20, 0), Work(1, 20, 12)]
COLD = 2**28
"""Bytes of keys and values that calls go through in turn: several times what a GPU caches."""
TOGETHER = 6
"""Works that are compiled side by side before they are timed."""


def run(job: Job) -> None:
    heads = DRY_HEADS if job.dry else HEADS
    layers = Layers(heads, *((1024, 1) if job.dry else (2**19, 8)), interpret=job.dry)
    with ThreadPoolExecutor(8) as threads:
        todo = works(job)
        for i in range(0, len(todo), TOGETHER):
            jobs = [
                (work, by, threads.submit(prepare, layers, work, by))
                for work in todo[i : i + TOGETHER]
                for by in (*IMPLEMENTATIONS, "jax cudnn", "jax xla")
            ]
            wait([prepared for *_, prepared in jobs])  # nothing compiles while something is timed
            for work, by, prepared in jobs:
                job.try_emit(row(work, heads, by), lambda ready=prepared: {"ms": ready.result()()})


def works(job: Job) -> list[Work]:
    return DRY_WORKS if job.dry else WORKS


def row(work: Work, heads: Heads, by: str) -> dict[str, Any]:
    """What a row of the results begins with."""
    moved, products = work.cost(heads)
    return {**work._asdict(), "by": by, "GB": 1e-9 * moved, "TFLOP": 1e-12 * products}


def cold_sets(work: Work, layers: int, heads: Heads) -> list[list[int]]:
    """For each call and layer, which of several sets of keys and values it reads: none is in a cache."""
    size = 4 * work.sequences * (work.before + work.rows) * heads.kv * heads.dim
    sets = max(1, min(CALLS * layers, COLD // size))
    return [[(call * layers + layer) % sets for layer in range(layers)] for call in range(CALLS)]


def prepare(layers: Layers, work: Work, by: str) -> Any:
    """A function that takes the time, in milliseconds; it is compiled now."""
    if not by.startswith("jax "):
        return partial(layers.milliseconds, work, layers.compile(work, by))
    return dense(layers, work, by.removeprefix("jax "))


def dense(layers: Layers, work: Work, implementation: Any) -> Any:
    """jax's attention over keys and values that lie side by side, of the same lengths."""
    if work.rows > 1 and work.before:
        raise ValueError("its causal mask begins at the first key, not at the last")
    count, heads, context = layers.count, layers.heads, work.before + work.rows
    attend = partial(
        jax.nn.dot_product_attention, scale=0.1, is_causal=work.rows > 1, implementation=implementation
    )
    sets, shape = cold_sets(work, count, heads), (work.sequences, context, heads.kv, heads.dim)

    def step(q: jax.Array, *caches: tuple[jax.Array, jax.Array]) -> jax.Array:
        for k, v in caches:
            q = (q + attend(q, k, v)) / 2
        return q

    query = jax.ShapeDtypeStruct((work.sequences, work.rows, heads.query, heads.dim), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    program = jax.jit(step).lower(query, *[(keys, keys)] * count).compile()

    def milliseconds() -> float:
        made = [(normal(2 * i, *shape), normal(2 * i + 1, *shape)) for i in range(1 + max(map(max, sets)))]
        q = normal(99, *query.shape)

        def call(q: jax.Array, i: int) -> jax.Array:
            return program(q, *[made[n] for n in sets[i]])

        return 1e3 / count * seconds_per_call(call, q, CALLS)

    return milliseconds
