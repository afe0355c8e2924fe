"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response

from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.server.endpoint import Caller
from jaxserve.server.openai.answer import Answer
from jaxserve.server.openai.conversation import render
from jaxserve.server.openai.functions import as_tools
from jaxserve.server.openai.generation import Generation
from jaxserve.server.openai.logprobs import chat_logprobs, prompt_logprobs
from jaxserve.server.openai.requests import ChatRequest, parse_chat
from jaxserve.server.openai.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    ChunkEncoder,
    Delta,
    PromptLogprobs,
    Usage,
    json_response,
)
from jaxserve.server.sse import EventStream, event_stream
from jaxserve.server.state import ServerState
from jaxserve.text.tokenizer import Tokenizer


async def chat(state: ServerState, body: dict[str, Any], caller: Caller) -> Response:
    with as_tools(body) as functions:
        return await _chat(state, body, caller, functions)


async def _chat(state: ServerState, body: dict[str, Any], caller: Caller, functions: bool) -> Response:
    request, conversation = parse_chat(body)
    model = state.check_model(request.model)
    params = request.params(state.engine.default_params)
    text, prompt = await render(state, conversation, params.truncate_prompt_tokens is not None)
    assert state.engine.tokenizer is not None
    formats = state.engine.formats.of(conversation.chat_template)
    make_parser, params = formats.reading(
        state.engine.tokenizer, conversation, text, params, conversation.continued
    )
    cache_salt = state.cache_salt(caller.tenant, request.cache_salt)
    written = request.written | {"prompt": "messages"}
    generation = Generation(state, [prompt], cache_salt, caller, params, written, make_parser=make_parser)
    echo = conversation.last_text if request.echo else ""
    id = f"chatcmpl-{caller.request_id}"
    reply = _Reply(id, model, request, echo, state.engine.tokenizer, generation, functions)
    return await event_stream(reply.stream) if request.stream else await reply.whole()


class _Reply:
    def __init__(
        self,
        id: str,
        model: str,
        request: ChatRequest,
        echo: str,
        tokenizer: Tokenizer | None,
        generation: Generation,
        functions: bool,
    ):
        """`echo`: what every choice begins with; `functions`: calls are to have their older form."""
        self._id = id
        self._model = model
        self._request = request
        self._echo = echo
        self._tokenizer = tokenizer
        self._generation = generation
        self._top = request.top_logprobs or 0
        self._answer = Answer(request.include_reasoning is not False, functions)

    async def whole(self) -> Response:
        choices: list[ChatChoice] = []
        prompt: list[int] | UnsetType = UNSET
        scored: PromptLogprobs | UnsetType = UNSET

        def show(_: int, output: RequestOutput) -> None:
            nonlocal prompt, scored
            prompt, scored = self._prompt(output), self._prompt_logprobs(output)
            choices.extend(
                ChatChoice(
                    sequence.index,
                    self._answer.message(sequence, self._echo),
                    self._answer.finish_reason(sequence),
                    self._logprobs(sequence),
                    self._token_ids(sequence),
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
                prompt_token_ids=prompt,
                prompt_logprobs=scored,
            )
        )

    async def stream(self, events: EventStream) -> None:
        usage = self._generation.usage if self._request.continuous_usage else None
        chunks = ChunkEncoder(self._chunk(usage))
        begun: set[int] = set()

        def show(_: int, output: RequestOutput) -> None:
            choices = []
            prompt, scored = self._prompt(output), self._prompt_logprobs(output)
            for sequence in output.outputs:
                index = sequence.index
                nothing = "" if sequence.events is None else None
                if index not in begun:
                    begun.add(index)
                    role = ChunkChoice(index, Delta("assistant", nothing))
                    if prompt is UNSET and scored is UNSET:
                        choices.append(role)
                    else:
                        events.write(msgspec.json.encode(self._chunk(usage, [role], prompt, scored)))
                        scored = UNSET
                    if self._echo:
                        choices.append(ChunkChoice(index, Delta(content=self._echo)))
                token_ids = self._token_ids(sequence)
                deltas = self._answer.deltas(sequence)
                if sequence.logprobs or token_ids:
                    deltas = deltas or [Delta(content=nothing)]
                    logprobs = self._logprobs(sequence)
                    choices.append(ChunkChoice(index, deltas.pop(0), logprobs=logprobs, token_ids=token_ids))
                choices.extend(ChunkChoice(index, delta) for delta in deltas)
                if sequence.finish_reason is not None:
                    choices.append(ChunkChoice(index, Delta(), self._answer.finish_reason(sequence)))
            events.write(*map(chunks.encode, choices))

        await self._generation.run(show, events.taken)
        if self._request.include_usage:
            events.write(msgspec.json.encode(self._chunk(self._generation.usage)))

    def _logprobs(self, sequence: CompletionOutput) -> ChatLogprobs | None:
        as_ids = bool(self._request.return_tokens_as_token_ids)
        return chat_logprobs(sequence, self._top, self._tokenizer, as_ids)

    def _prompt(self, output: RequestOutput) -> list[int] | UnsetType:
        return output.prompt_token_ids if self._request.return_token_ids else UNSET

    def _prompt_logprobs(self, output: RequestOutput) -> PromptLogprobs | UnsetType:
        if output.prompt_logprobs is None:
            return UNSET
        top = self._request.prompt_logprobs or 0
        return prompt_logprobs(output.prompt_token_ids, output.prompt_logprobs, top)

    def _token_ids(self, sequence: CompletionOutput) -> list[int] | UnsetType:
        return sequence.token_ids if self._request.return_token_ids else UNSET

    def _chunk(
        self,
        usage: Usage | None,
        choices: Sequence[ChunkChoice] = (),
        prompt: list[int] | UnsetType = UNSET,
        scored: PromptLogprobs | UnsetType = UNSET,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._generation.created,
            model=self._model,
            choices=list(choices),
            usage=usage if usage or self._request.include_usage else UNSET,
            prompt_token_ids=prompt,
            prompt_logprobs=scored,
        )
