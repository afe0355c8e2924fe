"""What every implementation of paged attention is given besides q, k, v and the pool."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1
"""Position of a padding row: it writes nothing that is read, and its output is undefined."""


class AttentionMeta(NamedTuple):
    """A ragged batch of S sequences packed into N query rows. All int32.

    Sequences with a single query row come first, and sequence i of them sits at row i; rows of the
    others follow, each sequence's rows side by side. A sequence with `q_lens` 0 is padding.
    Only a batch of more rows than sequences (N > S) has sequences of several rows.
    """

    block_tables: jax.Array
    """[S, W] block ids of each sequence; entries past its length are 0 (the dummy block)."""
    starts: jax.Array
    """[S] tokens already in the pool before this step: the position of the first query row."""
    q_lens: jax.Array
    """[S] query rows of each sequence."""
    q_rows: jax.Array
    """[S] first query row of each sequence."""
    row_seq: jax.Array
    """[N] the sequence that a row belongs to (0 for padding rows)."""
    row_pos: jax.Array
    """[N] position of a row in its sequence; MASKED for padding rows."""

    @property
    def kv_lens(self) -> jax.Array:
        """[S] tokens each sequence attends to, this step's included; 0 for padding."""
        return jnp.where(self.q_lens > 0, self.starts + self.q_lens, 0)


def ragged_meta(
    block_tables: jax.Array, starts: jax.Array, q_lens: jax.Array, num_rows: int
) -> AttentionMeta:
    """The meta of S sequences packed in order into `num_rows` rows (single-row sequences first)."""
    ends = jnp.cumsum(q_lens)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    # compare_all: the default method becomes a while loop on a GPU
    seq = jnp.searchsorted(ends, rows, side="right", method="compare_all").astype(jnp.int32)
    live = seq < starts.shape[0]
    seq = jnp.where(live, seq, 0)
    q_rows = (ends - q_lens).astype(jnp.int32)
    pos = jnp.where(live, starts[seq] + rows - q_rows[seq], MASKED)
    return AttentionMeta(block_tables, starts, q_lens, q_rows, seq, pos.astype(jnp.int32))
