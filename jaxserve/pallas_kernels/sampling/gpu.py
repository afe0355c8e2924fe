"""Choosing tokens on NVIDIA GPUs: one Pallas kernel (Triton backend), of which a program has a row.

A program goes over its row tile by tile: for the largest logit; for a list of what filters could keep; for
each tile's mass. Thresholds are looked for in the list, which is short in any real distribution: the turns
of that search cost little. If it would be long the row itself is searched, which is slower, not wrong.

The Triton backend of Pallas is deprecated in newer releases of jax; everything that depends on it is here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxserve.pallas_kernels.sampling.search import SMALLEST_TEMPERATURE, first_above, threshold

LOG2E = 1.4426950408889634
LANES = 4096
"""Logits of a tile."""
LISTED = 8
"""Tiles that a list can have."""
WARP = 8 * 32
"""Those of a warp: two loads of 16 bytes in a thread."""
AT_ONCE = 4
"""Tiles that are loaded together: 64 KiB on their way keep a multiprocessor busy."""


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    top_k: jax.Array,
    u: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """int32 [R]: a token of each row's filtered distribution, at quantile u; the likeliest at temperature 0.

    logits float32 [R, vocab]; the others float32 [R], top_k int32 [R], 0 for all.
    """
    rows, vocab = logits.shape
    lanes = min(LANES, max(WARP, pl.next_power_of_2(vocab)))
    lists = rows, min(LISTED, pl.cdiv(vocab, lanes)), lanes
    tokens, _ = pl.pallas_call(
        partial(_kernel, barrier=(lambda: None) if interpret else triton.debug_barrier),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct(lists, jnp.float32)],
        compiler_params=triton.CompilerParams(num_warps=lanes // WARP, num_stages=1),
        interpret=interpret,
        name="sample",
    )(logits, temperature, top_p, min_p, top_k, u)
    return tokens


def _kernel(
    logits_ref, temperature_ref, top_p_ref, min_p_ref, top_k_ref, u_ref, tokens_ref, list_ref, *, barrier
):
    """The token of one row."""
    row, vocab = pl.program_id(0), logits_ref.shape[1]
    _, depth, lanes = list_ref.shape
    tiles = pl.cdiv(vocab, lanes)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    zeros = jnp.zeros((lanes,), jnp.float32)

    def tile(i):
        at = i * lanes + lane
        return triton.load(logits_ref.at[row, at], mask=at < vocab, other=-jnp.inf)

    def sweep(tiles, body, state):
        """body(i, tile i, state) over all tiles."""

        def several(j, state):
            loaded = [tile(j * AT_ONCE + i) for i in range(AT_ONCE)]
            for i, x in enumerate(loaded):
                state = body(j * AT_ONCE + i, x, state)
            return state

        return lax.fori_loop(0, (tiles + AT_ONCE - 1) // AT_ONCE, several, state)

    def larger(i, x, state):
        tops, where = state
        return jnp.where(x > tops, x, tops), jnp.where(x > tops, i, where)

    tops, where = sweep(tiles, larger, (zeros - jnp.inf, lane * 0))
    top = tops.max()
    best = jnp.where(tops == top, where * lanes + lane, vocab - 1).min()
    temperature = jnp.maximum(temperature_ref[row], SMALLEST_TEMPERATURE)
    slope = LOG2E / temperature

    def weights(x, floor):
        return jnp.where(x >= floor, jnp.exp2((x - top) * slope), 0.0)

    def filtered():
        """The least logit that filters keep."""
        top_k, top_p = top_k_ref[row], top_p_ref[row]
        few, nucleus = (top_k > 0) & (top_k < vocab), top_p < 1.0
        k = top_k.astype(jnp.float32)
        floor = top + temperature * jnp.log(min_p_ref[row])

        # what is kept is above both: there are k lanes with a logit from here on, ...
        def lanes_above(t):
            count = (tops >= t).astype(jnp.float32).sum()
            return count, count

        seen = (few & (top_k <= lanes)).astype(jnp.float32) * lanes
        of_lanes = threshold(lanes_above, k, tops.min(), top, seen)
        bound = jnp.where(seen > 0.0, of_lanes, -jnp.inf)
        # ... and all those that are less likely than this have less than 1 - p, even together
        tail = top + temperature * jnp.log((1.0 - top_p) / (2 * vocab))
        bound = jnp.maximum(floor, jnp.where(few, bound, jnp.where(nucleus, tail, -jnp.inf)))

        def collect(_, x, state):
            mass, count = state
            keep = (x >= bound) & (x > -jnp.inf)
            room = keep & (count < depth)
            # lanes that list nothing point past the end: interpret mode writes masked lanes too
            at = jnp.where(room, count, depth)
            triton.store(list_ref.at[row, at, lane], x, mask=room)
            return mass + weights(x, floor), count + keep.astype(jnp.int32)

        turns = (few | nucleus).astype(jnp.int32) * tiles
        mass, count = sweep(turns, collect, (zeros, lane * 0))
        barrier()  # a thread may read what another listed

        longest = count.max()
        short = longest <= depth

        def listed(i):
            return triton.load(list_ref.at[row, i, lane], mask=i < count, other=jnp.nan)

        def above(t):
            """Mass and number of logits from t on; t is not below the bound."""

            def add(i, sums):
                x = lax.cond(short, listed, tile, i)
                return sums[0] + weights(x, t), sums[1] + (x >= t).astype(jnp.float32)

            mass, number = lax.fori_loop(0, jnp.where(short, longest, tiles), add, (zeros, zeros))
            return mass.sum(), number.sum()

        most = count.sum().astype(jnp.float32)
        kth = threshold(lambda t: (above(t)[1],) * 2, k, bound, top, jnp.where(few, most, 0.0))
        floor = jnp.where(few, jnp.maximum(floor, kth), floor)
        mass = jnp.where(few, above(floor)[0], mass.sum())
        least = jnp.maximum(floor, bound)
        last = threshold(above, top_p * mass, least, top, jnp.where(nucleus, most, 0.0))
        return jnp.where(nucleus, jnp.maximum(floor, last), floor)

    def draw():
        floor = filtered()
        index = jnp.arange(pl.next_power_of_2(tiles), dtype=jnp.int32)

        def add(i, x, masses):
            return jnp.where(index == i, weights(x, floor).sum(), masses)

        masses = sweep(tiles, add, jnp.zeros(index.shape, jnp.float32))
        sums = jnp.cumsum(masses)
        goal = u_ref[row] * sums.max()
        chosen = first_above(masses, sums, goal)
        goal -= jnp.where(index == chosen, sums - masses, 0.0).sum()
        inside = weights(tile(chosen), floor)
        return chosen * lanes + first_above(inside, jnp.cumsum(inside), goal)

    # where the largest is no number that can be subtracted there is nothing to draw from
    drawn = (temperature_ref[row] > 0.0) & (jnp.abs(top) < jnp.inf)
    tokens_ref[row] = lax.cond(drawn, draw, lambda: best)
