"""What a model's output is made of, as it comes."""

from collections.abc import Iterable
from dataclasses import dataclass, field


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
    calls: list[Call] = field(default_factory=list)


def collect(events: Iterable[Event]) -> Message:
    """The whole message that a stream of events adds up to."""
    message = Message()
    for event in events:
        match event:
            case Content(text):
                message.content += text
            case Reasoning(text):
                message.reasoning += text
            case CallBegin(_, id, name):
                message.calls.append(Call(id, name))
            case Arguments(index, text):
                message.calls[index].arguments += text
    return message
