"""From requests to core requests, and from the core's tokens to `RequestOutput`s.

The same for the in-process engine and for the HTTP process.
"""

import itertools
import time
from collections.abc import Mapping, Sequence

from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.engine.grammar.source import Grammar
from jaxserve.engine.grammar.source import grammar as write_grammar
from jaxserve.engine.messages import Abort, BeamSearch, CoreOutput, CoreRequest, Thoughts
from jaxserve.errors import InvalidRequest
from jaxserve.outputs import CompletionOutput, ErrorCode, Logprob, RequestOutput
from jaxserve.sampling_params import MAX_LOGPROBS, SamplingParams
from jaxserve.text import bad_words
from jaxserve.text.reading import MakeParser, Tags
from jaxserve.text.sequence import OutputSequence, logprob_entry
from jaxserve.text.tokenizer import Tokenizer


class OutputProcessor:
    """Keeps every request that is under way; one of several sequences is as many core requests."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        max_request_tokens: int | None = None,
        vocab_size: int | None = None,
        priorities: bool = False,
        tags: Tags | None = None,
    ):
        """`max_request_tokens`: what the KV pool holds for one sequence, where that is less than
        `max_model_len`; `vocab_size`: the model's, if not the tokenizer's; `priorities`: whether they have
        an effect; `tags`: around the model's thoughts."""
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._max_model_len = max_model_len
        self._max_request_tokens = min(max_request_tokens or max_model_len, max_model_len)
        self._vocab_size = vocab_size or (tokenizer.vocab_size if tokenizer else None)
        self._priorities = priorities
        self._tags = tags
        self._serials = itertools.count()
        self._written: tuple[Constraint, Grammar] | None = None
        """The last grammar: the prompts of a batch have one."""
        self._requests: dict[str, _Request] = {}
        self._sequences: dict[str, tuple[_Request, OutputSequence]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        cache_salt: str = "",
        tenant: str = "",
        follows: bool = False,
        make_parser: MakeParser | None = None,
    ) -> list[CoreRequest]:
        """The core requests, with ids of their own: a token of an aborted one may still be on its way when
        its id is used again. `make_parser`: for outputs with reasoning or tool calls in them.

        Raises InvalidRequest for what the model, its context or its pool cannot take.
        """
        # a copy, because the caller may go on to change it
        prompt_token_ids = truncated(prompt_token_ids, params, self._max_request_tokens)
        if request_id in self._requests:
            raise InvalidRequest(f"request_id {request_id!r} is already in use", "request_id")
        max_tokens = self._max_tokens(len(prompt_token_ids), params.max_tokens)  # before millions are checked
        check_token_ids(prompt_token_ids, self._vocab_size, "prompt")
        check_token_ids(params.stop_token_ids or (), self._vocab_size, "stop_token_ids")
        check_token_ids(params.allowed_token_ids or (), self._vocab_size, "allowed_token_ids")
        self._check_bias(params.logit_bias or {})
        if params.min_tokens > max_tokens:
            told = f"min_tokens is {params.min_tokens}, and no more than {max_tokens} tokens can come"
            raise InvalidRequest(told, "min_tokens")
        if params.ranked and params.output_kind == "delta":
            told = f"best_of must be n, {params.n}, in a stream: which are best is known at their ends"
            raise InvalidRequest(told, "best_of")
        if params.priority and not self._priorities:
            raise InvalidRequest("priority needs an engine with --scheduling-policy priority", "priority")
        if params.stop and self._tokenizer is None:
            raise InvalidRequest("stop strings need a tokenizer, and this model has none", "stop")
        thoughts = self._thoughts(params.thinking_token_budget, prompt_token_ids, make_parser)
        grammar = self._grammar(params.structured_outputs)
        banned = self._bad_words(params.bad_words or [])
        eos = [] if params.ignore_eos else self._eos
        stops = list(dict.fromkeys([*eos, *(params.stop_token_ids or ())]))
        if params.use_beam_search:
            self._check_beams(params.num_sequences, len(stops))
        request = _Request(request_id, next(self._serials), prompt, prompt_token_ids, params)
        for i in range(params.n if params.use_beam_search else params.num_sequences):
            sequence = OutputSequence(
                i, prompt_token_ids, params, self._tokenizer, frozenset(eos), make_parser
            )
            request.sequences.append(sequence)
            self._sequences[request.core_id(i)] = (request, sequence)
        self._requests[request_id] = request
        return [
            CoreRequest(
                id=request.core_id(i),
                prompt=prompt_token_ids,
                max_tokens=max_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                top_k=params.top_k,
                min_p=params.min_p,
                typical_p=params.typical_p,
                presence_penalty=params.presence_penalty,
                frequency_penalty=params.frequency_penalty,
                repetition_penalty=params.repetition_penalty,
                logit_bias=params.logit_bias or {},
                allowed_token_ids=params.allowed_token_ids or [],
                min_tokens=params.min_tokens,
                logits_processors=params.logits_processors,
                seed=params.seed,
                sample_index=i,
                bad_words=banned,
                thoughts=thoughts,
                grammar=grammar,
                logprobs=0 if params.ranked and params.logprobs is None else params.logprobs,
                prompt_logprobs=params.prompt_logprobs if i == 0 else None,  # the others share its prompt
                stop_token_ids=stops,
                beams=_beam_search(request) if params.use_beam_search else None,
                cache_salt=cache_salt,
                tenant=tenant,
                priority=params.priority,
                follows=follows or i > 0,
            )
            for i in range(1 if params.use_beam_search else params.num_sequences)
        ]

    def process(self, outputs: list[CoreOutput]) -> tuple[list[RequestOutput], list[Abort]]:
        """One RequestOutput for each request with something to show, and what the core must end.

        Outputs of sequences that are unknown, aborted or ended are ignored.
        """
        touched: dict[str, _Request] = {}
        aborts: list[Abort] = []
        now = time.monotonic()
        for out in outputs:
            if out.id not in self._sequences:
                continue
            request, sequence = self._sequences[out.id]
            touched[request.id] = request
            if out.cached_tokens is not None and sequence.index == 0:  # the others share its prompt
                request.cached_tokens = out.cached_tokens
            if out.prompt_logprobs is not None:
                request.score([logprob_entry(step, self._tokenizer) for step in out.prompt_logprobs])
            if out.finish_reason == "error":
                request.fail(out.error or "the engine gave no reason", out.error_code, out.error_param)
                aborts += [Abort(id) for id in self._drop(request) if id != out.id]
                continue
            if sequence.add(out, now):
                aborts.append(Abort(out.id, keep=sequence.metrics.num_generation_tokens))
            if sequence.finish_reason is not None:
                del self._sequences[out.id]
        return [output for request in touched.values() if (output := self._output(request))], aborts

    def abort(self, request_id: str) -> list[Abort]:
        """Forgets a request; the core must end what of it is still running."""
        request = self._requests.get(request_id)
        return [Abort(id) for id in self._drop(request)] if request else []

    def fail_all(self, error: str) -> list[RequestOutput]:
        """Ends every request with `error`, because the core is gone."""
        requests = list(self._requests.values())
        for request in requests:
            request.fail(error)
            self._drop(request)
        return [output for request in requests if (output := self._output(request))]

    def _output(self, request: "_Request") -> RequestOutput | None:
        finished = all(sequence.finish_reason is not None for sequence in request.sequences)
        if finished:
            self._requests.pop(request.id, None)
        return request.output(finished)

    def _drop(self, request: "_Request") -> list[str]:
        """Forgets a request; the ids of its sequences that were still running."""
        self._requests.pop(request.id, None)
        ids = [request.core_id(sequence.index) for sequence in request.sequences]
        return [id for id in ids if self._sequences.pop(id, None)]

    def _thoughts(
        self, budget: int | None, prompt: Sequence[int], make_parser: MakeParser | None
    ) -> Thoughts | None:
        if budget is None:
            return None
        if self._tags is None:
            told = "thinking_token_budget needs a model that reasons between <think> and </think>, as tokens"
            raise InvalidRequest(told, "thinking_token_budget", "unsupported_field")
        assert self._tokenizer is not None
        continued = make_parser.continued if make_parser else None
        return self._tags.held(self._tokenizer, prompt, budget, continued)

    def _grammar(self, wanted: object) -> Grammar | None:
        if not isinstance(wanted, Constraint):
            return None
        if self._tokenizer is None:
            raise InvalidRequest(f"{wanted.param} needs a tokenizer, and this model has none", wanted.param)
        if self._written is None or self._written[0] is not wanted:
            self._written = wanted, write_grammar(wanted, self._tokenizer.special_tokens)
        return self._written[1]

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        if words and self._tokenizer is None:
            raise InvalidRequest("bad_words need a tokenizer, and this model has none", "bad_words")
        return bad_words.token_sequences(words, self._tokenizer, self._vocab_size) if self._tokenizer else []

    def _check_bias(self, bias: Mapping[int, float]) -> None:
        for token in bias:
            if self._vocab_size is not None and token >= self._vocab_size:
                told = f"logit_bias is for token ids between 0 and {self._vocab_size - 1}, not {token}"
                raise InvalidRequest(told, f"logit_bias[{token}]")

    def _check_beams(self, width: int, stops: int) -> None:
        """Each beam needs as many ways on as there are beams, besides those that end it."""
        known = min(MAX_LOGPROBS, self._vocab_size or MAX_LOGPROBS)
        if width + stops > known:
            told = f"{width} beams with {stops} tokens that end them: together at most {known}"
            raise InvalidRequest(told, "n")

    def _max_tokens(self, prompt: int, max_tokens: int | None) -> int:
        if not prompt:
            raise InvalidRequest("the prompt is empty; it needs at least one token", "prompt")
        limits = (
            (self._max_model_len, "the model's context of {} tokens"),
            (self._max_request_tokens, "the {} tokens that the KV pool holds for one request"),
        )
        for limit, name in limits:
            if prompt >= limit:
                raise InvalidRequest(
                    f"the prompt has {prompt} tokens and leaves no room for output in {name.format(limit)}",
                    "prompt",
                    "context_length_exceeded",
                )
            if max_tokens is not None and prompt + max_tokens > limit:
                raise InvalidRequest(
                    f"max_tokens is {max_tokens} and the prompt has {prompt} tokens: together "
                    f"{prompt + max_tokens}, more than {name.format(limit)}",
                    "max_tokens",
                    "context_length_exceeded",
                )
        return self._max_request_tokens - prompt if max_tokens is None else max_tokens


