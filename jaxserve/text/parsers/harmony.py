"""OpenAI's harmony (gpt-oss), a reasoning and a tool format at once.

Messages have a header, `<|channel|>NAME [to=functions.F] [<|constrain|>json]<|message|>`, and `<|end|>`,
`<|call|>` or `<|return|>` behind them.
"""

import re

from jaxserve.text.parsers.scanner import Scanner, Wait, tags

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
RECIPIENT = re.compile(r"\bto=([^\s<]+)")
ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")


@tags(START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
def harmony(s: Scanner) -> Wait[None]:
    """`analysis` and what goes to built-in tools is reasoning, what goes to `functions.F` calls F; any
    other message is content, and so are a header that leads to no message and text outside of messages."""
    first = yield from s.attempt(_recipient(s))
    tag: str | None = "" if first else (yield from s.until((START, CHANNEL, MESSAGE, *ENDS), s.content))
    while tag is not None:
        if tag in ENDS:
            tag = yield from s.until((START, CHANNEL, MESSAGE, *ENDS), s.content)
            continue
        header = [tag] if tag != MESSAGE else []
        if tag != MESSAGE:
            tag = yield from s.until((MESSAGE, START, *ENDS), header.append)
        if tag != MESSAGE:
            s.content("".join(header))
            continue
        tag = yield from _body(s, "".join(header))


def _recipient(s: Scanner) -> Wait[bool]:
    """Whether the output goes on with the header that the prompt began; it is read as a header then."""
    yield from s.spaces()
    begin = s.pos
    found = bool((yield from s.literal("to=")))
    s.pos = begin
    return found


def _body(s: Scanner, header: str) -> Wait[str | None]:
    to = RECIPIENT.search(header)
    out = s.reasoning if to or ANALYSIS.search(header) else s.content
    if to and (name := to[1].removeprefix("functions.")) != to[1] and name:
        s.begin(name)
        end = yield from s.literal(*ENDS)
        if end or not (yield from s.peek()):  # the stop token itself need not be shown
            s.arguments("{}")
            return end or None
        out = s.arguments
    return (yield from s.until((START, CHANNEL, *ENDS), out))
