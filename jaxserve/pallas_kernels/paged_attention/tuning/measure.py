"""Attention of one layer, timed as in a step: for the tuner, and for bench/gpu."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged_attention import Implementation, paged_attention, ragged_meta
from jaxserve.pallas_kernels.timing import seconds_per_call

BLOCK = 16
CALLS = 4
"""Dispatched at a time, each over other blocks."""
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
"""For interpreted kernels, whose time means nothing."""
if jax.__version_info__ < (0, 11):  # the option is gone in newer releases
    QUICK_COMPILE["xla_cpu_use_fusion_emitters"] = False


class Heads(NamedTuple):
    query: int
    kv: int
    dim: int


class Work(NamedTuple):
    """Sequences with `rows` new tokens each, after `before` others."""

    sequences: int
    rows: int
    before: int

    def cost(self, heads: Heads, itemsize: int = 2) -> tuple[float, float]:
        """(bytes, operations) that no implementation can do without, in one layer: queries in, outputs out,
        new keys and values in and to the pool, and each key and value of the context once."""
        numbers = 2 * heads.query * self.rows + 2 * heads.kv * (self.before + 2 * self.rows)
        pairs = self.rows * self.before + self.rows * (self.rows + 1) / 2
        each = self.sequences * heads.dim
        return float(itemsize * each * numbers), 4.0 * each * heads.query * pairs


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


class Layers:
    """Some layers in a row over one pool, in which each has blocks of its own: no context is in a cache."""

    def __init__(self, heads: Heads, tokens: int, count: int = 8, interpret: bool = False):
        """A pool for so many tokens of bfloat16."""
        self.heads = heads
        self.count = count
        self._interpret = interpret
        self._pool = normal(0, 1 + tokens // BLOCK, 2, heads.kv, BLOCK, heads.dim)

    def compile(self, work: Work, implementation: Implementation) -> Any:
        """The layers' program. Raises what a kernel raises that cannot be had."""
        q, kv, tables, meta = self._inputs(work)
        attend = jax.jit(
            partial(paged_attention, scale=0.1, implementation=implementation, interpret=self._interpret)
        )

        def step(state, kv, tables, starts, q_lens):
            q, pool = state
            for table in tables:
                out, pool = attend(q, kv, kv, pool, ragged_meta(table, starts, q_lens, len(q)))
                q = (q + out) / 2
            return q, pool

        lowered = jax.jit(step, donate_argnums=0).lower((q, self._pool), kv, tables[0], *meta)
        return lowered.compile(QUICK_COMPILE if self._interpret else None)

    def milliseconds(self, work: Work, program: Any) -> float:
        """Of one layer, the write into the pool included."""
        q, kv, tables, meta = self._inputs(work)
        state = q, jnp.copy(self._pool)
        return (
            1e3
            / self.count
            * seconds_per_call(lambda state, i: program(state, kv, tables[i], *meta), state, CALLS)
        )

    def _inputs(self, work: Work) -> tuple[jax.Array, jax.Array, list[jax.Array], list[jax.Array]]:
        """Queries, keys (as values too), and for each call a block table per layer; starts and lengths."""
        count, rows, before = work
        width = -(-(before + rows) // BLOCK)
        each = count * width
        blocks = 1 + np.random.default_rng(0).permutation(len(self._pool) - 1)
        sets = min(CALLS * self.count, len(blocks) // each)
        if not sets:
            raise ValueError(f"{work} needs {each} blocks, and the pool has {len(blocks)}")
        tables = blocks[: sets * each].reshape(sets, count, width)
        tables = tables[np.arange(CALLS * self.count) % sets].reshape(CALLS, self.count, count, width)
        q, kv = (normal(n, count * rows, n, self.heads.dim) for n in self.heads[:2])
        meta = [jnp.full(count, n, jnp.int32) for n in (before, rows)]
        return q, kv, [jnp.asarray(table, jnp.int32) for table in tables], meta
