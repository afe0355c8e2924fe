"""Phi-4-mini: `functools[{"name": …, "arguments": {…}}, …]`, or the list between `<|tool_call|>` and
`<|/tool_call|>`."""

from jaxserve.text.parsers.json_calls import call_list, tagged
from jaxserve.text.parsers.scanner import Scanner, Wait, tags


@tags("<|tool_call|>", "<|/tool_call|>")
def phi4_mini_json(s: Scanner) -> Wait[None]:
    yield from tagged(s, {"functools": call_list, "<|tool_call|>": call_list}, ("<|/tool_call|>",))
