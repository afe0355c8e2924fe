"""Choosing tokens on the device, row by row, without sorting the vocabulary.

Order of filters: temperature, min_p, top_k, top_p. A filter is a threshold on the logits, found by
bisection; equal logits stay together. A row draws one uniform number from its own key (seed, sample
index, position) and inverts the cumulative distribution, so its token does not depend on the batch.
What is here in XLA is the same in C++, for CPUs, and in one kernel for GPUs (pallas_kernels/sampling).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.pallas_kernels.sampling import Implementation
from jaxserve.pallas_kernels.sampling.search import SMALLEST_TEMPERATURE, first_above, threshold
from jaxserve.sampling_params import MAX_LOGPROBS

Variant = Literal["greedy", "random", "full"]
"""What a sample program can do: greedy rows only; any row; any row and logprobs."""

LANES = 128
Words = tuple[jax.Array, jax.Array]


class RowParams(NamedTuple):
    """Sampling parameters of R rows."""

    temperature: jax.Array
    """float32 [R]; 0 for greedy."""
    top_p: jax.Array
    min_p: jax.Array
    top_k: jax.Array
    """int32 [R]; 0 for all."""
    seed: jax.Array
    """uint32 [R, 2]."""
    sample_index: jax.Array
    """int32 [R]."""


class Sampled(NamedTuple):
    """Tokens int32 [R]; with logprobs also their own and the likeliest tokens' (natural log, float32)."""

    tokens: jax.Array | np.ndarray
    logprobs: jax.Array | np.ndarray | None = None
    ranks: jax.Array | np.ndarray | None = None
    top_tokens: jax.Array | np.ndarray | None = None
    top_logprobs: jax.Array | np.ndarray | None = None

    def pack(self) -> jax.Array:
        """int32 [R, 1], or [R, 3 + 2 * top]: all of it as one array to read, floats by their bits."""
        columns = [x[:, None] if x.ndim == 1 else x for x in self if x is not None]
        return jnp.concatenate([lax.bitcast_convert_type(x, jnp.int32) for x in columns], axis=1)

    @classmethod
    def unpack(cls, packed: np.ndarray) -> "Sampled":
        """Views of what `pack` gave, on the host."""
        tokens = packed[:, 0]
        if packed.shape[1] == 1:
            return cls(tokens)
        floats, top = packed.view(np.float32), (packed.shape[1] - 3) // 2
        return cls(tokens, floats[:, 1], packed[:, 2], packed[:, 3 : 3 + top], floats[:, 3 + top :])


def sample(
    logits: jax.Array,
    params: RowParams,
    positions: jax.Array,
    variant: Variant,
    implementation: Implementation = "xla",
    raw: jax.Array | None = None,
) -> Sampled:
    """Tokens for float32 logits [R, vocab]; `positions` int32 [R] are those the tokens will have.

    Logprobs are those of `raw`, the model's own logits, if these are others.
    """
    if variant == "greedy":
        u = jnp.zeros_like(params.temperature)
        params = params._replace(temperature=u)
    else:
        u = uniform(params.seed, params.sample_index, positions, implementation)
    if implementation != "xla":
        kernel = _kernel(implementation)
        tokens = kernel(logits, params.temperature, params.top_p, params.min_p, params.top_k, u)
    else:
        tokens = argmax(logits)
        if variant != "greedy":
            tokens = jnp.where(params.temperature > 0.0, _draw(logits, params, u), tokens)
    if variant != "full":
        return Sampled(tokens)
    return with_logprobs(logits if raw is None else raw, tokens, implementation)


def _kernel(implementation: Implementation) -> Callable[..., jax.Array]:
    if implementation == "cpu":
        from jaxserve.pallas_kernels.sampling import cpu

        return cpu.sample
    from jaxserve.pallas_kernels.sampling import gpu

    return gpu.sample


def argmax(logits: jax.Array) -> jax.Array:
    """int32 [R]: the first of the largest: the first group that has it, and its place there.

    One pass over the logits, and nothing of their size is kept; a fused argmax is slow on a CPU.
    """
    groups = _groups(logits, -jnp.inf)
    tops = groups.max(axis=2)
    best = tops.max(axis=1, keepdims=True)
    group = _first(tops == best)
    members = jnp.take_along_axis(groups, group[:, None, None], 1)[:, 0]
    return jnp.minimum(group * LANES + _first(members == best), logits.shape[1] - 1)


def _first(which: jax.Array) -> jax.Array:
    """int32 [R]: the first column of [R, N] that is true, else the last."""
    index = lax.broadcasted_iota(jnp.int32, which.shape, 1)
    return jnp.min(jnp.where(which, index, which.shape[1] - 1), axis=1)


def _groups(x: jax.Array, filler: float = 0.0) -> jax.Array:
    """[R, N, LANES]: the columns of [R, V] in groups of neighbours, the last one filled up."""
    rows, columns = x.shape
    return jnp.pad(x, ((0, 0), (0, -columns % LANES)), constant_values=filler).reshape(rows, -1, LANES)


def uniform(
    seed: jax.Array, sample_index: jax.Array, positions: jax.Array, implementation: Implementation = "xla"
) -> jax.Array:
    """float32 [R] in [0, 1), a function of each row's seed, sample index and position alone."""
    if implementation == "cpu":
        from jaxserve.pallas_kernels.sampling import cpu

        return cpu.uniform(seed, sample_index, positions)

    key = jnp.zeros_like(seed[:, 0]), jnp.zeros_like(seed[:, 0])
    for word in (seed[:, 0], seed[:, 1], sample_index.astype(jnp.uint32), positions.astype(jnp.uint32)):
        key = threefry(key, word)
    high, low = threefry(key, jnp.zeros_like(key[0]))
    # of a number in [1, 2)
    return lax.bitcast_convert_type((high ^ low) >> 9 | 0x3F800000, jnp.float32) - 1.0


