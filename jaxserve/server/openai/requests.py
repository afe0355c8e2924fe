"""OpenAI's request bodies, as far as they are served. Types are exact, unknown fields are refused."""

import re
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from jaxserve.engine.grammar.constraint import (
    GUIDED,
    Constraint,
    from_guided,
    from_response_format,
    from_structured_outputs,
    only_one,
)
from jaxserve.errors import InvalidRequest, renamed
from jaxserve.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from jaxserve.server.openai import fields
from jaxserve.server.openai.conversation import Conversation, take_conversation
from jaxserve.server.request_id import check_id
from jaxserve.structs import to_struct

DefaultParams = Callable[..., SamplingParams]
"""`AsyncEngine.default_params`: the parameters that are given, and the model's defaults."""


class AcceptedWithoutEffect(msgspec.Struct, kw_only=True):
    """What OpenAI's SDKs send and this server has no use for."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(AcceptedWithoutEffect, kw_only=True, forbid_unknown_fields=True):
    """What chat and completions have in common."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    truncate_prompt_tokens: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    thinking_token_budget: int | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Any = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def __post_init__(self) -> None:
        if self.request_id is not None:
            check_id(self.request_id)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", "stream_options", "invalid_value")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def constraint(self) -> Constraint | None:
        """The form that the output must have, in whichever way the client wrote it."""
        form, structured = self.response_format, self.structured_outputs
        return only_one(
            None if form is None else from_response_format(form),
            None if structured is None else from_structured_outputs(structured),
            from_guided({name: getattr(self, name) for name in (*GUIDED, "guided_whitespace_pattern")}),
        )

    def sampling_params(
        self, default_params: DefaultParams, written: dict[str, str], **special: Any
    ) -> SamplingParams:
        """The fields both have, and `special` ones; `written` maps a parameter to the field it came from."""
        given = {name: getattr(self, name) for name in _SHARED}
        given |= {"structured_outputs": self.constraint, "logit_bias": _logit_bias(self.logit_bias)}
        given = {name: value for name, value in (given | special).items() if value is not None}
        if self.use_beam_search:  # which is not for what the model's makers recommend for sampling
            given = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0} | given
        kind = "delta" if self.stream else "final"
        with renamed(written):
            return default_params(output_kind=kind, **({"max_tokens": None} | given))


_SHARED = (
    *(
        "n",
        "best_of",
        "use_beam_search",
        "length_penalty",
        "early_stopping",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "typical_p",
        "presence_penalty",
    ),
    *("frequency_penalty", "repetition_penalty", "allowed_token_ids", "bad_words", "seed", "stop"),
    *("stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    *("detokenize", "ignore_eos", "min_tokens", "prompt_logprobs", "truncate_prompt_tokens", "priority"),
    "thinking_token_budget",
)


def _logit_bias(bias: dict[str, Any] | None) -> dict[int, Any] | None:
    """By token ids, which are text as keys of JSON."""
    if bias is None:
        return None
    if len(bias) > MAX_LOGIT_BIAS:
        told = f"logit_bias has {len(bias)} tokens; at most {MAX_LOGIT_BIAS}"
        raise InvalidRequest(told, "logit_bias", "invalid_value")
    for key in bias:
        if not re.fullmatch("0|[1-9][0-9]{0,9}", key):
            told = f"the keys of logit_bias must be token ids, not {key!r}"
            raise InvalidRequest(told, f"logit_bias[{key}]", "invalid_value")
    return {int(key): value for key, value in bias.items()}


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    include_reasoning: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are the same: give one", "max_tokens", "invalid_value"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "top_logprobs", "invalid_value")

    @property
    def written(self) -> dict[str, str]:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"max_tokens": limit, "logprobs": "top_logprobs"}

    def params(self, default_params: DefaultParams) -> SamplingParams:
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling_params(default_params, self.written, max_tokens=limit, logprobs=logprobs)


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @property
    def only_echo(self) -> bool:
        """The prompt is all that is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def params(self, default_params: DefaultParams) -> SamplingParams:
        limit = 1 if self.only_echo else 16 if self.max_tokens is None else self.max_tokens
        params = self.sampling_params(default_params, {}, max_tokens=limit, logprobs=self.logprobs)
        if self.echo and params.logprobs is not None:
            params.prompt_logprobs = max(params.prompt_logprobs or 0, params.logprobs)
        return params


def parse_chat(body: dict[str, Any]) -> tuple[ChatRequest, Conversation]:
    conversation = take_conversation(body)
    _drop_no_ops(body, fields.CHAT)
    return to_struct(body, ChatRequest), conversation


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    _drop_no_ops(body, fields.COMPLETION)
    return to_struct(body, CompletionRequest)


def _drop_no_ops(body: dict[str, Any], unsupported: fields.NoOps) -> None:
    fields.drop_no_ops(body, unsupported)
    if isinstance(options := body.get("stream_options"), dict):
        fields.drop_no_ops(options, fields.STREAM_OPTIONS, "stream_options.")
