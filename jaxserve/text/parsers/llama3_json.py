"""Llama 3.1 to 4: `{"name": …, "parameters": {…}}` as the beginning of the message or after
`<|python_tag|>`; more calls follow after `;`."""

from jaxserve.text.parsers.json_calls import after_spaces, call_object
from jaxserve.text.parsers.scanner import Scanner, Wait, tags

PYTHON_TAG = "<|python_tag|>"


@tags(PYTHON_TAG)
def llama3_json(s: Scanner) -> Wait[None]:
    yield from s.attempt(_calls(s, bare=True))
    while (yield from s.until((PYTHON_TAG,), s.content)):
        if not (yield from s.attempt(_calls(s, bare=False))):
            s.content(PYTHON_TAG)


def _calls(s: Scanner, bare: bool) -> Wait[bool]:
    yield from s.spaces()
    if not (yield from call_object(s, bare)):
        return False
    while (yield from s.attempt(_next(s, bare))):
        pass
    return True


def _next(s: Scanner, bare: bool) -> Wait[bool]:
    if not (yield from after_spaces(s, ";")):
        return False
    yield from s.spaces()
    return (yield from call_object(s, bare))
