"""The one case table for every implementation of paged attention, and an oracle in float64."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged_attention import (
    AttentionMeta,
    Masking,
    Pool,
    PoolShape,
    Rotation,
    Scaled,
    pool_shape,
    ragged_meta,
    read,
)


@dataclass(frozen=True)
class Case:
    """A ragged batch: sequence i has `starts[i]` tokens in the pool and gets `q_lens[i]` more."""

    name: str
    q_lens: tuple[int, ...]
    starts: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    block_size: int = 16
    dtype: Any = jnp.float32
    pool_dtype: Any = None
    """The type of the pool's numbers, where it is not `dtype`."""
    bits: bool = False
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    alibi: bool = False
    rotary: bool = False
    """q, k and v are float32 and not rotated yet."""
    pad_rows: int = 0
    pad_seqs: int = 0
    extra_width: int = 0
    """Entries of the block table that no sequence needs."""
    gap: int = 0
    """Padding rows between the single-row sequences and the others."""
    zeros: bool = False
    """Keys and values of every other token are 0."""
    shared_blocks: int = 0
    """Leading blocks that sequence 1 has in common with sequence 0."""

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    pool: Pool
    meta: AttentionMeta
    options: dict[str, Any]
    """scale, masking, sinks, alibi and dtype."""
    rotation: Rotation | None = None

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.options["dtype"] or self.q.dtype)


BF16 = jnp.bfloat16
INT8, FP8 = jnp.int8, jnp.float8_e4m3fn
DECODE = ((1, 1, 1), (4, 32, 16))
MIXED = ((1, 1, 7, 12), (39, 2, 0, 18))

CASES = [
    Case("decode", *DECODE),
    Case("decode one sequence", (1,), (9,)),
    Case("decode first token", (1,), (0,)),
    Case("decode long", (1, 1), (300, 63), extra_width=3),
    Case("decode long window", (1, 1), (300, 63), window=100),
    Case("decode long sinks", (1, 1), (300, 63), sinks=True),
    Case("decode long alibi bf16", (1, 1), (300, 63), alibi=True, dtype=BF16),
    Case("decode padded", *DECODE, pad_seqs=2, pad_rows=2),
    Case("decode exactly fills a block", (1, 1), (15, 31)),
    Case("decode shared prefix", (1, 1), (40, 37), shared_blocks=2),
    Case("mixed", *MIXED),
    Case("mixed padded", *MIXED, pad_seqs=2, pad_rows=5, extra_width=2),
    Case("mixed gap", *MIXED, pad_rows=3, gap=3),
    Case("mixed many rows", (1, 70, 33), (20, 0, 17), pad_rows=3),
    Case("prefill", (17,), (0,)),
    Case("prefill two", (5, 20), (0, 0), pad_rows=3),
    Case("prefill exactly fills blocks", (16, 32), (0, 0)),
    Case("chunk", (12, 9), (25, 16)),
    Case("chunk long", (10,), (290,)),
    Case("only padding", (), (), pad_seqs=2, pad_rows=2),
    Case("only padding rows", (), (), pad_seqs=2, pad_rows=20),
    Case("gqa 1", *MIXED, heads=3, kv_heads=3),
    Case("gqa 3", *MIXED, heads=9, kv_heads=3),
    Case("gqa 7", *MIXED, heads=14, kv_heads=2),
    Case("gqa 8", *MIXED, heads=8, kv_heads=1),
    Case("gqa 24", *MIXED, heads=24, kv_heads=1),
    *(Case(f"head size {d}", *MIXED, dim=d) for d in (16, 64, 80, 96, 128, 256)),
    *(Case(f"block size {b}", *MIXED, block_size=b) for b in (4, 32, 64, 128, 256)),
    Case("window", *MIXED, window=5),
    Case("window of one", *MIXED, window=1),
    Case("window wider than the context", *MIXED, window=1000),
    Case("soft cap", *MIXED, soft_cap=2.0),
    Case("window and soft cap", *MIXED, window=9, soft_cap=2.0),
    Case("sinks", *MIXED, sinks=True),
    Case("sinks and window", *MIXED, sinks=True, window=6),
    Case("alibi", *MIXED, alibi=True),
    Case("everything", *MIXED, heads=9, kv_heads=3, dim=80, sinks=True, alibi=True, window=11, soft_cap=3.0),
    Case("bf16", *MIXED, dtype=BF16),
    Case("bf16 decode", *DECODE, dtype=BF16),
    Case("bf16 bits", *MIXED, dtype=BF16, bits=True),
    Case("f16 bits", *MIXED, dtype=jnp.float16, bits=True),
    Case("f32 over a bf16 pool", *MIXED, pool_dtype=BF16),
    Case("rotary", *MIXED, rotary=True, pad_rows=3),
    Case("rotary bf16 bits", *MIXED, heads=9, kv_heads=3, dim=80, rotary=True, dtype=BF16, bits=True),
    Case("rotary f16 bits", *MIXED, dim=256, rotary=True, dtype=jnp.float16, bits=True),
]

