"""Paged attention in plain XLA: runs anywhere, and is laid out for the CPU.

Two loops over the context, both with a bound that the batch sets, so that a step costs what its
contexts cost: one over all single-row sequences at once, one over tiles of the other sequences' rows.
Pages are gathered with the head folded into the page index, which lands them in the batched product's
own layout.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.paged_attention.meta import MASKED, AttentionMeta
from jaxserve.pallas_kernels.paged_attention.pool import decode, parts, write

CHUNK = 256
"""Context tokens that one turn of a loop attends to."""
GROUP = 8
"""Single-row sequences that one turn handles: what they gather should stay in the processor's cache."""
TILE = 128
"""Query rows of one sequence that one turn of the tile loop handles."""
NEVER = -1e30


class _Softmax(NamedTuple):
    """A softmax under way over B batches of M rows: running maximum, mass and weighted values."""

    top: jax.Array
    mass: jax.Array
    acc: jax.Array


class _Heads(NamedTuple):
    """What the rows of a query batch are: all float32 and `[B, M]`, or None."""

    sinks: jax.Array | None
    alibi: jax.Array | None


def paged_attention(q, k, v, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi):
    """See the seam, `paged_attention/__init__.py`."""
    n, heads, dim = q.shape
    kv_heads = k.shape[1]
    pool = write(pool, k.astype(q.dtype), v.astype(q.dtype), meta)
    scaled = (q.astype(jnp.float32) * scale).reshape(n, kv_heads, heads // kv_heads, dim)
    attend = partial(_attend, pool=pool, number=q.dtype, masking=masking)
    per_head = _Heads(*(None if x is None else x.reshape(kv_heads, -1) for x in (sinks, alibi)))
    singles = min(meta.q_lens.shape[0], n)
    # float32: products this thin are faster in it than in bf16 on a CPU, and a row has the same bits alone
    # as in a tile
    out = _attend_singles(attend, scaled[:singles], meta, per_head)
    if n > meta.q_lens.shape[0]:
        out = jnp.concatenate([out, jnp.zeros((n - singles, *out.shape[1:]), out.dtype)])
        out = _attend_tiles(attend, scaled, out, meta, per_head)
    return out.astype(q.dtype).reshape(n, heads, dim), pool


def _attend_singles(attend, q, meta, per_head):
    """out f32 [R, kv_heads, group, dim] of the first R rows, right where a row is its whole sequence."""
    rows = q.shape[0]
    single = meta.q_lens[:rows] == 1
    pos = jnp.where(single, meta.starts[:rows], MASKED)
    tables = jnp.where(single[:, None], meta.block_tables[:rows], 0)
    several = partial(_attend_rows, attend, per_head)
    whole = rows // GROUP * GROUP
    if whole <= GROUP:
        return several(q, pos, tables)
    out = lax.map(lambda x: several(*x), _split((q, pos, tables), whole))
    out = out.reshape(whole, *out.shape[2:])
    rest = (x[whole:] for x in (q, pos, tables))
    return out if whole == rows else jnp.concatenate([out, several(*rest)])


def _split(arrays, whole):
    """The first `whole` rows of each array, GROUP at a time."""
    return tuple(x[:whole].reshape(-1, GROUP, *x.shape[1:]) for x in arrays)


def _attend_rows(attend, per_head, q, pos, tables):
    rows, kv_heads, group, dim = q.shape
    heads = _Heads(*(None if x is None else jnp.tile(x, (rows, 1)) for x in per_head))
    q_pos = jnp.repeat(pos, kv_heads)[:, None]
    out = attend(q.reshape(rows * kv_heads, group, dim), q_pos, tables, heads=heads)
    return out.reshape(q.shape)


def _attend_tiles(attend, q, out, meta, per_head):
    """`out` with the rows of all sequences of more than one row filled in, a tile of rows at a time."""
    n, kv_heads, group, dim = q.shape
    tile = min(TILE, n)
    tiles = jnp.where(meta.q_lens > 1, -(-meta.q_lens // tile), 0)
    ends = jnp.cumsum(tiles)
    heads = _Heads(*(None if x is None else jnp.tile(x, (1, tile)) for x in per_head))

    def body(t, out):
        seq = jnp.sum(ends <= t)
        in_seq = (t - ends[seq] + tiles[seq]) * tile + jnp.arange(tile, dtype=jnp.int32)
        live = in_seq < meta.q_lens[seq]
        # a slice that would run past the last row is moved back by XLA: ask for where it will be
        first = jnp.minimum(meta.q_rows[seq] + in_seq[0], n - tile)
        shift = meta.q_rows[seq] + in_seq[0] - first
        rows = lax.dynamic_slice_in_dim(q, first, tile)
        rows = jnp.roll(rows, -shift, axis=0)
        pos = jnp.where(live, meta.starts[seq] + in_seq, MASKED)
        batch = rows.transpose(1, 0, 2, 3).reshape(kv_heads, tile * group, dim)
        q_pos = jnp.repeat(pos, group)[None]
        got = attend(batch, q_pos, meta.block_tables[seq][None], heads=heads)
        got = got.reshape(kv_heads, tile, group, dim).transpose(1, 0, 2, 3)
        old = lax.dynamic_slice_in_dim(out, first, tile)
        index = jnp.arange(tile, dtype=jnp.int32)
        mine = (index >= shift) & jnp.roll(live, shift)
        new = jnp.where(mine[:, None, None, None], jnp.roll(got, shift, axis=0), old)
        return lax.dynamic_update_slice_in_dim(out, new, first, axis=0)

    return lax.fori_loop(0, ends[-1], body, out)


def _attend(q, q_pos, tables, *, pool, number, masking, heads):
    """Attention of q [B, M, dim] over S paged contexts, B = S * kv_heads; f32 [B, M, dim].

    q is scaled already and float32, as the products are; q_pos [B, M] or [B, 1] or [1, M] (MASKED
    rows see nothing); tables [S, W]; `number` is the type of the pool's numbers.
    """
    numbers, scales = parts(pool)
    _, _, kv_heads, size, dim = numbers.shape
    width = tables.shape[1]
    pages = max(1, CHUNK // size)  # whatever the table's width: the order of sums depends on it
    chunk = pages * size
    padded = jnp.pad(tables, ((0, 0), (0, -width % pages)))
    planes = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    batch, rows = q.shape[:2]

    def gather(blocks, plane):
        index = (blocks[:, None, :] * (2 * kv_heads) + plane + planes).reshape(batch, pages)

        def get(array):
            got = array.reshape(-1, *array.shape[3:]).at[index].get(mode="promise_in_bounds")
            return got.reshape(batch, chunk, *array.shape[4:])

        got = decode(get(numbers), number).astype(jnp.float32)
        # with the numbers, which are widened in memory anyway
        return got if scales is None else got * get(scales)[..., None]

    def body(i, state: _Softmax) -> _Softmax:
        blocks = lax.dynamic_slice_in_dim(padded, i * pages, pages, axis=1)
        k, v = gather(blocks, 0), gather(blocks, kv_heads)
        k_pos = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        # past a sequence's end lies what a block's last owner left: a weight of 0 would not stop its NaN
        v = jnp.where((k_pos <= newest)[..., None], v, 0)
        return _absorb(state, q, k, v, q_pos, k_pos, masking, heads)

    newest = q_pos.max(axis=1, keepdims=True)
    first = 0
    if masking.window:
        lowest = jnp.min(jnp.where(q_pos == MASKED, jnp.iinfo(jnp.int32).max, q_pos))
        first = jnp.maximum(lowest - masking.window + 1, 0) // chunk
    last = jnp.max(q_pos) // chunk + 1
    state = lax.fori_loop(first, last, body, _begin(batch, rows, dim, heads.sinks))
    return state.acc / jnp.where(state.mass == 0.0, 1.0, state.mass)[..., None]


def _begin(batch, rows, dim, sinks) -> _Softmax:
    acc = jnp.zeros((batch, rows, dim), jnp.float32)
    if sinks is None:
        return _Softmax(jnp.full((batch, rows), NEVER), jnp.zeros((batch, rows)), acc)
    return _Softmax(sinks.astype(jnp.float32), jnp.ones((batch, rows)), acc)


def _absorb(state: _Softmax, q, k, v, q_pos, k_pos, masking, heads) -> _Softmax:
    """The softmax after one more chunk of context: k and v [B, C, dim] at k_pos [C]."""
    dot = partial(lax.dot_general, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    logits = dot(q, k, (((2,), (2,)), ((0,), (0,))))
    if masking.soft_cap:
        logits = masking.soft_cap * jnp.tanh(logits / masking.soft_cap)
    ahead = k_pos - q_pos[..., None]
    if heads.alibi is not None:
        logits += heads.alibi[..., None] * ahead
    visible = ahead <= 0
    if masking.window:
        visible &= ahead > -masking.window
    logits = jnp.where(visible, logits, NEVER)
    top = jnp.maximum(state.top, logits.max(axis=2))
    # a row that sees nothing yet has top == NEVER: its weights must be 0, not exp(0)
    weights = jnp.where(visible, jnp.exp(logits - top[..., None]), 0.0)
    keep = jnp.exp(state.top - top)
    got = dot(weights, v, (((2,), (1,)), ((0,), (0,))))
    return _Softmax(top, state.mass * keep + weights.sum(axis=2), state.acc * keep[..., None] + got)
