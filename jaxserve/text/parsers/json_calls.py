"""Calls written as JSON: `{"name": …, "arguments": {…}}`, alone or in a list, between tags or bare."""

import json
import re
from collections.abc import Callable, Mapping

from jaxserve.text.parsers.scanner import Scanner, Wait

ARGUMENTS = ("arguments", "parameters")
KEYS = ("name", "type", "id", *ARGUMENTS)
SCALAR = re.compile(r"[\w.+-]*")


def call_object(s: Scanner, bare: bool = False, tags: tuple[str, ...] = ()) -> Wait[bool]:
    """Reads one call; False, with nothing written, where the text is none.

    The call begins as soon as its name and the first bracket of its arguments are there; the arguments are
    verbatim from then on. Keys may come in any order, others with plain values are passed over, no arguments
    are `{}`. `tags` end the arguments wherever they stand.
    `bare`: without tags around it a JSON text is a call only if its name is a tool's (or, where the tools
    are not known, if it has arguments) and it has no other keys, so that a JSON answer need not wait.
    """
    name: str | None = None
    held: str | None = None
    more = yield from s.literal("{")
    while more:
        key = yield from _key(s)
        if key is None or (bare and key not in KEYS):
            return False
        if key == "name" and name is None:
            name = yield from s.string()
            if not name or (bare and s.tools and name not in s.tools):
                return False
        elif key in ARGUMENTS and name and (yield from s.peek()) == "{":
            s.begin(name)
            if (yield from s.nested(s.arguments, tags)):
                yield from s.attempt(_rest(s))
            return True
        else:
            value = yield from _value(s)
            if value is None:
                return False
            held = _object(value) if key in ARGUMENTS else held
            if held is None and (key in ARGUMENTS or value[0] in "{["):
                return False  # no arguments of ours, but somebody's
        more = yield from after_spaces(s, ",", "}")
        if more == "}":
            break
    if not more or not name or (bare and held is None and name not in s.tools):
        return False
    s.begin(name)
    s.arguments(held or "{}")
    return True


def call_list(s: Scanner, bare: bool = False, tags: tuple[str, ...] = ()) -> Wait[bool]:
    """Reads `[call, call, …]`, or a call alone; False where not even the first is one."""
    yield from s.spaces()
    if not (yield from s.literal("[")):
        return (yield from call_object(s, bare, tags))
    return (yield from separated(s, lambda: call_object(s, bare, tags)))


def separated(s: Scanner, call: Callable[[], Wait[bool]]) -> Wait[bool]:
    """Reads calls with `,` between them and `]` at the end; what else stands there is left."""
    yield from s.spaces()
    if not (yield from s.attempt(call())):
        return False
    while (yield from s.attempt(_next(s, call))):
        pass
    yield from s.attempt(last(s, "]"))
    return True


def after_spaces(s: Scanner, *options: str) -> Wait[str]:
    """Reads whitespace and one of `options`; nothing if none comes."""
    begin = s.pos
    yield from s.spaces()
    found = yield from s.literal(*options)
    if not found:
        s.pos = begin
    return found


def last(s: Scanner, bracket: str) -> Wait[bool]:
    """Reads a closing bracket, and a comma too many before it."""
    yield from after_spaces(s, ",")
    return bool((yield from after_spaces(s, bracket)))


def tagged(
    s: Scanner, bodies: Mapping[str, Callable[[Scanner], Wait[bool]]], closing: tuple[str, ...]
) -> Wait[None]:
    """Content with calls in it: each opening tag has a body that reads what follows it.

    A tag with no call behind it is content, and so is what follows it.
    """
    inside = False
    while tag := (yield from s.until((*bodies, *closing), s.content)):
        if tag in bodies:
            inside = yield from s.attempt(bodies[tag](s))
            if not inside:
                s.content(tag)
        elif inside:
            inside = False
        else:
            s.content(tag)


def _next(s: Scanner, call: Callable[[], Wait[bool]]) -> Wait[bool]:
    if not (yield from after_spaces(s, ",")):
        return False
    yield from s.spaces()
    return (yield from call())


def _key(s: Scanner) -> Wait[str | None]:
    yield from s.spaces()
    key = yield from s.string()
    if key is None or not (yield from after_spaces(s, ":")):
        return None
    yield from s.spaces()
    return key


def _rest(s: Scanner) -> Wait[bool]:
    """What may follow a call's arguments."""
    while (more := (yield from after_spaces(s, ",", "}"))) == ",":
        if (yield from _key(s)) is None or (yield from _value(s)) is None:
            return False
    return bool(more)


def _value(s: Scanner) -> Wait[str | None]:
    """Reads any JSON value and gives its text."""
    first = yield from s.peek()
    if first == '"':
        text = yield from s.string()
        return None if text is None else json.dumps(text, ensure_ascii=False)
    if first in ("{", "["):
        parts: list[str] = []
        return "".join(parts) if (yield from s.nested(parts.append)) else None
    return (yield from s.run(SCALAR)) or None


def _object(value: str) -> str | None:
    """Arguments where no call could begin yet: an object, one inside a string, or null for none."""
    if value == "null":
        return "{}"
    text = json.loads(value).strip() if value.startswith('"') else value
    return text if text.startswith("{") else None
