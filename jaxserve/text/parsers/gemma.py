"""Gemma's three spellings of a call:

```tool_code, then Python calls, one a line                                    (Gemma 1 to 3)
<start_function_call>call:f{a:<escape>text<escape>,b:1}<end_function_call>     (FunctionGemma)
<|tool_call>call:f{a:<|"|>text<|"|>,b:[1,2]}<tool_call|>                       (Gemma 4)
"""

import re

from jaxserve.text.parsers.json_calls import after_spaces, tagged
from jaxserve.text.parsers.pythonic import call
from jaxserve.text.parsers.scanner import Scanner, Wait, tags
from jaxserve.text.parsers.values import dump, escaped, literal

FENCE = "```"
TAGS = ("<start_function_call>", "<end_function_call>", "<escape>", "<|tool_call>", "<tool_call|>", '<|"|>')
NAME = re.compile(r"[\w.-]*")
KEY = re.compile(r"[^:,{}\[\]<]*")
BARE = re.compile(r"[^,{}\[\]<]*")
CLOSING = {"{": "}", "[": "]"}


@tags(*TAGS)
def gemma(s: Scanner) -> Wait[None]:
    bodies = {
        "```tool_code": _python,
        "<start_function_call>": lambda s: _call(s, "<escape>"),
        "<|tool_call>": lambda s: _call(s, '<|"|>'),
    }
    yield from tagged(s, bodies, ("<end_function_call>", "<tool_call|>"))


def _python(s: Scanner) -> Wait[bool]:
    found = False
    while True:
        begin = s.pos
        yield from s.spaces()
        if not (yield from s.attempt(call(s, False, (FENCE,)))):
            s.pos = begin
            break
        found = True
    if found:
        yield from after_spaces(s, FENCE)
    return found


def _call(s: Scanner, quote: str) -> Wait[bool]:
    """Its arguments become JSON as they come. Where they go wrong they stay open, and the rest is content."""
    yield from s.spaces()
    if not (yield from s.literal("call:")):
        return False
    name = yield from s.run(NAME)
    if not name or not (yield from s.literal("{")):
        return False
    s.begin(name)
    s.arguments("{")
    stack, comma = ["}"], ""
    while stack:
        if (yield from after_spaces(s, stack[-1])):
            s.arguments(stack.pop())
            comma = ", "
            continue
        begin = s.pos
        if comma:
            yield from after_spaces(s, ",")
        yield from s.spaces()
        if stack[-1] == "}":
            key = (yield from _quoted(s, quote)) or (yield from s.run(KEY)).strip()
            if not key or not (yield from s.literal(":")):
                s.pos = begin
                break
            comma += f"{dump(key)}: "
        yield from s.spaces()
        if (yield from s.literal(quote)):
            s.arguments(comma + '"')
            if not (yield from s.until((quote,), lambda text: s.arguments(escaped(text)))):
                break
            s.arguments('"')
        elif bracket := (yield from s.literal("{", "[")):
            s.arguments(comma + bracket)
            stack.append(CLOSING[bracket])
            comma = ""
            continue
        else:
            text = yield from s.run(BARE)
            cut = not (yield from s.peek())
            if not text:
                s.pos = begin
                break
            s.arguments(comma + (text if cut else literal(text.strip())))
        comma = ", "
    return True


def _quoted(s: Scanner, quote: str) -> Wait[str]:
    if not (yield from s.literal(quote)):
        return ""
    parts: list[str] = []
    yield from s.until((quote,), parts.append)
    return "".join(parts)
