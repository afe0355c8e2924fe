"""What a user may ask of the sampler: one validated struct, shared by Python and HTTP."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from jaxserve.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_TOKENS = 1024
OutputKind = Literal["delta", "cumulative", "final"]


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to choose the tokens of one request.

    Raises `InvalidRequest` naming the field for a value out of range.
    """

    n: Annotated[int, Meta(description="sequences to generate for the prompt")] = 1
    temperature: Annotated[float, Meta(description="0 chooses the likeliest token")] = 1.0
    top_p: Annotated[float, Meta(description="smallest set of tokens with this mass")] = 1.0
    top_k: Annotated[int, Meta(description="this many likeliest tokens; 0 or -1: all")] = 0
    min_p: Annotated[float, Meta(description="tokens at least this likely, relative to the best")] = 0.0
    seed: Annotated[int | None, Meta(description="same seed, same tokens")] = None
    stop: Annotated[str | list[str] | None, Meta(description="strings that end the output")] = None
    stop_token_ids: Annotated[list[int] | None, Meta(description="tokens that end the output")] = None
    include_stop_str_in_output: bool = False
    ignore_eos: Annotated[bool, Meta(description="go on past the end-of-sequence token")] = False
    max_tokens: Annotated[int | None, Meta(description="None: the rest of the context")] = 16
    logprobs: Annotated[int | None, Meta(description="report this many alternatives per token")] = None
    priority: Annotated[int, Meta(description="lower goes first, under the policy priority")] = 0
    detokenize: bool = True
    skip_special_tokens: bool = True
    output_kind: OutputKind = "cumulative"

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        _integer("n", self.n, 1, 128)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _integer("max_tokens", self.max_tokens, 1)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        _integer("seed", self.seed, -(2**63), 2**64 - 1)
        _stop_strings(self.stop)
        _stop_tokens(self.stop_token_ids or ())
        for name in ("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"):
            _one_of(name, getattr(self, name), (True, False))
        _one_of("output_kind", self.output_kind, get_args(OutputKind))
        if self.stop and not self.detokenize:
            raise InvalidRequest("stop strings need detokenize=True", "stop")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> list[str]:
        return list(self.stop or ())


def _stop_strings(stop: object) -> None:
    if stop is None:
        return
    if not isinstance(stop, list) or any(not isinstance(s, str) for s in stop):
        raise InvalidRequest("stop must be a string or a list of strings", "stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS}", "stop")
    for i, s in enumerate(stop):
        if not s:
            raise InvalidRequest("a stop string must not be empty", f"stop[{i}]")


def _stop_tokens(tokens: Sequence[object]) -> None:
    if len(tokens) > MAX_STOP_TOKENS:
        told = f"stop_token_ids has {len(tokens)} tokens; at most {MAX_STOP_TOKENS}"
        raise InvalidRequest(told, "stop_token_ids")
    for i, token in enumerate(tokens):
        _integer(f"stop_token_ids[{i}]", token, 0)


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if value is None and name in ("max_tokens", "logprobs", "seed"):
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(f"{name} must be an integer, not {value!r}", name)
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {wanted}, not {value}", name)


def _number(name: str, value: object, low: float, high: float, above: bool = False) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, not {value!r}", name)
    if value > high or value < low or (above and value == low):
        wanted = f"above {low} and at most {high}" if above else f"between {low} and {high}"
        raise InvalidRequest(f"{name} must be {wanted}, not {value}", name)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise InvalidRequest(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}", name)
