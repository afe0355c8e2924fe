"""Paged attention: one seam, several implementations with the same contract.

    paged_attention(q, k, v, pool, meta, rotation, ...) -> (out, pool)

turns queries and keys, writes this step's keys and values into the pool, then attends. `reference.py` is the
specification.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta, ragged_meta
from jaxserve.pallas_kernels.paged_attention.pool import Pool, PoolShape, Scaled
from jaxserve.pallas_kernels.paged_attention.rotation import Rotation, rotate

__all__ = [
    "AttentionMeta",
    "Implementation",
    "Masking",
    "Pool",
    "PoolShape",
    "Rotation",
    "Scaled",
    "empty_pool",
    "paged_attention",
    "pool_shape",
    "ragged_meta",
    "read",
    "why_not",
    "why_not_scaled",
]

Implementation = Literal["reference", "xla", "gpu", "mosaic", "tpu", "cpu"]


class Masking(NamedTuple):
    """What a layer adds to plain causal attention. Static: part of the program."""

    window: int = 0
    """A row sees itself and the window - 1 positions before it; 0: all."""
    soft_cap: float = 0.0
    """cap * tanh(logit / cap); 0: none."""


PLAIN = Masking()


def pool_shape(shape: PoolShape, implementation: Implementation, shards: int = 1) -> PoolShape:
    """The pool that an implementation keeps for such heads over so many devices."""
    if implementation == "tpu":
        from jaxserve.pallas_kernels.paged_attention import tpu

        return tpu.pool_shape(shape, shards)
    return shape


def why_not_scaled(implementation: Implementation) -> str:
    """Why an implementation does not serve pools of 8 bits; empty when it does."""
    names = {"cpu": "the C++ kernel", "mosaic": "the Mosaic kernel", "tpu": "the TPU's kernel"}
    name = names.get(implementation)
    return f"{name} reads KV of the weights' type" if name else ""


def why_not(implementation: Implementation, dtype: Any, head_dim: int, alibi: bool = False) -> str:
    """Why an implementation does not serve such heads; empty when it does."""
    if implementation == "tpu":
        from jaxserve.pallas_kernels.paged_attention import tpu

        return tpu.why_not(dtype, head_dim, alibi=alibi or None)
    return ""


def empty_pool(shape: PoolShape, implementation: Implementation = "xla") -> Pool:
    """A layer's pool of zeros."""
    if implementation == "cpu":
        from jaxserve.pallas_kernels.paged_attention import cpu

        return cpu.empty_pool(shape)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape.arrays)


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: Pool,
    meta: AttentionMeta,
    rotation: Rotation | None = None,
    *,
    scale: float,
    dtype: jnp.dtype | None = None,
    masking: Masking = PLAIN,
    sinks: jax.Array | None = None,
    alibi: jax.Array | None = None,
    implementation: Implementation = "xla",
    interpret: bool = False,
) -> tuple[jax.Array, Pool]:
    """Causal attention of N query rows over a paged pool that first receives their k and v.

    q `[N, heads, dim]`, k and v `[N, kv_heads, dim]` (query head h reads KV head h // (heads // kv_heads)),
    pool `[num_blocks, 2, kv_heads, block_size, dim]`, `Scaled` or as `pool_shape` has it, `sinks` and `alibi`
    float32 `[heads]` (a sink is an extra logit that takes mass and gives nothing; ALiBi adds slope * (key
    position - query position)).
    `rotation` turns q and k first, in float32. Then the three are rounded to `dtype`, that of q if it is not
    given, and k and v to 8 bits for a pool of these. Returns out `[N, heads, dim]` of q's type (undefined in
    padding rows) and the pool. Softmax and accumulation are float32. `interpret` runs Pallas kernels in
    interpret mode. Raises ValueError where `why_not_scaled` has a reason.
    """
    kind, dtype = q.dtype, dtype or q.dtype
    options = {"scale": scale, "masking": masking, "sinks": sinks, "alibi": alibi}
    if isinstance(pool, Scaled) and (missing := why_not_scaled(implementation)):
        raise ValueError(f"{missing}, not of 8 bits")
    if implementation == "cpu":
        from jaxserve.pallas_kernels.paged_attention import cpu

        return cpu.paged_attention(q, k, v, pool, meta, rotation, dtype=dtype, **options)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
    if implementation == "gpu":
        from jaxserve.pallas_kernels.paged_attention import gpu

        out, pool = gpu.paged_attention(q, k, v, pool, meta, **options, interpret=interpret)
    elif implementation == "mosaic":
        from jaxserve.pallas_kernels.paged_attention import mosaic

        out, pool = mosaic.paged_attention(q, k, v, pool, meta, **options, interpret=interpret)
    elif implementation == "tpu":
        from jaxserve.pallas_kernels.paged_attention import tpu

        out, pool = tpu.paged_attention(q, k, v, pool, meta, **options, interpret=interpret)
    elif implementation == "reference":
        from jaxserve.pallas_kernels.paged_attention import reference

        out, pool = reference.paged_attention(q, k, v, pool, meta, **options)
    else:
        from jaxserve.pallas_kernels.paged_attention import xla

        out, pool = xla.paged_attention(q, k, v, pool, meta, **options)
    return out.astype(kind), pool


def read(pool: Pool, blocks: jax.Array, slots: jax.Array, implementation: Implementation) -> Pool:
    """Keys and values `[N, 2, kv_heads, dim]` in these slots of these blocks, as the pool stores them."""
    if implementation == "cpu":
        from jaxserve.pallas_kernels.paged_attention import cpu

        return cpu.read(pool, blocks, slots)
    if implementation == "tpu":
        from jaxserve.pallas_kernels.paged_attention import tpu

        return tpu.read(pool, blocks, slots)
    return jax.tree.map(lambda x: x[blocks, :, :, slots], pool)
