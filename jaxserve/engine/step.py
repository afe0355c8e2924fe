"""The functions that are compiled: admit, forward, sample and score. Pure, with donated state.

admit(slots, packed)                 -> slots
forward(weights, kv, slots, packed)  -> (kv, slots, logits, targets, hidden)
sample(slots, logits, raw, targets)  -> (slots, sampled)
score(weights, hidden, tokens)       -> scored

Between forward and sample some rows' logits are changed (shaping.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.engine.batch import FROM_DEVICE, TABLE_AT, StepLayout
from jaxserve.engine.sampling import RowParams, Variant, with_logprobs
from jaxserve.engine.sampling import sample as choose
from jaxserve.pallas_kernels.paged_attention import AttentionMeta, Pool, ragged_meta
from jaxserve.pallas_kernels.sampling import Implementation

SCORED = 64
"""Rows that are scored at a time: no more of them than have logits at once."""
Weights = list[jax.Array]
KV = list[Pool]


class Slots(NamedTuple):
    """What the device remembers of each running request; the last slot is the dummy for padding."""

    last_token: jax.Array
    """int32 [slots + 1]."""
    tables: jax.Array
    """int32 [slots + 1, width]: block tables."""
    params: RowParams
    """Sampling parameters, each [slots + 1, ...]."""

    @classmethod
    def shapes(cls, count: int, width: int) -> "Slots":
        """The abstract state of `count` slots with tables of `width` blocks."""

        def of(dtype: type, *more: int) -> Any:
            return jax.ShapeDtypeStruct((count + 1, *more), dtype)

        f32, i32 = jnp.float32, jnp.int32
        params = RowParams(of(f32), of(f32), of(f32), of(i32), of(jnp.uint32, 2), of(i32))
        return cls(of(i32), of(i32, width), params)


def admit(slots: Slots, packed: jax.Array) -> Slots:
    """Write one request's sampling parameters and block table (see AdmitLayout) into its slot."""
    floats = lax.bitcast_convert_type(packed[5:TABLE_AT], jnp.float32)
    seed = lax.bitcast_convert_type(packed[1:3], jnp.uint32)
    new = RowParams(floats[0], floats[1], floats[2], packed[4], seed, packed[3])
    params = RowParams(*(old.at[packed[0]].set(value) for old, value in zip(slots.params, new, strict=True)))
    return slots._replace(params=params, tables=slots.tables.at[packed[0]].set(packed[TABLE_AT:]))


class Model(NamedTuple):
    """What a step needs of a model, as pure functions of its weights."""

    hidden: Callable[[Weights, jax.Array, AttentionMeta, KV], tuple[jax.Array, KV]]
    """(weights, ids [N], meta, kv) -> (float32 [N, features], kv)."""
    logits: Callable[[Weights, jax.Array, jax.Array], jax.Array]
    """(weights, float32 [R, features], rows that are not padding: int32 []) -> float32 [R, vocab]."""


def forward(
    model: Model, layout: StepLayout, weights: Weights, kv: KV, slots: Slots, packed: jax.Array
) -> tuple[KV, Slots, jax.Array, jax.Array, jax.Array | None]:
    """One step of the model over a packed batch.

    Returns the pools, the slots with grown block tables, logits float32 [seqs, vocab] of each
    sequence's last row, int32 [seqs, 2] targets: the slot that gets each sampled token (the dummy
    where none is sampled) and the token's position, and of a mixed bucket the hidden states of all rows,
    float32 [tokens, features].
    """
    step = layout.fields(packed)
    with jax.named_scope("gather"):
        at = step["update_slot"], step["update_index"]
        tables = slots.tables.at[at].set(step["update_block"], mode="promise_in_bounds")
        slots = slots._replace(tables=tables)
        meta = ragged_meta(tables[step["slots"]], step["starts"], step["q_lens"], layout.bucket.tokens)
        last = slots.last_token[step["slots"]][meta.row_seq]
        ids = jnp.where(step["tokens"] == FROM_DEVICE, last, step["tokens"])
    x, kv = model.hidden(weights, ids, meta, kv)
    hidden = x if layout.bucket.mixed else None
    with jax.named_scope("head"):
        if layout.bucket.mixed:
            x = x[jnp.maximum(meta.q_rows + meta.q_lens - 1, 0)]
        logits = model.logits(weights, x, jnp.sum(meta.q_lens > 0))
    dummy = slots.last_token.shape[0] - 1
    target = jnp.where(step["samples"] > 0, step["slots"], dummy)
    return kv, slots, logits, jnp.stack([target, meta.kv_lens], axis=1), hidden


def sample(
    variant: Variant,
    implementation: Implementation,
    slots: Slots,
    logits: jax.Array,
    raw: jax.Array,
    targets: jax.Array,
) -> tuple[Slots, jax.Array]:
    """Choose each row's token and remember it in the row's slot. What was chosen comes as `Sampled.pack`.

    `raw`: the model's own logits, where a request changed them.
    """
    target, position = targets[:, 0], targets[:, 1]
    params = RowParams(*(value[target] for value in slots.params))
    sampled = choose(logits, params, position, variant, implementation, raw)
    return slots._replace(last_token=slots.last_token.at[target].set(sampled.tokens)), sampled.pack()


def score(
    model: Model, implementation: Implementation, weights: Weights, hidden: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Logprobs of the tokens int32 [N] that follow the rows [N, features], as `Sampled.pack`.

    Blocks of `SCORED` rows in which no token is asked for (-1) are left out.
    """

    def logprobs(x: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = model.logits(weights, x, jnp.int32(SCORED))
        return with_logprobs(logits, jnp.maximum(tokens, 0), implementation).pack()

    def nothing(x: jax.Array, tokens: jax.Array) -> jax.Array:
        return jnp.zeros_like(jax.eval_shape(logprobs, x, tokens))

    def block(rows: tuple[jax.Array, jax.Array]) -> Any:
        return lax.cond(jnp.any(rows[1] >= 0), logprobs, nothing, *rows)

    scored: jax.Array = lax.map(
        block, (hidden.reshape(-1, SCORED, hidden.shape[1]), tokens.reshape(-1, SCORED))
    )
    return scored.reshape(len(tokens), -1)
