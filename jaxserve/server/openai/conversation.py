"""The part of a request that a chat template turns into a prompt, and the turning."""

import asyncio
import json
import sys
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import msgspec

from jaxserve.errors import InvalidRequest, renamed
from jaxserve.server.openai import fields
from jaxserve.server.openai.functions import messages_as_tools
from jaxserve.server.state import ServerState
from jaxserve.structs import to_struct
from jaxserve.text.chat_template import content_text, part_kinds
from jaxserve.text.tools import ToolUse

INLINE = 4096
"""Longest conversation, in bytes of JSON, that is rendered on the event loop."""
RENDER_SECONDS = 10.0
"""For a client's own template; how much processor time and memory it gets says its process."""


class TextPart(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal", forbid_unknown_fields=True):
    refusal: str


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Conversation(ToolUse, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.messages:
            raise InvalidRequest("messages must not be empty", "messages", "invalid_value")

    @property
    def last_text(self) -> str:
        last = msgspec.to_builtins(self.messages[-1])
        return content_text(last.get("content") or last.get("refusal"))

    @property
    def continued(self) -> str | None:
        """The text of the message that the answer goes on with; None: it begins one."""
        return self.last_text if self.continue_final_message else None

    def options(self) -> dict[str, Any]:
        """Of `ChatTemplate.render`."""
        continued, prompt = bool(self.continue_final_message), self.add_generation_prompt
        return {
            "add_generation_prompt": not continued if prompt is None else prompt,
            "continue_final_message": continued,
            "documents": self.documents,
            "chat_template_kwargs": self.chat_template_kwargs,
            "tools": self.offered,
            "reasoning_effort": self.reasoning_effort,
        }


class Rendered(NamedTuple):
    text: str
    token_ids: list[int]


def take_conversation(body: dict[str, Any]) -> Conversation:
    """Its fields, taken out of the body. Raises InvalidRequest."""
    mine = {name: body.pop(name) for name in Conversation.__struct_fields__ if name in body}
    messages = mine.get("messages")
    if isinstance(messages, list):
        messages_as_tools(messages)
        for i, message in enumerate(messages):
            if isinstance(message, dict):
                _check_message(message, f"messages[{i}]")
    return to_struct(mine, Conversation)


async def render(state: ServerState, conversation: Conversation, any_length: bool = False) -> Rendered:
    """The prompt and its tokens; other requests go on meanwhile. Raises InvalidRequest, unless `any_length`
    also for a prompt that is far too long."""
    tokenizer = state.engine.tokenizer
    if tokenizer is None:
        raise InvalidRequest("this model has no tokenizer: send token ids to /v1/completions", "messages")
    source = conversation.chat_template
    if source is not None and not state.trust_request_chat_template:
        raise InvalidRequest(
            "chat_template needs a server with --trust-request-chat-template", "chat_template"
        )
    messages, options = msgspec.to_builtins(conversation.messages), conversation.options()
    job = msgspec.json.encode([source, tokenizer.named, messages, options])
    if source is not None:
        async with state.template_processes:
            text = await _render_apart(job)
    elif len(job) <= INLINE:
        text = tokenizer.template().render(messages, **options)
    else:
        text = await asyncio.to_thread(tokenizer.template().render, messages, **options)
    with renamed({"prompt": "messages"}):
        special = bool(conversation.add_special_tokens)
        return Rendered(text, await state.engine.encode(text, special, any_length))


async def _render_apart(job: bytes) -> str:
    """`text/render_process.py` on a job."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "jaxserve.text.render_process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    written = b""
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(RENDER_SECONDS):
                written, _ = await process.communicate(job)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
    if not written or process.returncode != 0:
        raise InvalidRequest("the chat_template takes too much time or memory", "chat_template")
    answer = json.loads(written)
    if "error" in answer:
        raise InvalidRequest(answer["error"], answer["param"], answer["code"])
    return answer["text"]


def _check_message(message: dict[str, Any], path: str) -> None:
    """What depends on the role; types are checked later."""
    role, content = message.get("role"), message.get("content")
    fields.drop_no_ops(message, fields.MESSAGE, f"{path}.")
    given = [name for name in ("refusal", "reasoning", "reasoning_content") if message.get(name) is not None]
    if role == "assistant":
        if content is not None and "refusal" in given:
            raise _wrong("content and refusal exclude each other", f"{path}.refusal")
        if len(given) > 1 and message.get("reasoning") != message.get("reasoning_content"):
            raise _wrong("reasoning and reasoning_content are the same: give one", f"{path}.reasoning")
    else:
        calls = ("tool_calls",) if message.get("tool_calls") else ()
        for name in (*given, *calls):
            raise _wrong(f"{name} is for assistant messages only", f"{path}.{name}")
    kinds = part_kinds(role)
    for i, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in kinds:
            at = f"{path}.content[{i}].type"
            raise _wrong(f"parts of this message must be {' or '.join(kinds)}, not {kind!r}", at)
    answers = message.get("tool_call_id") is not None
    if answers and role != "tool":
        raise _wrong("tool_call_id is for tool messages only", f"{path}.tool_call_id")
    if role == "tool" and not answers:
        raise InvalidRequest(f"{path}.tool_call_id is required", f"{path}.tool_call_id", "missing_field")
    if content is None and (role != "assistant" or not (given or message.get("tool_calls"))):
        raise InvalidRequest(f"{path}.content is required", f"{path}.content", "missing_field")


def _wrong(told: str, path: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {told}", path, "invalid_value")
