"""What crosses the line between text (detokenising, stop strings, HTTP) and tokens (the core).

In one process these structs are handed over as they are; between the HTTP process and the engine
process they travel as msgpack over a local socket. A request with n > 1 is n core requests.
"""

from typing import Any, Literal

import msgspec

from jaxserve.engine.grammar.source import Grammar
from jaxserve.outputs import ErrorCode, FinishReason


class Thoughts(msgspec.Struct, array_like=True):
    """Tokens of reasoning that may come before `close` does."""

    budget: int
    close: int
    open: int | None
    """The token that begins them, if the output does; None: they have begun."""


class BeamSearch(msgspec.Struct, kw_only=True):
    """The likeliest sequences are searched for with so many beams."""

    ids: list[str]
    """Of the sequences to give, the best first."""
    width: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


class CoreRequest(msgspec.Struct, tag="add", kw_only=True, omit_defaults=True):
    """One sequence to generate. Already validated; `max_tokens` fits the context and the pool."""

    id: str
    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    """None: the engine draws one."""
    sample_index: int = 0
    """Which of the request's n sequences this is: part of the random key."""
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: list[int] = []
    """No others; empty: all."""
    bad_words: list[list[int]] = []
    """Sequences of tokens that do not come."""
    min_tokens: int = 0
    """Nothing of `stop_token_ids` comes before."""
    thoughts: Thoughts | None = None
    grammar: Grammar | None = None
    """What the text must be."""
    logits_processors: Any = None
    """Functions of `SamplingParams`: they do not leave the process."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens to report beside each of the prompt's."""
    logprobs: int | None = None
    stop_token_ids: list[int] = []
    """Tokens that end the sequence (end-of-sequence tokens among them unless ignored)."""
    cache_salt: str = ""
    """Only requests with the same salt share the prefix cache."""
    tenant: str = ""
    """Whose it is: tenants take turns."""
    priority: int = 0
    """Lower goes first."""
    beams: BeamSearch | None = None
    follows: bool = False
    """Its request has an earlier sequence: the queue's limit is for requests."""


class Abort(msgspec.Struct, tag="abort"):
    """End a sequence now. Aborting an unknown or finished one does nothing."""

    id: str
    keep: int | None = None
    """How many of its tokens count, when a stop string ended it; None: the client went away."""


class StatsRequest(msgspec.Struct, tag="stats"):
    pass


class ResetPrefixCache(msgspec.Struct, tag="reset_prefix_cache"):
    pass


class Shutdown(msgspec.Struct, tag="shutdown"):
    pass


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Logprobs of one token: itself first, then the likeliest in order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """1 for the likeliest token."""


class CoreOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step added to one sequence."""

    id: str
    token_ids: list[int] = []
    """New tokens, a stop token that ended the sequence included."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """With the first token, where they are asked for: of the prompt's tokens from the second on."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int | None = None
    """With the first token: how much of the prompt the prefix cache had."""
    times: tuple[float, float] | None = None
    """With the first token: when the sequence came and first ran, in seconds of `time.monotonic()`."""
    error: str | None = None
    error_code: ErrorCode | None = None
    error_param: str | None = None
    """The field that is wrong, with the code `invalid_request`."""


class Outputs(msgspec.Struct, tag="outputs"):
    """All that one step gave, in one message."""

    outputs: list[CoreOutput]


class Status(msgspec.Struct, tag="status"):
    """Sent by the engine process on every change of state, and at least once a second."""

    state: Literal["loading", "ready", "warm", "failed"]
    steps: int = 0
    """Steps finished since start; a watchdog looks for it to move while work is waiting."""
    message: str = ""


class Hello(msgspec.Struct, tag="hello", kw_only=True):
    """Facts the text side needs, sent once when the model is loaded."""

    max_model_len: int
    max_request_tokens: int
    """Prompt plus output that the block pool can hold for a single sequence."""
    vocab_size: int


class Stats(msgspec.Struct, tag="stats_reply"):
    values: dict[str, Any]


ToCore = CoreRequest | Abort | StatsRequest | ResetPrefixCache | Shutdown
FromCore = Outputs | Status | Hello | Stats