EVERYTHING = {"heads": 9, "kv_heads": 3, "dim": 80, "window": 11, "soft_cap": 3.0}
EVERYTHING |= {"sinks": True, "alibi": True}
IN_8_BITS = [
    Case(f"{number.__name__} {name}", *batch, pool_dtype=number, **layer)
    for numbers, name, batch, layer in [
        ((INT8,), "decode", DECODE, {}),
        ((INT8, FP8), "decode bf16", DECODE, {"dtype": BF16}),
        ((INT8,), "decode long window", ((1, 1), (300, 63)), {"window": 100}),
        ((FP8,), "decode long sinks", ((1, 1), (300, 63)), {"sinks": True}),
        ((INT8, FP8), "mixed", MIXED, {}),
        ((INT8, FP8), "mixed bf16", MIXED, {"dtype": BF16}),
        ((INT8, FP8), "mixed f16 bits", MIXED, {"dtype": jnp.float16, "bits": True}),
        ((INT8,), "mixed gap", MIXED, {"pad_rows": 3, "gap": 3}),
        ((FP8,), "shared prefix", ((1, 1), (40, 37)), {"shared_blocks": 2}),
        ((INT8,), "only padding", ((), ()), {"pad_seqs": 2, "pad_rows": 20}),
        ((INT8, FP8), "head size 20", MIXED, {"dim": 20}),
        ((FP8,), "head size 256", MIXED, {"dim": 256}),
        ((FP8,), "block size 64", MIXED, {"block_size": 64}),
        ((INT8,), "soft cap", MIXED, {"soft_cap": 2.0}),
        ((INT8,), "alibi", MIXED, {"alibi": True}),
        ((INT8, FP8), "rows of zeros", MIXED, {"zeros": True, "pad_rows": 2}),
        ((INT8, FP8), "rotary bf16", MIXED, {"rotary": True, "dtype": BF16}),
        ((INT8, FP8), "everything", MIXED, EVERYTHING),
        ((FP8,), "everything bf16", MIXED, EVERYTHING | {"dtype": BF16}),
    ]
    for number in numbers
]


