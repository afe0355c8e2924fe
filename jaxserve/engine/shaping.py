"""What a request does to its logits before a token is chosen, row by row on the device.

Order: logit_bias; repetition, frequency and presence penalties; the mask of tokens that may come; typical_p.
The sampler's temperature and filters follow. Steps in which no row asks for any of it do not run it.

enter(shaping, packed)                        -> shaping
shape(shaping, slots, logits, targets, rows)  -> (shaping, logits)
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.sampling import mass_threshold
from jaxserve.engine.step import Slots
from jaxserve.sampling_params import MAX_LOGIT_BIAS

ShapeVariant = Literal["typical", "plain", "masks"]
"""What a shape program can do: any row; any row without typical_p; only masks."""
IN_PROMPT = 1 << 15
"""In a count: the prompt has the token. What is below is how often it was generated."""
HEAD = 6
"""Words before the biases in an entering request's buffer."""


class Shaping(NamedTuple):
    """What the device remembers of each running request; the last slot is the dummy for padding."""

    factors: jax.Array
    """float32 [slots + 1, 4]: repetition, frequency and presence penalty, typical_p."""
    length: jax.Array
    """int32 [slots + 1]: how many tokens the counts are of."""
    bias_tokens: jax.Array
    """int32 [slots + 1, MAX_LOGIT_BIAS]."""
    bias: jax.Array
    """float32 [slots + 1, MAX_LOGIT_BIAS]; 0 where there is none."""
    counts: jax.Array
    """uint16 [slots + 1, vocab]: see IN_PROMPT."""

    @classmethod
    def shapes(cls, count: int, vocab: int) -> "Shaping":
        """The abstract state of `count` slots."""

        def of(dtype: type, *more: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count + 1, *more), dtype)

        biases = of(jnp.int32, MAX_LOGIT_BIAS), of(jnp.float32, MAX_LOGIT_BIAS)
        return cls(of(jnp.float32, 4), of(jnp.int32), *biases, of(jnp.uint16, vocab))  # type: ignore[arg-type]

    @classmethod
    def bytes(cls, count: int, vocab: int) -> int:
        """That the state of `count` slots takes."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in cls.shapes(count, vocab))


def is_shaped(spec: CoreRequest) -> bool:
    """Whether a request has a part in `Shaping`; its mask has none."""
    factors = spec.repetition_penalty, spec.frequency_penalty, spec.presence_penalty, spec.typical_p
    return factors != (1.0, 0.0, 0.0, 1.0) or bool(spec.logit_bias)


class EnterLayout(NamedTuple):
    """The packed buffer that writes one request's part of `Shaping` into its slot."""

    vocab: int

    @property
    def size(self) -> int:
        return HEAD + 2 * MAX_LOGIT_BIAS + (self.vocab + 1) // 2

    def pack(self, slot: int, spec: CoreRequest, output: Sequence[int]) -> np.ndarray:
        """int32 [size]; `output`: what was generated so far."""
        packed = np.zeros(self.size, np.int32)
        packed[:2] = slot, len(spec.prompt) + len(output)
        floats = packed.view(np.float32)
        floats[2:HEAD] = (
            *(spec.repetition_penalty, spec.frequency_penalty),
            *(spec.presence_penalty, spec.typical_p),
        )
        biases = len(spec.logit_bias)
        packed[HEAD : HEAD + biases] = list(spec.logit_bias)
        values = HEAD + MAX_LOGIT_BIAS
        floats[values : values + biases] = list(spec.logit_bias.values())
        counts = packed[values + MAX_LOGIT_BIAS :].view(np.uint16)
        counts[: self.vocab] = np.minimum(np.bincount(output, minlength=self.vocab), IN_PROMPT - 1)
        counts[spec.prompt] |= IN_PROMPT
        return packed


def enter(vocab: int, shaping: Shaping, packed: jax.Array) -> Shaping:
    """Write one request's part (see EnterLayout) into its slot."""
    tokens, bias, counts = jnp.split(packed[HEAD:], (MAX_LOGIT_BIAS, 2 * MAX_LOGIT_BIAS))
    new = Shaping(
        lax.bitcast_convert_type(packed[2:HEAD], jnp.float32),
        packed[1],
        tokens,
        lax.bitcast_convert_type(bias, jnp.float32),
        lax.bitcast_convert_type(counts, jnp.uint16).reshape(-1)[:vocab],
    )
    return Shaping(*(old.at[packed[0]].set(value) for old, value in zip(shaping, new, strict=True)))


