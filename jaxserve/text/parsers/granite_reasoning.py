"""Granite 3.2: `Here is my thought process:` … `Here is my response:` (or `Here's`)."""

from jaxserve.text.parsers.scanner import Scanner, Wait, opened_last

THOUGHT = ("Here is my thought process:", "Here's my thought process:")
RESPONSE = ("Here is my response:", "Here's my response:")


def granite_reasoning(s: Scanner) -> Wait[None]:
    """Only at the beginning of the output: the same words later on are content."""
    known = granite_thinks(s.continued)
    if known or (known is None and (yield from s.attempt(_opening(s)))):
        if not known:
            yield from s.spaces()
        yield from s.until(RESPONSE, s.reasoning)
        yield from s.spaces()


def granite_thinks(continued: str | None) -> bool | None:
    """Whether the output begins among thoughts; None: the output says so itself."""
    return None if continued is None else opened_last(continued, THOUGHT, RESPONSE)


def _opening(s: Scanner) -> Wait[bool]:
    yield from s.spaces()
    return bool((yield from s.literal(*THOUGHT)))
