"""Granite 3: `<|tool_call|>[{"name": …, "arguments": {…}}, …]` (from 3.1 on `<tool_call>`), or the bare list.

Bare, it must be the beginning of the message. Granite 4 writes a `<tool_call>{…}</tool_call>` for each call.
"""

from jaxserve.text.parsers.json_calls import call_list, tagged
from jaxserve.text.parsers.scanner import Scanner, Wait, tags


@tags("<|tool_call|>", "<tool_call>", "</tool_call>")
def granite(s: Scanner) -> Wait[None]:
    yield from s.attempt(call_list(s, bare=True))
    yield from granite_tagged(s)


@tags("<|tool_call|>", "<tool_call>", "</tool_call>")
def granite_tagged(s: Scanner) -> Wait[None]:
    """Without the bare list."""
    yield from tagged(s, {"<|tool_call|>": call_list, "<tool_call>": call_list}, ("</tool_call>",))
