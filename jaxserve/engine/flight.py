"""A step on its way: what was dispatched, and what is read of it."""

from typing import NamedTuple

import jax
import numpy as np

from jaxserve.engine.messages import TokenLogprobs
from jaxserve.engine.sampling import Sampled
from jaxserve.engine.scheduler import Chunk


class Flight(NamedTuple):
    """A step whose tokens the host has not read."""

    chunks: list[Chunk]
    tokens: int = 0
    """Of all chunks."""
    logits: jax.Array | None = None
    """While the tokens are not chosen."""
    targets: jax.Array | None = None
    sampled: jax.Array | None = None
    """None when no chunk reached the end of its sequence."""
    scored: jax.Array | None = None
    """Of prompts, where their logprobs are asked for."""
    error: Exception | None = None
    """Why the step could not be dispatched."""
    program: str = ""
    dispatched: float = 0.0
    """When, in seconds of `time.monotonic()`."""

    @property
    def done(self) -> jax.Array | None:
        """There when the device has done the passes over the model."""
        return self.targets if self.scored is None else self.scored


def logprobs_of(host: Sampled, row: int, rows: int, count: int) -> list[TokenLogprobs]:
    """Of so many rows from one on, each with the `count` likeliest."""
    assert host.logprobs is not None and host.top_tokens is not None
    assert host.top_logprobs is not None and host.ranks is not None
    at = slice(row, row + rows)
    tokens = np.column_stack([host.tokens[at], host.top_tokens[at, :count]])
    logprobs = np.column_stack([host.logprobs[at], host.top_logprobs[at, :count]])
    return list(map(TokenLogprobs, tokens.tolist(), logprobs.tolist(), host.ranks[at].tolist()))


def asks_for_scores(chunks: list[Chunk]) -> bool:
    """Whether a step is to give logprobs of a prompt."""
    return any(chunk.request.unscored(chunk.start, chunk.length) for chunk in chunks)


def keep_scores(chunks: list[Chunk], scored: Sampled) -> None:
    """Give the requests what a step says of their prompts. Steps are read in order, so none is left out."""
    row = 0
    for request, start, length, _, _ in chunks:
        if asked := request.unscored(start, length):
            first, count = row + asked.start - start, request.spec.prompt_logprobs
            assert count is not None
            request.scores += logprobs_of(scored, first, len(asked), count)
        row += length
