"""Mistral: `[TOOL_CALLS]` before a list of calls, or before each call.

[TOOL_CALLS][{"name": …, "arguments": {…}}, …]      (up to tokenizer v7)
[TOOL_CALLS]name{…}                                 (v11)
[TOOL_CALLS]name[ARGS]{…}                           (v13; or name[CALL_ID]id[ARGS]{…})
"""

import re
import secrets
import string

from jaxserve.text.parsers.json_calls import call_list
from jaxserve.text.parsers.scanner import Scanner, Wait, tags

TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
NAME = re.compile(r"[\w.-]*")
ALPHABET = string.ascii_letters + string.digits


@tags(TOOL_CALLS, CALL_ID, ARGS)
def mistral(s: Scanner) -> Wait[None]:
    s.new_id = lambda: "".join(secrets.choice(ALPHABET) for _ in range(9))  # its templates refuse any other
    while (yield from s.until((TOOL_CALLS,), s.content)):
        if not (yield from s.attempt(_call(s))):
            s.content(TOOL_CALLS)


def _call(s: Scanner) -> Wait[bool]:
    yield from s.spaces()
    if (yield from s.peek()) in ("[", "{"):
        return (yield from call_list(s, tags=(TOOL_CALLS,)))
    name = yield from s.run(NAME)
    tag = yield from s.literal(CALL_ID, ARGS)
    id = (yield from s.run(NAME)) if tag == CALL_ID else None
    if tag == CALL_ID:
        yield from s.literal(ARGS)
    yield from s.spaces()
    if not name or (yield from s.peek()) != "{":
        return False
    s.begin(name, id)
    yield from s.nested(s.arguments, (TOOL_CALLS,))
    return True
