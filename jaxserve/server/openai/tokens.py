"""`POST /tokenize`, `/detokenize`, `/v1/chat/completions/render` and `GET /tokenizer_info`, as vLLM's."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.errors import InvalidRequest
from jaxserve.server.endpoint import Caller
from jaxserve.server.openai.conversation import render, take_conversation
from jaxserve.server.openai.functions import as_tools
from jaxserve.server.openai.requests import parse_chat
from jaxserve.server.openai.responses import json_response
from jaxserve.server.state import ServerState
from jaxserve.structs import to_struct
from jaxserve.text.output import check_token_ids, truncated
from jaxserve.text.tokenizer import Tokenizer

INLINE = 4096
"""Most tokens that are looked up on the event loop."""


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


class Detokenized(msgspec.Struct):
    prompt: str


class Render(msgspec.Struct):
    prompt: str
    prompt_token_ids: list[int]


async def render_chat(state: ServerState, body: dict[str, Any], caller: Caller) -> Response:
    """What a chat would give the model; a request that chat would refuse is refused."""
    with as_tools(body):
        request, conversation = parse_chat(body)
    state.check_model(request.model)
    params = request.params(state.engine.default_params)
    tokenizer = _tokenizer(state)
    text, tokens = await render(state, conversation, params.truncate_prompt_tokens is not None)
    formats = state.engine.formats.of(conversation.chat_template)
    formats.reading(tokenizer, conversation, text, params, conversation.continued)
    return json_response(Render(text, truncated(tokens, params, state.engine.max_model_len)))


async def tokenize(state: ServerState, body: dict[str, Any], caller: Caller) -> Response:
    if body.get("messages") is None:
        body.pop("messages", None)
    with as_tools(body):
        conversation = take_conversation(body) if "messages" in body else None
    request = to_struct(body, TokenizeRequest)
    state.check_model(request.model)
    tokenizer = _tokenizer(state)
    if conversation is not None:
        if request.prompt is not None:
            raise InvalidRequest("prompt and messages exclude each other", "prompt", "invalid_value")
        tokens = (await render(state, conversation)).token_ids
    elif request.prompt is None:
        raise InvalidRequest("prompt or messages is required", "prompt", "missing_field")
    else:
        tokens = await state.engine.encode(request.prompt, request.add_special_tokens is not False)
    strs = await _aside(len(tokens), tokenizer.spelled, tokens) if request.return_token_strs else None
    return json_response(Tokenized(len(tokens), state.engine.max_model_len, tokens, strs))


async def detokenize(state: ServerState, body: dict[str, Any], caller: Caller) -> Response:
    request = to_struct(body, DetokenizeRequest)
    state.check_model(request.model)
    tokenizer = _tokenizer(state)
    return json_response(Detokenized(await _aside(len(request.tokens), _decode, tokenizer, request.tokens)))


def tokenizer_info_route(state: ServerState) -> Any:
    async def tokenizer_info(request: Request) -> Response:
        with state.admitted():
            return JSONResponse(_tokenizer(state).info() | {"model_max_length": state.engine.max_model_len})

    return tokenizer_info


def _tokenizer(state: ServerState) -> Tokenizer:
    if state.engine.tokenizer is None:
        raise InvalidRequest("this model has no tokenizer")
    return state.engine.tokenizer


def _decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    check_token_ids(tokens, tokenizer.vocab_size, "tokens")
    return tokenizer.decode(tokens, skip_special_tokens=False)


async def _aside(size: int, function: Any, *arguments: Any) -> Any:
    """In a thread where it takes a while."""
    return function(*arguments) if size <= INLINE else await asyncio.to_thread(function, *arguments)
