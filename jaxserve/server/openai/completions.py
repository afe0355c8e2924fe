"""`POST /v1/completions`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from jaxserve.errors import InvalidRequest
from jaxserve.server.openai.generation import Generation
from jaxserve.server.openai.logprobs import completion_logprobs
from jaxserve.server.openai.requests import CompletionRequest, parse_completion
from jaxserve.server.openai.responses import Completion, CompletionChoice, Usage, json_response
from jaxserve.server.sse import event_stream
from jaxserve.server.state import ServerState

MAX_PROMPTS = 2048


async def complete(state: ServerState, body: dict[str, Any], request_id: str) -> Response:
    request = parse_completion(body)
    model = state.check_model(request.model)
    prompts = _prompts(request.prompt)
    written = {"prompt": "prompt[0]"} if _is_batch(request.prompt) else {}
    generation = Generation(state.engine, prompts, request.params(), written)
    reply = _Reply(f"cmpl-{request_id}", model, request, generation)
    return await event_stream(reply.chunks()) if request.stream else await reply.whole()


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
    def __init__(self, id: str, model: str, request: CompletionRequest, generation: Generation):
        self._id = id
        self._model = model
        self._request = request
        self._generation = generation
        self._lengths: dict[int, int] = {}
        """Characters of each choice so far."""

    async def whole(self) -> Response:
        choices = []
        async with aclosing(self._generation.outputs()) as outputs:
            async for i, output in outputs:
                choices += [self._choice(i, sequence) for sequence in output.outputs]
        choices.sort(key=lambda choice: choice.index)
        return json_response(self._completion(choices, self._generation.usage))

    async def chunks(self) -> AsyncGenerator[bytes]:
        usage = self._generation.usage if self._request.continuous_usage else None
        async with aclosing(self._generation.outputs()) as outputs:
            async for i, output in outputs:
                for sequence in output.outputs:
                    yield msgspec.json.encode(self._completion([self._choice(i, sequence)], usage))
        if self._request.include_usage:
            yield msgspec.json.encode(self._completion([], self._generation.usage))

    def _choice(self, prompt: int, sequence: Any) -> CompletionChoice:
        index = prompt * (self._request.n or 1) + sequence.index
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(sequence.text)
        logprobs = completion_logprobs(sequence, self._request.logprobs or 0, offset)
        return CompletionChoice(index, sequence.text, sequence.finish_reason, logprobs)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        shown = usage if usage or self._request.include_usage else UNSET
        return Completion(
            id=self._id, created=self._generation.created, model=self._model, choices=choices, usage=shown
        )