class RowsLayout(NamedTuple):
    """What the rows of a step are to the host: whether a row has a part in `Shaping`, and its mask."""

    rows: int
    vocab: int

    @property
    def words(self) -> int:
        """Of 32 bits in a mask."""
        return (self.vocab + 31) // 32

    def empty(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """uint32 [rows, 1 + words], and views of it: the first column, 0, and the masks, of all tokens."""
        packed = np.full((self.rows, 1 + self.words), 2**32 - 1, np.uint32)
        packed[:, 0] = 0
        return packed, packed[:, 0], packed[:, 1:]


def shape(
    variant: ShapeVariant,
    shaping: Shaping,
    slots: Slots,
    logits: jax.Array,
    targets: jax.Array,
    rows: jax.Array,
) -> tuple[Shaping, jax.Array]:
    """The logits float32 [rows, vocab] as each row's request wants them; `rows` as RowsLayout has them.

    A row's last token is counted first, unless it is known already. A row gets the same bits whoever is
    beside it.
    """
    if variant == "masks":
        return shaping, _masked(logits, rows)
    target, position = targets[:, 0], targets[:, 1]
    here = rows[:, 0] > 0

    last = slots.last_token[target]
    count = shaping.counts[target, last]
    new = here & (shaping.length[target] < position) & (count & (IN_PROMPT - 1) < IN_PROMPT - 1)
    shaping = shaping._replace(
        counts=shaping.counts.at[target, last].set(count + new.astype(jnp.uint16)),
        length=shaping.length.at[target].set(position),
    )
    logits = _masked(_weigh(shaping, target, here, logits), rows)
    if variant == "plain":
        return shaping, logits
    temperature = slots.params.temperature[target]
    mass = jnp.where(here & (temperature > 0.0), shaping.factors[target, 3], 1.0)
    typical = partial(_typical, temperature, mass)
    return shaping, lax.cond(jnp.any(mass < 1.0), typical, lambda logits: logits, logits)


def _masked(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """Without the tokens that may not come."""
    bits = rows[:, 1:, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed = bits.reshape(bits.shape[0], -1)[:, : logits.shape[1]] > 0
    return jnp.where(allowed, logits, -jnp.inf)


def _weigh(shaping: Shaping, target: jax.Array, here: jax.Array, logits: jax.Array) -> jax.Array:
    """With biases and penalties, in the rows that are `here`."""
    repetition, frequency, presence, _ = jnp.split(
        jnp.where(here[:, None], shaping.factors[target], jnp.float32([1, 0, 0, 1])), 4, axis=1
    )
    bias = jnp.where(here[:, None], shaping.bias[target], 0.0)
    logits = logits.at[jnp.arange(len(target))[:, None], shaping.bias_tokens[target]].add(bias)
    counts = shaping.counts[target]
    generated = (counts & (IN_PROMPT - 1)).astype(jnp.float32)
    repeated = jnp.where(logits > 0.0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, repeated, logits)
    return logits - frequency * generated - jnp.where(generated > 0.0, presence, 0.0)


def _typical(temperature: jax.Array, mass: jax.Array, logits: jax.Array) -> jax.Array:
    """Only the tokens whose surprise is nearest to the expected one, until they have this mass.

    Meister et al., "Locally Typical Sampling", 2022.
    """
    logp = jax.nn.log_softmax(logits / jnp.where(temperature > 0.0, temperature, 1.0)[:, None], axis=1)
    p = jnp.exp(logp)
    expected = -jnp.sum(jnp.where(p > 0.0, p * logp, 0.0), axis=1, keepdims=True)
    nearness = jnp.where(p > 0.0, -jnp.abs(expected + logp), -jnp.inf)
    floor = mass_threshold(nearness, p, mass * p.sum(axis=1))
    return jnp.where((mass[:, None] >= 1.0) | (nearness >= floor), logits, -jnp.inf)
