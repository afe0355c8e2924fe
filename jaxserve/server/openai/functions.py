"""OpenAI's `functions` and `function_call`, older than tools: rewritten as those, with at most one call."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxserve.errors import InvalidRequest

CALL = {"name": str, "arguments": str}


@contextmanager
def as_tools(body: dict[str, Any]) -> Iterator[bool]:
    """Whether a chat's body has functions, which are its tools then. Errors name what the client wrote."""
    functions, choice = body.pop("functions", None), body.pop("function_call", None)
    if functions in (None, []) and choice in (None, "none", "auto"):
        yield False
        return
    for name in ("tools", "tool_choice", "parallel_tool_calls"):
        if body.get(name) is not None:
            raise _wrong(f"{name} and functions exclude each other", name)
    if not isinstance(functions, list):
        raise _wrong("functions must be a list", "functions")
    if not isinstance(choice, dict) and choice not in (None, "none", "auto"):
        raise _wrong("function_call must be none, auto or an object with a name", "function_call")
    body["tools"] = [{"type": "function", "function": function} for function in functions]
    body["tool_choice"] = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
    body["parallel_tool_calls"] = False
    try:
        yield True
    except InvalidRequest as error:
        raise InvalidRequest(_older(str(error)), error.param and _older(error.param), error.code) from None


def messages_as_tools(messages: list[Any]) -> None:
    """Rewrite an assistant's `function_call`, and the answer to it, whose role is `function`."""
    id = None
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        path = f"messages[{i}]"
        if (call := message.pop("function_call", None)) is not None:
            if message.get("tool_calls"):
                raise _wrong("function_call and tool_calls exclude each other", f"{path}.function_call")
            if not isinstance(call, dict) or {n: type(v) for n, v in call.items()} != CALL:
                raise _wrong("it must have a name and arguments, both text", f"{path}.function_call")
            id = f"call{i:05}"  # nine letters and digits, as some templates want it
            message["tool_calls"] = [{"id": id, "type": "function", "function": call}]
        if message.get("role") == "function":
            if id is None:
                raise _wrong("there is no function_call before it", f"{path}.role")
            message["role"] = "tool"
            message.setdefault("tool_call_id", id)


def _older(text: str) -> str:
    text = re.sub(r"\btools(\[\d+\])\.function", r"functions\1", text)
    text = re.sub(r"^tools\b", "functions", text)
    return text.replace("tool_choice.function", "function_call").replace("tool_choice", "function_call")


def _wrong(told: str, path: str) -> InvalidRequest:
    return InvalidRequest(f"{path}: {told}", path, "invalid_value")
