"""`POST /v1/completions`."""

from typing import Any

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from jaxserve.errors import InvalidRequest
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.endpoint import Caller
from jaxserve.server.openai.generation import Generation, PromptsOnly, ScoredPrompts
from jaxserve.server.openai.logprobs import TextOffsets, completion_logprobs, prompt_logprobs
from jaxserve.server.openai.requests import CompletionRequest, parse_completion
from jaxserve.server.openai.responses import (
    ChunkEncoder,
    Completion,
    CompletionChoice,
    PromptLogprobs,
    Usage,
    json_response,
)
from jaxserve.server.sse import EventStream, event_stream
from jaxserve.server.state import ServerState
from jaxserve.text.detokenizer import new_detokenizer
from jaxserve.text.tokenizer import Tokenizer

MAX_PROMPTS = 2048
MAX_SEQUENCES = 2048


async def complete(state: ServerState, body: dict[str, Any], caller: Caller) -> Response:
    request = parse_completion(body)
    model = state.check_model(request.model)
    prompts = _prompts(request.prompt)
    written = {"prompt": "prompt[0]"} if _is_batch(request.prompt) else {}
    params = request.params(state.engine.default_params)
    if len(prompts) * params.num_sequences > MAX_SEQUENCES:
        name = "n" if params.best_of is None else "best_of"
        told = f"{len(prompts)} prompts with {name} = {params.num_sequences}"
        raise InvalidRequest(f"{told} are more than {MAX_SEQUENCES} sequences", name, "invalid_value")
    tokenizer = state.engine.tokenizer
    if request.echo and tokenizer is None:
        raise InvalidRequest("echo needs a tokenizer, and this model has none", "echo")
    special = request.add_special_tokens is not False
    generation: Generation | PromptsOnly
    if request.only_echo and params.prompt_logprobs is None:
        generation = PromptsOnly(state.engine, prompts, params, written, special)
    else:
        cache_salt = state.cache_salt(caller.tenant, request.cache_salt)
        kind = ScoredPrompts if request.only_echo else Generation
        generation = kind(state, prompts, cache_salt, caller, params, written, special)
    id = f"cmpl-{caller.request_id}"
    reply = _Reply(id, model, request, prompts, generation, tokenizer, params)
    return await event_stream(reply.stream) if request.stream else await reply.whole()


def _is_batch(prompt: str | list[Any]) -> bool:
    return isinstance(prompt, list) and not isinstance(prompt[0], int)


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """One text, one list of token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt must not be empty", "prompt", "invalid_value")
    kind = type(prompt[0])
    for i, item in enumerate(prompt):
        if type(item) is not kind:
            raise InvalidRequest(
                f"prompt[{i}] must be {_NAMES[kind]} like prompt[0]", f"prompt[{i}]", "invalid_value"
            )
    if kind is int:
        return [prompt]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt has {len(prompt)} prompts; at most {MAX_PROMPTS}", "prompt", "invalid_value"
        )
    return prompt


_NAMES = {str: "a string", int: "a token id", list: "a list of token ids"}


class _Reply:
    def __init__(
        self,
        id: str,
        model: str,
        request: CompletionRequest,
        prompts: list[str | list[int]],
        generation: Generation | PromptsOnly,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
    ):
        self._id = id
        self._model = model
        self._request = request
        self._prompts = prompts
        self._begun: set[int] = set()
        self._generation = generation
        self._tokenizer = tokenizer
        self._params = params
        self._offsets: dict[int, TextOffsets] = {}
        self._scored: dict[int, PromptLogprobs] = {}
        """Of each prompt, from its first output."""

    async def whole(self) -> Response:
        choices: list[CompletionChoice] = []

        def show(i: int, output: RequestOutput) -> None:
            choices.extend(self._choice(i, output, sequence) for sequence in output.outputs)

        await self._generation.run(show)
        choices.sort(key=lambda choice: choice.index)
        return json_response(self._completion(choices, self._generation.usage))

    async def stream(self, events: EventStream) -> None:
        usage = self._generation.usage if self._request.continuous_usage else None
        chunks = ChunkEncoder(self._completion([], usage))

        def show(i: int, output: RequestOutput) -> None:
            choices = [self._choice(i, output, sequence) for sequence in output.outputs]
            events.write(*map(chunks.encode, choices))

        await self._generation.run(show, events.taken)
        if self._request.include_usage:
            events.write(msgspec.json.encode(self._completion([], self._generation.usage)))

    def _choice(self, prompt: int, output: RequestOutput, sequence: CompletionOutput) -> CompletionChoice:
        request, ids = self._request, output.prompt_token_ids
        index = prompt * (request.n or 1) + sequence.index
        choice = CompletionChoice(index, sequence.text, sequence.finish_reason)
        if output.prompt_logprobs is not None:
            self._scored[prompt] = output.prompt_logprobs
        begins = index not in self._begun
        self._begun.add(index)
        echoed = self._prompt_text(prompt, ids) if begins and request.echo else ""
        choice.text = echoed + choice.text
        if begins and request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(ids, self._scored[prompt], request.prompt_logprobs)
        if request.return_token_ids:
            choice.token_ids = sequence.token_ids
            if begins:
                choice.prompt_token_ids = ids
        if sequence.logprobs is not None:
            if begins:
                self._offsets[index] = self._text_offsets(ids, len(echoed))
            tokens, logprobs = sequence.token_ids, [*sequence.logprobs]
            offsets = self._offsets[index].take(tokens)
            if begins and request.echo:
                tokens, logprobs = ids + tokens, [*self._scored[prompt], *logprobs]
                offsets = self._prompt_offsets(ids, echoed) + offsets
            top, as_ids = request.logprobs or 0, bool(request.return_tokens_as_token_ids)
            choice.logprobs = completion_logprobs(tokens, logprobs, top, offsets, self._tokenizer, as_ids)
        return choice

    def _prompt_text(self, i: int, used: list[int]) -> str:
        prompt = self._prompts[i]
        if isinstance(prompt, str) and self._params.truncate_prompt_tokens is None:
            return prompt
        assert self._tokenizer is not None
        return self._tokenizer.decode(used, self._params.skip_special_tokens)

    def _text_offsets(self, prompt: list[int], begin: int) -> TextOffsets:
        params = self._params
        if self._tokenizer is None or not params.detokenize:
            return TextOffsets(None, begin)
        spaces = params.spaces_between_special_tokens
        detokenizer = new_detokenizer(self._tokenizer, prompt, params.skip_special_tokens, spaces=spaces)
        return TextOffsets(detokenizer, begin)

    def _prompt_offsets(self, ids: list[int], text: str) -> list[int]:
        """Where in the prompt's text its tokens begin: special ones are part of it if they were written."""
        assert self._tokenizer is not None
        skip = self._tokenizer.decode(ids, skip_special_tokens=False) != text
        return TextOffsets(new_detokenizer(self._tokenizer, (), skip)).take(ids)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        shown = usage if usage or self._request.include_usage else UNSET
        return Completion(
            id=self._id, created=self._generation.created, model=self._model, choices=choices, usage=shown
        )
