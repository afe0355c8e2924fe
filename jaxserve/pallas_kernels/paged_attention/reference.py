"""Paged attention, specified: write, gather each row's whole context, mask, softmax. All in float32.

Clear, not fast: it holds every row's context at once. All other implementations are tested against it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.pallas_kernels.paged_attention.meta import AttentionMeta
from jaxserve.pallas_kernels.paged_attention.pool import Pool, decode, parts, write


def paged_attention(q, k, v, pool, meta: AttentionMeta, *, scale, masking, sinks, alibi):
    """See the seam, `paged_attention/__init__.py`. The output of padding rows is 0."""
    heads, kv_heads = q.shape[1], k.shape[1]
    pool = write(pool, k, v, meta)
    keys, values = _contexts(pool, meta, q.dtype)  # [N, kv_heads, C, dim]
    keys, values = (jnp.repeat(x, heads // kv_heads, axis=1) for x in (keys, values))

    ahead = jnp.arange(keys.shape[2], dtype=jnp.int32) - meta.row_pos[:, None]  # [N, C]
    visible = ahead <= 0
    if masking.window:
        visible &= ahead > -masking.window
    visible &= meta.row_pos[:, None] >= 0

    logits = scale * jnp.einsum("nhd,nhcd->nhc", q.astype(jnp.float32), keys, precision=lax.Precision.HIGHEST)
    if masking.soft_cap:
        logits = masking.soft_cap * jnp.tanh(logits / masking.soft_cap)
    if alibi is not None:
        logits += alibi[:, None] * ahead[:, None, :]
    sink = jnp.full(heads, -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sink = jnp.broadcast_to(sink[:, None], (*logits.shape[:2], 1))
    logits = jnp.concatenate([sink, jnp.where(visible[:, None], logits, -jnp.inf)], axis=2)
    weights = jax.nn.softmax(logits, axis=2, where=jnp.isfinite(logits))[..., 1:]

    # what a row may not see is taken out of the values too: 0 * NaN would be NaN
    values = jnp.where(visible[:, None, :, None], values, 0.0)
    out = jnp.einsum("nhc,nhcd->nhd", weights, values, precision=lax.Precision.HIGHEST)
    return out.astype(q.dtype), pool


def _contexts(pool: Pool, meta: AttentionMeta, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Keys and values, float32 `[N, kv_heads, C, dim]`, of every slot in the block table of each row."""
    numbers, scales = parts(pool)
    tables = meta.block_tables[meta.row_seq]
    blocks = decode(numbers[tables], dtype).astype(jnp.float32)  # [N, W, 2, kv_heads, block_size, dim]
    if scales is not None:
        blocks *= scales[tables][..., None]
    n, width, _, heads, size, dim = blocks.shape
    blocks = blocks.transpose(0, 2, 3, 1, 4, 5).reshape(n, 2, heads, width * size, dim)
    return blocks[:, 0], blocks[:, 1]
