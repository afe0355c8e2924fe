"""OpenAI's request bodies, as far as they are served. Types are exact, unknown fields are refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec

from jaxserve.errors import InvalidRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.body import to_struct
from jaxserve.server.openai import fields

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
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    cache_salt: str | None = None
    priority: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream: true", "stream_options", "invalid_value")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def sampling_params(
        self, default_params: DefaultParams, written: dict[str, str], **special: Any
    ) -> SamplingParams:
        """The fields both have, and `special` ones; `written` maps a parameter to the field it came from."""
        given = {name: getattr(self, name) for name in _SHARED}
        given = {name: value for name, value in (given | special).items() if value is not None}
        kind = "delta" if self.stream else "final"
        with renamed(written):
            return default_params(output_kind=kind, **({"max_tokens": None} | given))


_SHARED = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("include_stop_str_in_output", "skip_special_tokens", "priority"),
)


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ChatRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.messages:
            raise InvalidRequest("messages must not be empty", "messages", "invalid_value")
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

    def params(self, default_params: DefaultParams) -> SamplingParams:
        limit = 16 if self.max_tokens is None else self.max_tokens
        return self.sampling_params(default_params, {}, max_tokens=limit, logprobs=self.logprobs)


def parse_chat(body: dict[str, Any]) -> ChatRequest:
    messages = body.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _check_message(message, f"messages[{i}]")
    _drop_no_ops(body, fields.CHAT)
    return to_struct(body, ChatRequest)


def parse_completion(body: dict[str, Any]) -> CompletionRequest:
    _drop_no_ops(body, fields.COMPLETION)
    return to_struct(body, CompletionRequest)


@contextmanager
def renamed(written: dict[str, str]) -> Iterator[None]:
    """Errors about a parameter name the field that the client wrote."""
    try:
        yield
    except InvalidRequest as error:
        head = (error.param or "").partition("[")[0]
        if head not in written:
            raise
        text, param = str(error), error.param or ""
        if text.startswith(head):
            text = written[head] + text.removeprefix(head)
        raise InvalidRequest(text, written[head] + param.removeprefix(head), error.code) from None


def _drop_no_ops(body: dict[str, Any], unsupported: fields.NoOps) -> None:
    fields.drop_no_ops(body, unsupported)
    if isinstance(options := body.get("stream_options"), dict):
        fields.drop_no_ops(options, fields.STREAM_OPTIONS, "stream_options.")


def _check_message(message: dict[str, Any], path: str) -> None:
    if (role := message.get("role")) in ("tool", "function"):
        raise InvalidRequest(
            f"{path}.role {role!r} is not supported by this server", f"{path}.role", "unsupported_field"
        )
    fields.drop_no_ops(message, fields.MESSAGE, f"{path}.")