def threefry(key: Words, word: jax.Array) -> Words:
    """The counter (0, word) scrambled under a key: what `jax.random.fold_in` gives, for keys in arrays.

    Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """
    keys = *key, key[0] ^ key[1] ^ 0x1BD11BDA
    a, b = keys[0], word + keys[1]
    for i in range(5):
        for by in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            a += b
            b = (b << by | b >> (32 - by)) ^ a
        a, b = a + keys[(i + 1) % 3], b + keys[(i + 2) % 3] + (i + 1)
    return a, b


def _draw(logits: jax.Array, params: RowParams, u: jax.Array) -> jax.Array:
    """int32 [R]: a token of each row's filtered distribution, at quantile u."""
    return _quantile(filtered(logits, params), u)


def filtered(logits: jax.Array, params: RowParams) -> jax.Array:
    """float32 [R, vocab]: relative probabilities after temperature and filters; the largest is 1."""
    drawn = params.temperature > 0.0
    temperature = jnp.where(drawn, jnp.maximum(params.temperature, SMALLEST_TEMPERATURE), 1.0)[:, None]
    top = logits.max(axis=1, keepdims=True)
    # the largest becomes 0 first, so that no temperature overflows
    weights = jnp.exp((logits - top) / temperature)
    vocab = logits.shape[1]
    top_k = jnp.where(drawn & (params.top_k > 0), jnp.minimum(params.top_k, vocab), vocab)
    top_p = jnp.where(drawn, params.top_p, 1.0)

    def keep_top_k(floor: jax.Array) -> jax.Array:
        return jnp.maximum(floor, mass_threshold(logits, jnp.ones_like(logits), top_k.astype(jnp.float32)))

    def keep_top_p(floor: jax.Array) -> jax.Array:
        kept = jnp.where(logits >= floor, weights, 0.0)
        threshold = mass_threshold(logits, kept, top_p * kept.sum(axis=1))
        # a row without top_p keeps its tail, which rounding could cut off, whoever shares the batch
        return jnp.where(top_p[:, None] < 1.0, jnp.maximum(floor, threshold), floor)

    floor = top + temperature * jnp.log(params.min_p)[:, None]
    floor = lax.cond(jnp.any(top_k < vocab), keep_top_k, lambda x: x, floor)
    floor = lax.cond(jnp.any(top_p < 1.0), keep_top_p, lambda x: x, floor)
    return jnp.where(logits >= floor, weights, 0.0)


def mass_threshold(x: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """float32 [R, 1]: the largest t for which the weights [R, V] of x >= t sum to at least target [R]."""

    def above(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = x >= t[:, None]
        # both sums in one pass, which keeps nothing: apart, each would write what it adds up first
        parts = _groups(jnp.where(at, weights, 0.0)), _groups(at.astype(jnp.float32))
        mass, count = lax.reduce(parts, (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] + b[1]), (2,))
        return mass.sum(axis=1), count.sum(axis=1)

    least, most = x.min(axis=1), x.max(axis=1)
    return threshold(above, target, least, most, jnp.full(least.shape, float(x.shape[1])))[:, None]


def _quantile(weights: jax.Array, u: jax.Array) -> jax.Array:
    """int32 [R]: the first index at which the running sum of weights [R, V] exceeds u of the total."""
    lanes = _groups(weights)
    totals = lanes.sum(axis=2)
    sums = jnp.cumsum(totals, axis=1)
    goal = u[:, None] * sums[:, -1:]
    lane = first_above(totals, sums, goal)[:, None]
    before = jnp.take_along_axis(sums - totals, lane, 1)
    chosen = jnp.take_along_axis(lanes, lane[:, :, None], 1)[:, 0]
    index = first_above(chosen, jnp.cumsum(chosen, axis=1), goal - before)
    return lane[:, 0] * LANES + index


def with_logprobs(
    logits: jax.Array, tokens: jax.Array, implementation: Implementation = "xla"
) -> Sampled:
    """The tokens with logprobs of the model's own distribution, before temperature and filters."""
    top = min(MAX_LOGPROBS, logits.shape[1])
    if implementation == "cpu":
        from jaxserve.pallas_kernels.sampling import cpu

        return Sampled(tokens, *cpu.logprobs(logits, tokens, top))
    norm = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    ranks = 1 + jnp.sum(logits > own, axis=1, dtype=jnp.int32)
    best, ids = largest(logits, top)
    return Sampled(tokens, (own - norm)[:, 0], ranks, ids, best - norm)


def largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest of each row of [R, V] in order, of equal ones the first: [R, count]; int32 their places.

    They lie in `count` groups, those with the largest of their own: only these are sorted.
    """
    groups = _groups(x, -jnp.inf)
    rows, many, _ = groups.shape
    chosen = jnp.sort(lax.top_k(groups.max(axis=2), min(count, many))[1], axis=1)
    members = jnp.take_along_axis(groups, chosen[:, :, None], 1)
    best, at = lax.top_k(members.reshape(rows, -1), count)
    return best, jnp.take_along_axis(chosen, at // LANES, 1) * LANES + at % LANES
