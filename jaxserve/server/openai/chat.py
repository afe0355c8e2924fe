"""`POST /v1/chat/completions`."""

import asyncio
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.responses import Response

from jaxserve.errors import InvalidRequest
from jaxserve.outputs import RequestOutput
from jaxserve.server.endpoint import Caller
from jaxserve.server.openai.generation import Generation
from jaxserve.server.openai.logprobs import chat_logprobs
from jaxserve.server.openai.requests import ChatRequest, parse_chat, renamed
from jaxserve.server.openai.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChunkChoice,
    ChunkEncoder,
    Delta,
    Usage,
    json_response,
)
from jaxserve.server.sse import EventStream, event_stream
from jaxserve.server.state import ServerState
from jaxserve.text.tokenizer import Tokenizer

RENDER_INLINE = 4096
"""Longest conversation, in characters, that is rendered on the event loop."""


async def chat(state: ServerState, body: dict[str, Any], caller: Caller) -> Response:
    request = parse_chat(body)
    model = state.check_model(request.model)
    tokenizer = state.engine.tokenizer
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer: send token ids to /v1/completions", "messages")
    params = request.params(state.engine.default_params)
    text = await _render(tokenizer, request)
    with renamed({"prompt": "messages"}):
        prompt = await state.engine.encode(text, add_special_tokens=False)
    cache_salt = state.cache_salt(caller.tenant, request.cache_salt)
    written = request.written | {"prompt": "messages"}
    generation = Generation(state, [prompt], cache_salt, caller, params, written)
    reply = _Reply(f"chatcmpl-{caller.request_id}", model, request, tokenizer, generation)
    return await event_stream(reply.stream) if request.stream else await reply.whole()


async def _render(tokenizer: Tokenizer, request: ChatRequest) -> str:
    messages = msgspec.to_builtins(request.messages)
    for message in messages:
        if message["role"] == "developer":  # templates know it by its older name
            message["role"] = "system"
    if sum(len(str(message["content"])) for message in messages) <= RENDER_INLINE:
        return tokenizer.render_chat(messages)
    return await asyncio.to_thread(tokenizer.render_chat, messages)


class _Reply:
    def __init__(
        self, id: str, model: str, request: ChatRequest, tokenizer: Tokenizer, generation: Generation
    ):
        self._id = id
        self._model = model
        self._request = request
        self._tokenizer = tokenizer
        self._generation = generation
        self._top = request.top_logprobs or 0

    async def whole(self) -> Response:
        choices: list[ChatChoice] = []

        def show(_: int, output: RequestOutput) -> None:
            choices.extend(
                ChatChoice(
                    sequence.index,
                    ChatMessage(sequence.text),
                    sequence.finish_reason,
                    chat_logprobs(sequence, self._top, self._tokenizer),
                )
                for sequence in output.outputs
            )

        await self._generation.run(show)
        return json_response(
            ChatCompletion(
                id=self._id,
                created=self._generation.created,
                model=self._model,
                choices=choices,
                usage=self._generation.usage,
            )
        )

    async def stream(self, events: EventStream) -> None:
        usage = self._generation.usage if self._request.continuous_usage else None
        chunks = ChunkEncoder(self._chunk(usage))
        begun: set[int] = set()

        def show(_: int, output: RequestOutput) -> None:
            choices = []
            for sequence in output.outputs:
                index = sequence.index
                if index not in begun:
                    begun.add(index)
                    choices.append(ChunkChoice(index, Delta("assistant", "")))
                if sequence.text or sequence.logprobs:
                    logprobs = chat_logprobs(sequence, self._top, self._tokenizer)
                    choices.append(ChunkChoice(index, Delta(content=sequence.text), logprobs=logprobs))
                if sequence.finish_reason is not None:
                    choices.append(ChunkChoice(index, Delta(), sequence.finish_reason))
            events.write(*map(chunks.encode, choices))

        await self._generation.run(show, events.taken)
        if self._request.include_usage:
            events.write(msgspec.json.encode(self._chunk(self._generation.usage)))

    def _chunk(self, usage: Usage | None) -> ChatChunk:
        shown = usage if usage or self._request.include_usage else UNSET
        return ChatChunk(
            id=self._id, created=self._generation.created, model=self._model, choices=[], usage=shown
        )