def make(case: Case, seed: int = 0) -> Inputs:
    """Random inputs for a case; slots of the pool that hold no context have values that would show."""
    rng = np.random.default_rng(seed)
    seqs = len(case.q_lens)
    q_lens = np.array([*case.q_lens, *[0] * case.pad_seqs], np.int32)
    starts = np.array([*case.starts, *[0] * case.pad_seqs], np.int32)
    blocks_of = [-(-(n + s) // case.block_size) for n, s in zip(case.q_lens, case.starts, strict=True)]
    num_blocks = 2 + sum(blocks_of)
    tables = np.zeros((len(q_lens), max(blocks_of, default=1) + case.extra_width), np.int32)
    free = rng.permutation(np.arange(1, num_blocks))
    for i in range(seqs):
        tables[i, : blocks_of[i]], free = free[: blocks_of[i]], free[blocks_of[i] :]
    if case.shared_blocks:
        tables[1, : case.shared_blocks] = tables[0, : case.shared_blocks]

    rows = int(q_lens.sum()) + case.pad_rows + case.gap
    meta = ragged_meta(*map(jnp.asarray, (tables, starts, q_lens)), rows)
    if case.gap:
        singles = sum(n == 1 for n in case.q_lens)
        meta = _with_gap(meta, singles, case.gap)

    number = jnp.dtype(case.pool_dtype or case.dtype)
    shape = PoolShape(num_blocks, case.kv_heads, case.block_size, case.dim, number, case.bits)
    pool = rng.standard_normal(shape.shape, np.float32)
    live = np.zeros((num_blocks, case.block_size), bool)
    for i in range(seqs):
        p = np.arange(case.starts[i])
        live[tables[i, p // case.block_size], p % case.block_size] = True
    if case.zeros:
        pool[..., ::2, :] = 0.0
    pool = jax.tree.map(jnp.asarray, stored(np.where(live[:, None, None, :, None], pool, 1000.0), shape))

    def normal(heads):
        kind = jnp.float32 if case.rotary else case.dtype
        return jnp.asarray(rng.standard_normal((rows, heads, case.dim), np.float32), kind)

    slopes = jnp.asarray(2.0 ** -rng.uniform(1, 6, case.heads), jnp.float32)
    options = {
        "scale": case.dim**-0.5,
        "masking": Masking(case.window, case.soft_cap),
        "sinks": jnp.asarray(rng.standard_normal(case.heads), jnp.float32) if case.sinks else None,
        "alibi": slopes if case.alibi else None,
        "dtype": case.dtype if case.rotary else None,
    }
    q, k, v = normal(case.heads), normal(case.kv_heads), normal(case.kv_heads)
    if case.zeros:
        k, v = k.at[::2].set(0.0), v.at[::2].set(0.0)
    angles = rng.uniform(0, 2 * np.pi, (rows, case.dim // 2)).astype(np.float32)
    rotation = Rotation(jnp.cos(angles), jnp.sin(angles)) if case.rotary else None
    return Inputs(q, k, v, pool, meta, options, rotation)


def _with_gap(meta: AttentionMeta, singles: int, gap: int) -> AttentionMeta:
    """The same batch with `gap` padding rows after the single-row sequences, taken from the end."""
    rows = meta.row_pos.shape[0]
    order = np.r_[0:singles, rows - gap : rows, singles : rows - gap]
    q_rows = jnp.where(meta.q_lens > 1, meta.q_rows + gap, meta.q_rows)
    return meta._replace(q_rows=q_rows, row_seq=meta.row_seq[order], row_pos=meta.row_pos[order])


def stored(x: np.ndarray, like: PoolShape) -> Any:
    """Numbers [..., dim] as such a pool stores them."""
    if not like.scaled:
        return x.astype(like.dtype).view(like.storage)
    x, largest = x.astype(np.float32), np.float32(jnp.finfo(FP8).max if like.dtype == FP8 else 127)
    top = np.abs(x).max(axis=-1, initial=0.0)
    x = x * np.divide(largest, top, out=np.zeros_like(top), where=top > 0)[..., None]
    x = x if like.dtype == FP8 else np.rint(x)
    return Scaled(x.astype(like.dtype).view(like.storage), top * (1 / largest))


def numbers(stored: Any, dtype: Any) -> np.ndarray:
    """float64 of what a pool stores; `dtype` is what its bits mean, where it has 16."""
    if isinstance(stored, Scaled):
        x = np.asarray(stored.numbers)
        x = x.view(FP8) if x.dtype == np.uint8 else x
        return x.astype(np.float64) * np.asarray(stored.scales, np.float64)[..., None]
    x = np.asarray(stored)
    return (x.view(jnp.dtype(dtype)) if x.dtype == np.uint16 else x).astype(np.float64)


def rotated(x: Inputs, queries: jax.Array) -> np.ndarray:
    """Queries or keys [N, heads, dim], each half of them the two parts of complex numbers, turned."""
    if x.rotation is None:
        return np.asarray(queries)
    cos, sin = (np.asarray(part, np.float64)[:, None] for part in x.rotation)
    real, imaginary = np.split(np.asarray(queries, np.float64), 2, axis=2)
    turned = (real + 1j * imaginary) * (cos + 1j * sin)
    return np.concatenate([turned.real, turned.imag], axis=2).astype(np.float32)


def oracle(x: Inputs) -> tuple[np.ndarray, Any]:
    """(out float64 `[N, heads, dim]`, pool as stored), one sequence, row and head at a time."""
    pool = jax.tree.map(np.array, x.pool)
    kind = pool.numbers.dtype if isinstance(pool, Scaled) else pool.dtype
    number = jnp.dtype({"uint16": x.dtype, "uint8": FP8}.get(kind.name, kind))
    q = np.asarray(rotated(x, x.q).astype(x.dtype), np.float64)
    rows = np.stack([rotated(x, x.k).astype(x.dtype), np.asarray(x.v).astype(x.dtype)], axis=1)
    rows = stored(rows, PoolShape(0, 0, 0, 0, number, kind == np.uint16))
    meta = AttentionMeta(*map(np.asarray, x.meta))
    size = jax.tree.leaves(pool)[0].shape[3]
    group = q.shape[1] // x.k.shape[1]
    scale, (window, cap) = x.options["scale"], x.options["masking"]
    for s, n in enumerate(meta.q_lens):
        for i in range(n):
            p = meta.starts[s] + i
            block = meta.block_tables[s, p // size]
            for array, new in zip(*map(jax.tree.leaves, (pool, rows)), strict=True):
                array[block, :, :, p % size] = new[meta.q_rows[s] + i]

    out = np.zeros(q.shape)
    content = numbers(pool, x.dtype)
    for s, n in enumerate(meta.q_lens):
        for i in range(n):
            row, p = meta.q_rows[s] + i, meta.starts[s] + i
            seen = np.arange(max(0, p - window + 1) if window else 0, p + 1)
            context = content[meta.block_tables[s, seen // size], :, :, seen % size]  # [C, 2, kv_heads, dim]
            for h in range(q.shape[1]):
                logits = context[:, 0, h // group] @ q[row, h] * scale
                if cap:
                    logits = cap * np.tanh(logits / cap)
                if x.options["alibi"] is not None:
                    logits = logits + float(x.options["alibi"][h]) * (seen - p)
                weights = np.exp(logits - logits.max())
                mass = weights.sum()
                if x.options["sinks"] is not None:
                    mass += np.exp(float(x.options["sinks"][h]) - logits.max())
                out[row, h] = weights @ context[:, 1, h // group] / mass
    return out, pool


def stored_for(implementation: str, pool: Any) -> Any:
    """A pool as an implementation keeps it, of one as `pool.py` describes it."""
    if implementation == "tpu":
        blocks, _, heads, size, dim = pool.shape
        shape = pool_shape(PoolShape(blocks, heads, size, dim, pool.dtype), "tpu")
        short = (0, shape.kv_heads - heads), (0, 0), (0, shape.head_dim - dim)
        x = np.pad(np.asarray(pool).transpose(0, 3, 2, 1, 4), ((0, 0), (0, 0), *short))
        return jnp.asarray(x.reshape(shape.shape))
    if implementation != "cpu":
        return pool
    x, n = np.asarray(pool), 4 // pool.dtype.itemsize
    blocks, _, heads, size, dim = x.shape
    keys = x[:, 0].reshape(blocks, heads, size, dim // n, n).swapaxes(2, 3)
    values = x[:, 1].reshape(blocks, heads, size // n, n, dim).swapaxes(3, 4)
    return jnp.asarray(np.stack([part.reshape(blocks, heads, size, dim) for part in (keys, values)], axis=1))


def plain(implementation: str, pool: Any, like: Any) -> Any:
    """The inverse; `like` is a pool as `pool.py` describes it."""
    if implementation not in ("cpu", "tpu"):
        return jax.tree.map(np.asarray, pool)
    shape = like.shape
    blocks, _, heads, size, dim = shape
    at = np.indices((blocks, size)).reshape(2, -1)
    rows = np.asarray(read(pool, *at, implementation))[:, :, :heads, :dim]
    return rows.reshape(blocks, size, 2, heads, dim).transpose(0, 2, 3, 1, 4)
