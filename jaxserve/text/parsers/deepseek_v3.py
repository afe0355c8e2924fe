"""DeepSeek V3, R1-0528 and V3.1.

Each call stands between `<｜tool▁call▁begin｜>` and `<｜tool▁call▁end｜>`, all of them between
`<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`:

    function<｜tool▁sep｜>name, a newline, ```json {…} ```     (V3)
    name<｜tool▁sep｜>{…}                                      (V3.1)
"""
# ruff: noqa: RUF001, RUF002 (the tags are what they are)

from jaxserve.text.parsers.json_calls import after_spaces
from jaxserve.text.parsers.scanner import Scanner, Wait, tags

CALLS, END_CALLS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, END_CALL = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
ENDS = (END_CALL, END_CALLS, CALL)
FENCE = "```"


@tags(CALLS, END_CALLS, CALL, END_CALL, SEPARATOR)
def deepseek_v3(s: Scanner) -> Wait[None]:
    """The tags around all calls are markup anywhere; a call without name or arguments is content."""
    while tag := (yield from s.until((CALLS, END_CALLS, CALL), s.content)):
        if tag == CALL and not (yield from s.attempt(_call(s))):
            s.content(tag)


def _call(s: Scanner) -> Wait[bool]:
    head: list[str] = []
    if (yield from s.until((SEPARATOR, *ENDS), head.append)) != SEPARATOR:
        return False
    yield from s.spaces()
    if (yield from s.peek()) != "{":
        head.clear()
        if (yield from s.until((FENCE, *ENDS), head.append)) != FENCE:
            return False
        yield from s.literal("json")
        yield from s.spaces()
    name = "".join(head).strip()
    if not name or (yield from s.peek()) != "{":
        return False
    s.begin(name)
    yield from s.nested(s.arguments, ENDS)
    yield from after_spaces(s, FENCE)
    yield from after_spaces(s, END_CALL)
    return True
