"""What a request gives back, in the field's shapes: `o.prompt`, `o.outputs[0].text`."""

from typing import Literal

import msgspec

from jaxserve.errors import EngineDied, InvalidRequest, QueueFull
from jaxserve.text.parsers.events import Event, Message, collect

FinishReason = Literal["stop", "length", "abort", "error"]
ErrorCode = Literal["queue_full", "invalid_request"]
"""Failures that are not the engine's: the same request may succeed later, or never."""


class Logprob(msgspec.Struct):
    """Natural log of one token's probability under the model (before temperature and filters)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class SequenceMetrics(msgspec.Struct):
    """When things happened to a sequence, in seconds of `time.monotonic()`; 0: not yet."""

    queued_ts: float = 0.0
    """It came to the engine."""
    scheduled_ts: float = 0.0
    """It first ran."""
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_generation_tokens: int = 0


class CompletionOutput(msgspec.Struct):
    """One of a request's `n` sequences: all of it so far, or with output_kind="delta" what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None for end-of-sequence and length."""
    metrics: SequenceMetrics = msgspec.field(default_factory=SequenceMetrics)
    """One for all outputs of the sequence: it goes on."""
    events: list[Event] | None = None
    """Of a chat with tools or a model that reasons: what the text says, in order."""
    reasoning_tokens: int = 0
    """How many of `token_ids` are reasoning."""

    @property
    def message(self) -> Message:
        """The text as reasoning, content and tool calls; of a whole output, not of what is new in one."""
        return Message(self.text) if self.events is None else collect(self.events)

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct):
    """The state of one request after a step."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """Of the prompt's tokens, where they were asked for; None of the first. With output_kind="delta" they
    come once, with the first output."""
    num_cached_tokens: int = 0
    num_unused_tokens: int = 0
    """Of the sequences that were generated for `best_of` and are not among the outputs."""
    error: str | None = None
    """Set when the request failed in the engine; its outputs then have finish_reason "error"."""
    error_code: ErrorCode | None = None
    error_param: str | None = None
    """The field that is wrong, with the code `invalid_request`."""

    @property
    def metrics(self) -> SequenceMetrics:
        """Of the first of these outputs; with `n` > 1 each has its own."""
        return self.outputs[0].metrics

    def raise_failure(self) -> None:
        """Raises QueueFull, InvalidRequest or EngineDied for a request that failed."""
        if self.error_code == "queue_full":
            raise QueueFull(f"request {self.request_id}: {self.error}")
        if self.error_code == "invalid_request":
            raise InvalidRequest(self.error or "", self.error_param)
        if self.error is not None:
            raise EngineDied(f"request {self.request_id}: {self.error}")


class BeamSearchSequence(msgspec.Struct):
    """A sequence that a beam search found. As in vLLM its tokens and text begin with the prompt's."""

    tokens: list[int]
    text: str | None
    """None without a tokenizer."""
    cum_logprob: float
    score: float
    """What it is ranked by: the log probability under the length penalty."""
    output: CompletionOutput
    """What comes after the prompt."""

    @property
    def logprobs(self) -> list[dict[int, Logprob]]:
        return self.output.logprobs or []

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.output.finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        return self.output.stop_reason


class BeamSearchOutput(msgspec.Struct):
    """What a beam search found for one prompt, the best first."""

    sequences: list[BeamSearchSequence]
