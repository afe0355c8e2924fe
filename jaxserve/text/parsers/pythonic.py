"""Llama 3.2 and 4, and others: a Python list of calls, `[f(a="x"), g()]`, as the beginning of the message or
behind a tag. Arguments become JSON one by one, as each is complete."""

import re

from jaxserve.text.parsers.json_calls import after_spaces, last, separated, tagged
from jaxserve.text.parsers.scanner import Scanner, Wait, tags
from jaxserve.text.parsers.values import dump, literal

NAME = re.compile(r"[\w.]*")
OPEN = {"(": ")", "[": "]", "{": "}"}


@tags("<|python_start|>", "<|python_tag|>", "<|python_end|>")
def pythonic(s: Scanner) -> Wait[None]:
    yield from s.attempt(_calls(s, bare=True))
    tags = dict.fromkeys(("<|python_start|>", "<|python_tag|>"), _calls)
    yield from tagged(s, tags, ("<|python_end|>",))


def _calls(s: Scanner, bare: bool = False) -> Wait[bool]:
    yield from s.spaces()
    if not (yield from s.literal("[")):
        return False
    return (yield from separated(s, lambda: call(s, bare, (",", "]"))))


def call(s: Scanner, bare: bool, ends: tuple[str, ...]) -> Wait[bool]:
    """Reads `name(key=value, …)`. It begins with its first `key=`, or with `)` if one of `ends` follows.

    A value that is no literal becomes a string; where the call is cut off or goes wrong, its JSON stays open,
    and what can not be read is content. `bare`: only the name of a known tool will do.
    """
    name = yield from s.run(NAME)
    if not name or not (yield from s.literal("(")) or (bare and s.tools and name not in s.tools):
        return False
    if (yield from after_spaces(s, ")")):
        end = s.pos
        if not (yield from after_spaces(s, *ends)):
            return False
        s.pos = end
        s.begin(name)
        s.arguments("{}")
        return True
    key = yield from _key(s)
    opening = "{"
    if key:
        s.begin(name)
    while key:
        s.arguments(f"{opening}{dump(key)}: ")
        opening = ", "
        text, quote = yield from _value(s)
        if not (yield from s.peek()):  # cut off
            s.arguments(literal(text.strip() + quote)[:-1] if quote and text.strip()[0] == quote[0] else text)
            return True
        s.arguments(literal(text.strip()))
        end = s.pos
        key = (yield from _key(s)) if (yield from s.literal(",")) else ""
        if not key:
            s.pos = end
            if (yield from s.attempt(last(s, ")"))):
                s.arguments("}")
            return True
    return False


def _key(s: Scanner) -> Wait[str]:
    yield from s.spaces()
    key = yield from s.run(NAME)
    equals = yield from after_spaces(s, "=")
    return key if equals and (yield from s.peek()) != "=" else ""


def _value(s: Scanner) -> Wait[tuple[str, str]]:
    """Reads up to the `,` or bracket behind a value; its text, and the quote that is still open."""
    text, quote, start, escape = "", "", 0, False
    brackets: list[str] = []
    while c := (yield from s.peek()):
        if not quote and not brackets and c in ",)]}":
            break
        s.pos += 1
        text += c
        if escape:
            escape, start = False, len(text)
        elif quote:
            escape = c == "\\"
            if len(text) - start >= len(quote) and text.endswith(quote):
                quote = ""
        elif c in "'\"":
            quote = c
            for _ in range(2):
                if (yield from s.peek()) == c:
                    s.pos += 1
                    text += c
                    quote += c
            quote = "" if len(quote) == 2 else quote
            start = len(text)
        elif c in OPEN:
            brackets.append(c)
        elif c in OPEN.values():
            brackets.pop()
    return text, quote
