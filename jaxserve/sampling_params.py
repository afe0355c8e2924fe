"""What a user may ask of the sampler: one validated struct, shared by Python and HTTP."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from jaxserve.engine.grammar.constraint import (
    Constraint,
    StructuredOutputs,
    from_structured_outputs,
    only_one,
)
from jaxserve.errors import InvalidRequest, renamed

MAX_SEQUENCES = 128
MAX_LOGPROBS = 20
MAX_BEAMS = 10
"""Of its likeliest next tokens a beam knows `MAX_LOGPROBS`: those that go on, and as many that may end it."""
MAX_STOP_STRINGS = 64
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_TOKENS = 2**18
LONGEST_BAD_WORD = 256
StructuredOutputsParams = GuidedDecodingParams = StructuredOutputs
"""As vLLM calls it, now and in its older versions."""
LogitsProcessor = Callable[[list[int], Any], Any]
"""Takes the tokens generated so far and float32 logits [vocab], and returns such logits."""
OutputKind = Literal["delta", "cumulative", "final"]


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to choose the tokens of one request.

    Raises `InvalidRequest` naming the field for a value out of range.
    """

    n: Annotated[int, Meta(description="sequences to give for the prompt")] = 1
    best_of: Annotated[int | None, Meta(description="sequences to generate; the n best are given")] = None
    use_beam_search: Annotated[bool, Meta(description="n of the likeliest, found with best_of beams")] = False
    length_penalty: Annotated[float, Meta(description="of beams: above 0 prefers long ones")] = 1.0
    early_stopping: Annotated[
        bool | Literal["never"], Meta(description="when a beam search ends, as in transformers")
    ] = False
    temperature: Annotated[float, Meta(description="0 chooses the likeliest token")] = 1.0
    top_p: Annotated[float, Meta(description="smallest set of tokens with this mass")] = 1.0
    top_k: Annotated[int, Meta(description="this many likeliest tokens; 0 or -1: all")] = 0
    min_p: Annotated[float, Meta(description="tokens at least this likely, relative to the best")] = 0.0
    typical_p: Annotated[float, Meta(description="tokens nearest the expected surprise, of this mass")] = 1.0
    presence_penalty: Annotated[float, Meta(description="taken from tokens that were generated")] = 0.0
    frequency_penalty: Annotated[float, Meta(description="taken for each time a token was generated")] = 0.0
    repetition_penalty: Annotated[float, Meta(description="divides logits of tokens that were there")] = 1.0
    logit_bias: Annotated[dict[int, float] | None, Meta(description="added to tokens' logits")] = None
    allowed_token_ids: Annotated[list[int] | None, Meta(description="no other tokens")] = None
    bad_words: Annotated[list[str] | None, Meta(description="texts that are not generated")] = None
    seed: Annotated[int | None, Meta(description="same seed, same tokens")] = None
    stop: Annotated[str | list[str] | None, Meta(description="strings that end the output")] = None
    stop_token_ids: Annotated[list[int] | None, Meta(description="tokens that end the output")] = None
    include_stop_str_in_output: bool = False
    ignore_eos: Annotated[bool, Meta(description="go on past the end-of-sequence token")] = False
    max_tokens: Annotated[int | None, Meta(description="None: the rest of the context")] = 16
    min_tokens: Annotated[int, Meta(description="nothing ends the output before")] = 0
    thinking_token_budget: Annotated[
        int | None, Meta(description="the thoughts end after so many tokens")
    ] = None
    logprobs: Annotated[int | None, Meta(description="report this many alternatives per token")] = None
    prompt_logprobs: Annotated[int | None, Meta(description="the same for the prompt's tokens")] = None
    structured_outputs: Annotated[
        StructuredOutputs | Constraint | dict[str, Any] | None, Meta(description="a form that the output has")
    ] = None
    guided_decoding: Annotated[
        StructuredOutputs | dict[str, Any] | None, Meta(description="the older name of structured_outputs")
    ] = None
    logits_processors: Annotated[
        list[LogitsProcessor] | None, Meta(description="functions that change logits, within one process")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, Meta(description="keep so many of the prompt's last tokens; -1: what the context holds")
    ] = None
    priority: Annotated[int, Meta(description="lower goes first, under the policy priority")] = 0
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: OutputKind = "cumulative"

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        _integer("n", self.n, 1, MAX_SEQUENCES)
        _integer("best_of", self.best_of, self.n, MAX_SEQUENCES)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _logit_bias(self.logit_bias)
        _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKENS, empty=False)
        _bad_words(self.bad_words)
        _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _integer("thinking_token_budget", self.thinking_token_budget, 0, 2**31 - 1)
        _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        if self.truncate_prompt_tokens != -1:
            _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1)
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        _integer("seed", self.seed, -(2**63), 2**64 - 1)
        _stop_strings(self.stop)
        _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        for name in _SWITCHES:
            _one_of(name, getattr(self, name), (True, False))
        _one_of("output_kind", self.output_kind, get_args(OutputKind))
        if self.stop and not self.detokenize:
            raise InvalidRequest("stop strings need detokenize=True", "stop")
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, Constraint):
            self.structured_outputs = from_structured_outputs(self.structured_outputs)
        if self.guided_decoding is not None:
            older = from_structured_outputs(self.guided_decoding, "guided_decoding")
            self.structured_outputs = only_one(self.structured_outputs, older)
            self.guided_decoding = None
        _processors(self.logits_processors)
        _beams(self)

    @property
    def num_sequences(self) -> int:
        """How many are generated; `n` of them are given."""
        return self.best_of or self.n

    @property
    def ranked(self) -> bool:
        """Whether the sequences that are given are chosen by their log probabilities once all have ended."""
        return self.num_sequences > self.n and not self.use_beam_search

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> list[str]:
        return list(self.stop or ())


