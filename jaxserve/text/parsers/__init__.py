"""From what a model writes to what the API says: reasoning, content and tool calls (docs/tools.md)."""

from jaxserve.text.parsers.events import (
    Arguments,
    Call,
    CallBegin,
    Content,
    Event,
    Message,
    Reasoning,
    collect,
    merged,
)
from jaxserve.text.parsers.parser import OutputParser, parse
from jaxserve.text.parsers.registry import (
    choose_reasoning_parser,
    choose_tool_parser,
    reasoning_parser,
    register_reasoning_parser,
    register_tool_parser,
    tool_parser,
)

__all__ = [
    "Arguments",
    "Call",
    "CallBegin",
    "Content",
    "Event",
    "Message",
    "OutputParser",
    "Reasoning",
    "choose_reasoning_parser",
    "choose_tool_parser",
    "collect",
    "merged",
    "parse",
    "reasoning_parser",
    "register_reasoning_parser",
    "register_tool_parser",
    "tool_parser",
]
