"""Tools in a prompt whose template has no place for them, as Hermes and Qwen 2.5 write them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
PREAMBLE = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""  # noqa: E501


def preamble(tools: Sequence[Mapping[str, Any]]) -> str:
    return PREAMBLE.format("\n".join(map(_json, tools)))


def in_system(messages: Sequence[Message], text: str) -> list[Message]:
    """`text` at the end of the system message."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**messages[0], "content": _joined(messages[0]["content"], text)}, *messages[1:]]


def in_user(messages: Sequence[Message], text: str) -> list[Message]:
    """`text` before the user's first message: for templates without a system message."""
    at = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    asked = messages[at]["content"] if messages[at]["role"] == "user" else ""
    rest = messages[at + 1 :] if messages[at]["role"] == "user" else messages[at:]
    return [*messages[:at], {"role": "user", "content": _joined(text, _text(asked))}, *rest]


def plain(messages: Sequence[Message]) -> list[Message]:
    """Calls as text of the assistant, and what tools answered as text of the user."""
    result: list[Message] = []
    answering = False
    for message in messages:
        if message["role"] == "tool":
            answer = f"<tool_response>\n{_text(message['content'])}\n</tool_response>"
            if answering:
                answer = f"{result.pop()['content']}\n{answer}"
            result.append({"role": "user", "content": answer})
        elif calls := message.get("tool_calls"):
            written = "\n".join(_call(call["function"]) for call in calls)
            told = {name: value for name, value in message.items() if name != "tool_calls"}
            result.append({**told, "content": _joined(message["content"], written, "\n")})
        else:
            result.append(message)
        answering = message["role"] == "tool"
    return result


def _call(function: Mapping[str, Any]) -> str:
    call = _json({"name": function["name"], "arguments": function["arguments"]})
    return f"<tool_call>\n{call}\n</tool_call>"


def _joined(content: Any, text: str, space: str = "\n\n") -> Any:
    """A text, or the parts of one, and more text."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return f"{content}{space}{text}" if content and text else content or text


def _text(content: str | Sequence[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
