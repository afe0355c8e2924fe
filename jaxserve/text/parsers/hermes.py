"""Hermes 2/3, Qwen 2.5 and Qwen 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from jaxserve.text.parsers.json_calls import call_list, tagged
from jaxserve.text.parsers.scanner import Scanner, Wait, tags


@tags("<tool_call>", "</tool_call>")
def hermes(s: Scanner) -> Wait[None]:
    yield from tagged(s, {"<tool_call>": call_list}, ("</tool_call>",))
