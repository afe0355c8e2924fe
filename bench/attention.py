"""Attention of one layer on the CPU, the KV write included: milliseconds, by shape of the step.

    python bench/attention.py [--implementation xla] [--only decode] [--seconds 2]

Layers of SmolLM2-135M (9 query and 3 KV heads of 64, bfloat16, blocks of 32) are chained as in a step, each
with a pool of its own, so that what they read comes from memory as it does there. Prints the least and the
median time over many short runs, and the GB/s of keys and values and the GFLOP/s that the median is.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.engine import pages
from jaxserve.pallas_kernels.paged_attention import PoolShape, paged_attention, ragged_meta

HEADS, KV_HEADS, DIM, BLOCK = 9, 3, 64, 32
COLD = 2**27
"""Bytes of keys and values of all layers together: several times what processors cache."""


class Step(NamedTuple):
    """Sequences of `rows` tokens each, after `before` others."""

    name: str
    seqs: int
    rows: int
    before: int

    @property
    def tokens(self) -> int:
        return self.seqs * (self.rows + self.before)

    @property
    def products(self) -> int:
        """Of a query with a key, or of a weight with a value."""
        seen = self.rows * self.before + self.rows * (self.rows + 1) // 2
        return 2 * self.seqs * HEADS * DIM * seen


STEPS = [
    *(Step(f"decode {n} x 256", n, 1, 255) for n in (1, 8, 32, 64)),
    Step("decode 1 x 8192", 1, 1, 8191),
    Step("decode 64 x 2048", 64, 1, 2047),
    Step("prefill 192", 1, 192, 0),
    Step("prefill 8 x 192", 8, 192, 0),
    Step("chunks 8 x 64 after 128", 8, 64, 128),
    Step("prefill 512", 1, 512, 0),
    Step("prefill 2048", 1, 2048, 0),
]


def program(step: Step, implementation: Any, dtype: Any) -> tuple[Any, int]:
    """A function that runs the step's layers once, and how many they are."""
    rng = np.random.default_rng(0)
    width = -(-(step.rows + step.before) // BLOCK)
    shape = PoolShape(1 + step.seqs * width, KV_HEADS, BLOCK, DIM, jnp.dtype(dtype), True)
    layers = int(np.clip(COLD // (shape.num_blocks * shape.block_bytes), 2, 30))
    tables = 1 + rng.permutation(step.seqs * width).reshape(step.seqs, width)
    lens = jnp.full(step.seqs, step.rows, jnp.int32)
    rows = step.seqs * step.rows
    padding = step.seqs + 1 - rows if step.rows > 1 else 0
    tables, starts = jnp.asarray(tables, jnp.int32), jnp.full_like(lens, step.before)
    meta = ragged_meta(tables, starts, lens, rows + max(0, padding))
    n = meta.row_pos.shape[0]
    q, k, v = (jnp.asarray(rng.standard_normal((n, h, DIM)), dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
    some = jnp.asarray(rng.standard_normal(shape.shape, np.float32), dtype)
    stored = jax.lax.bitcast_convert_type(some, shape.storage)

    attend = partial(paged_attention, scale=DIM**-0.5, implementation=implementation)

    def run(pools: list[jax.Array], q: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        for i, pool in enumerate(pools):
            out, pools[i] = attend(q, k, v, pool, meta)
            q = q + out
        return pools, q

    compiled = jax.jit(run, donate_argnums=0)
    pools = [stored + 0 for _ in range(layers)]
    for _ in pages.enlarge([(pool.unsafe_buffer_pointer(), pool.nbytes) for pool in pools]):
        pass  # as in an engine

    def once() -> None:
        nonlocal pools
        pools, out = compiled(pools, q)
        out.block_until_ready()

    return once, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementation", default="cpu", choices=("cpu", "xla"))
    parser.add_argument("--only", default="", help="steps whose name has this in it")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each step")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    print(f"{'ms per layer':<25}{'min':>8}{'median':>8}{'GB/s':>8}{'GFLOP/s':>9}")
    for step in (step for step in STEPS if args.only in step.name):
        once, layers = program(step, args.implementation, args.dtype)
        once()
        times, end = [], time.perf_counter() + args.seconds
        while len(times) < 5 or time.perf_counter() < end:
            begin = time.perf_counter()
            once()
            times.append((time.perf_counter() - begin) / layers)
        median = statistics.median(times)
        read = step.tokens * 2 * KV_HEADS * DIM * jnp.dtype(args.dtype).itemsize
        rates = f"{read / median / 1e9:>8.1f}{2 * step.products / median / 1e9:>9.1f}"
        print(f"{step.name:<25}{min(times) * 1e3:>8.3f}{median * 1e3:>8.3f}{rates}", flush=True)


if __name__ == "__main__":
    main()
