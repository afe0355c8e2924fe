"""What a model's output is made of, as it comes."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby


@dataclass(slots=True)
class Content:
    text: str


@dataclass(slots=True)
class Reasoning:
    text: str


@dataclass(slots=True)
class CallBegin:
    """A tool call: calls are counted from 0, and everything before the next one belongs to this one."""

    index: int
    id: str
    name: str


@dataclass(slots=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Event = Content | Reasoning | CallBegin | Arguments


@dataclass(slots=True)
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Message:
    content: str = ""
    reasoning: str = ""
    tool_calls: list[Call] = field(default_factory=list)


def collect(events: Iterable[Event]) -> Message:
    """The whole message that a stream of events adds up to."""
    message = Message()
    for event in merged(events):
        match event:
            case Content(text):
                message.content += text
            case Reasoning(text):
                message.reasoning += text
            case CallBegin(_, id, name):
                message.tool_calls.append(Call(id, name))
            case Arguments(index, text):
                message.tool_calls[index].arguments += text
    return message


def merged(events: Iterable[Event]) -> list[Event]:
    """The same with no two of a kind in a row, but for calls that begin."""
    result: list[Event] = []
    for _, group in groupby(events, key=lambda event: (type(event), getattr(event, "index", None))):
        first, *others = group
        if others:
            first = replace(first, text="".join(event.text for event in (first, *others)))  # type: ignore[union-attr]
        result.append(first)
    return result
