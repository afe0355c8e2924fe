"""Reasoning between `<think>` and `</think>`, first in the output; either tag may stand in the prompt."""

from jaxserve.text.parsers.scanner import Scanner, Wait, opened_last, tags

OPEN, CLOSE = "<think>", "</think>"


@tags(OPEN, CLOSE)
def deepseek_r1(s: Scanner) -> Wait[None]:
    """DeepSeek R1: it always thinks: all up to `</think>` is reasoning, with or without `<think>`."""
    yield from _think(s, always=True)


@tags(OPEN, CLOSE)
def qwen3(s: Scanner) -> Wait[None]:
    """Qwen 3 and most others: it thinks if the output begins with `<think>`, or the prompt ended with it."""
    yield from _think(s, always=False)


def thinks(prompt: str, continued: str | None) -> bool | None:
    """Whether the output begins among thoughts; None: the output says so itself."""
    if continued is not None:
        return opened_last(continued, (OPEN,), (CLOSE,))
    prompt = prompt.rstrip()
    return False if prompt.endswith(CLOSE) else prompt.endswith(OPEN) or None  # off, by the template


def _think(s: Scanner, always: bool) -> Wait[None]:
    known = thinks(s.prompt, s.continued)
    if known is False:
        return
    opened = yield from s.attempt(_opening(s))
    if opened or always or known:
        if s.continued is None:
            yield from s.spaces()
        yield from s.until((CLOSE,), s.reasoning)
        yield from s.spaces()


def _opening(s: Scanner) -> Wait[bool]:
    yield from s.spaces()
    return bool((yield from s.literal(OPEN)))