def truncated(prompt: Sequence[int], params: SamplingParams, limit: int | None) -> list[int]:
    """The prompt's last tokens, as many as are to be kept; `limit`: most that a request can have."""
    keep = params.truncate_prompt_tokens
    if keep == -1 and limit is not None:
        keep = max(1, limit - (params.max_tokens or 1))
    return list(prompt if keep is None else prompt[-keep:])


def check_token_ids(ids: Sequence[int], limit: int | None, field: str) -> None:
    """Raises InvalidRequest with the place of the first that is no token id below `limit`."""
    for i, token in enumerate(ids):
        if type(token) is not int or token < 0 or (limit is not None and token >= limit):
            wanted = "a token id" if limit is None else f"a token id between 0 and {limit - 1}"
            raise InvalidRequest(f"{field}[{i}] must be {wanted}, not {token!r}", f"{field}[{i}]")


def _beam_search(request: "_Request") -> BeamSearch:
    params = request.params
    return BeamSearch(
        ids=[request.core_id(i) for i in range(params.n)],
        width=params.num_sequences,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )


class _Request:
    def __init__(
        self,
        id: str,
        serial: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
    ):
        self.id = id
        self._serial = serial
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.kind = "final" if params.ranked else params.output_kind
        self.sequences: list[OutputSequence] = []
        self.error: str | None = None
        self.error_code: ErrorCode | None = None
        self.error_param: str | None = None
        self.cached_tokens = 0
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._unscored = params.prompt_logprobs is not None
        self._told: set[int] = set()  # sequences whose end a delta has carried

    def core_id(self, index: int) -> str:
        return f"{self.id}#{self._serial}.{index}"

    def score(self, entries: list[dict[int, Logprob]]) -> None:
        """Take the logprobs of the prompt from its second token on: nothing comes before the first."""
        self._prompt_logprobs, self._unscored = [None, *entries], False

    def fail(self, error: str, code: ErrorCode | None = None, param: str | None = None) -> None:
        self.error, self.error_code, self.error_param = error, code, param
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                sequence.fail()

    def output(self, finished: bool) -> RequestOutput | None:
        """What this step is to show of the request, if anything."""
        if (self.kind == "final" or self._unscored) and not finished:
            return None
        sequences = self.sequences
        if self.kind == "delta":
            sequences = [s for s in sequences if s.has_news and s.index not in self._told]
            self._told.update(s.index for s in sequences if s.finish_reason is not None)
            if not sequences:
                return None
        outputs = [sequence.take(clear=self.kind == "delta") for sequence in sequences]
        unused: list[CompletionOutput] = []
        if self.params.ranked:
            outputs.sort(key=_logprob_per_token, reverse=True)
            outputs, unused = outputs[: self.params.n], outputs[self.params.n :]
            for i, output in enumerate(outputs):
                output.index = i
        prompt_logprobs = self._prompt_logprobs
        if self.kind == "delta":
            self._prompt_logprobs = None
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            error=self.error,
            error_code=self.error_code,
            error_param=self.error_param,
            num_cached_tokens=self.cached_tokens,
            num_unused_tokens=sum(len(output.token_ids) for output in unused),
        )


def _logprob_per_token(output: CompletionOutput) -> float:
    return (output.cumulative_logprob or 0.0) / max(1, len(output.token_ids))