_OPTIONAL = (
    *("best_of", "max_tokens", "logprobs", "prompt_logprobs", "seed", "truncate_prompt_tokens"),
    "thinking_token_budget",
)
_SWITCHES = (
    *("include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens"),
    *("spaces_between_special_tokens", "use_beam_search"),
)
_NOT_WITH_BEAMS: dict[str, tuple[object, ...]] = {
    "temperature": (0.0, 1.0),
    "top_p": (1.0,),
    "top_k": (0, -1),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "min_tokens": (0,),
    "stop": (None, []),
    "prompt_logprobs": (None,),
    "thinking_token_budget": (None,),
    "structured_outputs": (None,),
    "logits_processors": (None, []),
}
"""What would choose other tokens than the likeliest, or end a beam, and the values that don't."""


def _beams(params: SamplingParams) -> None:
    _number("length_penalty", params.length_penalty, -10.0, 10.0)
    _one_of("early_stopping", params.early_stopping, (True, False, "never"))
    if not params.use_beam_search:
        for name, nothing in (("length_penalty", 1.0), ("early_stopping", False)):
            if getattr(params, name) != nothing:
                raise InvalidRequest(f"{name} needs use_beam_search", name)
        return
    if params.num_sequences > MAX_BEAMS:
        name = "n" if params.best_of is None else "best_of"
        told = f"a beam search has at most {MAX_BEAMS} beams, not {params.num_sequences}"
        raise InvalidRequest(told, name)
    for name, harmless in _NOT_WITH_BEAMS.items():
        if getattr(params, name) not in harmless:
            param = getattr(getattr(params, name), "param", name)  # of a constraint: what the client wrote
            told = f"{param} cannot be used with use_beam_search: beams are the model's likeliest sequences"
            raise InvalidRequest(told, param)


class BeamSearchParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What `Engine.beam_search` looks for: the `beam_width` likeliest outputs that it finds.

    They are ranked by log probability / length ** `length_penalty`, where the length counts the output's
    tokens, an end of sequence among them. `temperature` is 0 or 1: both leave probabilities as they are.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    include_stop_str_in_output: bool = False

    def sampling_params(self) -> SamplingParams:
        """The same as a request. Raises InvalidRequest naming the field for a value out of range."""
        with renamed({"n": "beam_width"}):
            return SamplingParams(
                n=self.beam_width,
                use_beam_search=True,
                max_tokens=self.max_tokens,
                ignore_eos=self.ignore_eos,
                temperature=self.temperature,
                length_penalty=self.length_penalty,
                early_stopping=self.early_stopping,
                include_stop_str_in_output=self.include_stop_str_in_output,
                logprobs=0,
                output_kind="final",
            )


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


def _token_ids(name: str, tokens: object, most: int | None = None, empty: bool = True) -> None:
    if tokens is None:
        return
    if not isinstance(tokens, list) or not (tokens or empty):
        raise InvalidRequest(f"{name} must be a list of token ids, not {tokens!r}", name)
    if most is not None and len(tokens) > most:
        raise InvalidRequest(f"{name} has {len(tokens)} tokens; at most {most}", name)
    for i, token in enumerate(tokens):
        _integer(f"{name}[{i}]", token, 0)


def _logit_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, not {bias!r}", "logit_bias")
    if len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(bias)} tokens; at most {MAX_LOGIT_BIAS}", "logit_bias")
    for token, value in bias.items():
        _integer(f"logit_bias[{token!r}]", token, 0)
        _number(f"logit_bias[{token}]", value, -100.0, 100.0)


def _bad_words(words: object) -> None:
    if words is None:
        return
    if not isinstance(words, list) or any(not isinstance(word, str) for word in words):
        raise InvalidRequest("bad_words must be a list of strings", "bad_words")
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(f"bad_words has {len(words)} strings; at most {MAX_BAD_WORDS}", "bad_words")
    for i, word in enumerate(words):
        if not word.strip():
            raise InvalidRequest("a bad word must not be empty or blank", f"bad_words[{i}]")
        if len(word) > LONGEST_BAD_WORD:
            told = f"a bad word has {len(word)} characters; at most {LONGEST_BAD_WORD}"
            raise InvalidRequest(told, f"bad_words[{i}]")


def _processors(processors: object) -> None:
    if processors is None:
        return
    if not isinstance(processors, list) or not all(map(callable, processors)):
        raise InvalidRequest("logits_processors must be a list of functions", "logits_processors")


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if value is None and name in _OPTIONAL:
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
