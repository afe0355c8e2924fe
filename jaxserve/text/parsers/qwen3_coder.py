"""Qwen 3 Coder and Qwen 3.5.

`<tool_call><function=F><parameter=K>`, value, `</parameter>` … `</function></tool_call>`, each tag on a line
(or all arguments as one JSON object in the place of the parameters).
"""

import json
import re

from jaxserve.text.parsers.json_calls import after_spaces, tagged
from jaxserve.text.parsers.scanner import Scanner, Wait, tags
from jaxserve.text.parsers.values import escaped, kinds, literal

FUNCTION, PARAMETER = "<function=", "<parameter="
CLOSING = ("</function>", "</tool_call>")
# The newline before a tag is the tag's. A missing `</parameter>` does no harm if the next tag begins a line.
VALUE_ENDS = ("</parameter>", "\n</parameter>", "\n" + PARAMETER, "\n</function>", "\n</tool_call>")
NAME = re.compile(r"[^<>\n]*")


@tags("<tool_call>", "</tool_call>")
def qwen3_coder(s: Scanner) -> Wait[None]:
    yield from tagged(s, {"<tool_call>": _call, FUNCTION: _function}, ("</tool_call>",))


def _call(s: Scanner) -> Wait[bool]:
    if not (yield from after_spaces(s, FUNCTION)):
        return False
    return (yield from _function(s))


def _function(s: Scanner) -> Wait[bool]:
    """The call begins with its name. A text parameter is given as it comes, any other when it is complete."""
    name = (yield from s.run(NAME)).strip()
    if not name or not (yield from s.literal(">")):
        return False
    s.begin(name)
    if (yield from s.attempt(_json(s))):
        yield from after_spaces(s, *CLOSING)
        return True
    opening = "{"
    properties = s.tools.get(name, {}).get("properties")
    properties = properties if isinstance(properties, dict) else {}
    tag = yield from after_spaces(s, PARAMETER, *CLOSING)
    while tag == PARAMETER:
        key = yield from s.run(NAME)
        if not (yield from s.literal(">")):
            s.content(PARAMETER + key)
            return True
        s.arguments(f"{opening}{json.dumps(key.strip(), ensure_ascii=False)}: ")
        opening = ", "
        yield from s.literal("\n")
        end = yield from _value(s, properties.get(key.strip()))
        if end is None:
            return True
        tag = end.strip()
        if tag == "</parameter>":
            tag = yield from after_spaces(s, PARAMETER, *CLOSING)
    if tag:
        s.arguments("{}" if opening == "{" else "}")
    return True


def _json(s: Scanner) -> Wait[bool]:
    yield from s.spaces()
    if (yield from s.peek()) != "{":
        return False
    yield from s.nested(s.arguments, CLOSING)
    return True


def _value(s: Scanner, schema: object) -> Wait[str | None]:
    """Reads a value and the tag behind it. The schema says whether it is text; a parameter without one is."""
    allowed = kinds(schema)
    if schema is None or allowed == {"string"}:
        s.arguments('"')
        end = yield from s.until(VALUE_ENDS, lambda text: s.arguments(escaped(text)))
        s.arguments('"' if end else "")
        return end
    parts: list[str] = []
    end = yield from s.until(VALUE_ENDS, parts.append)
    text = "".join(parts)
    s.arguments(literal(text, allowed) if end else text)
    return end
