"""Grammars for what a model writes: calls that must come, thoughts before an output that has a form.

They are formats of structural tags (docs/structured_output.md).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxserve.engine.grammar.schema import checked
from jaxserve.text.parsers.deepseek_v3 import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR, deepseek_v3
from jaxserve.text.parsers.granite_reasoning import RESPONSE, THOUGHT, granite_reasoning
from jaxserve.text.parsers.harmony import harmony
from jaxserve.text.parsers.hermes import hermes
from jaxserve.text.parsers.json_calls import call_list
from jaxserve.text.parsers.llama3_json import llama3_json
from jaxserve.text.parsers.mistral import TOOL_CALLS, mistral
from jaxserve.text.parsers.phi4_mini_json import phi4_mini_json
from jaxserve.text.parsers.registry import Format
from jaxserve.text.parsers.scanner import Scanner, Wait
from jaxserve.text.parsers.think import CLOSE, OPEN, deepseek_r1, qwen3

Part = dict[str, Any]
TEXT: Part = {"type": "any_text"}
OUTPUT: Part = {"type": "output"}
"""Where the form stands that a request asks for."""


MORE = {"patternProperties", "minProperties", "$ref", "anyOf", "oneOf", "allOf"}


class Writing(NamedTuple):
    """How calls are written around the JSON of their arguments; `{}` is the name."""

    begin: str
    end: str
    separator: str = ""
    first: str = ""
    last: str = ""
    many: bool = True


LIST = Writing('{{"name": "{}", "arguments": ', "}", ", ", "[", "]")
WRITINGS: dict[Format, Writing] = {
    hermes: Writing('<tool_call>\n{{"name": "{}", "arguments": ', "}\n</tool_call>", "\n"),
    llama3_json: Writing('{{"name": "{}", "parameters": ', "}", "; "),
    mistral: LIST._replace(first=f"{TOOL_CALLS}["),
    phi4_mini_json: LIST._replace(first="<|tool_call|>[", last="]<|/tool_call|>"),
    deepseek_v3: Writing(f"{CALL}{{}}{SEPARATOR}", END_CALL, "", CALLS, END_CALLS),
    harmony: Writing("<|channel|>commentary to=functions.{} <|constrain|>json<|message|>", "", many=False),
}


def json_list(s: Scanner) -> Wait[None]:
    """What `LIST` is read by, for formats that have no grammar of their own."""
    yield from s.attempt(call_list(s, bare=True))


def reads_forced(format: Format) -> Format:
    return format if format in WRITINGS else json_list


def calls(format: Format, tools: Sequence[Mapping[str, Any]], many: bool) -> Part:
    """At least one call of the tools. Raises InvalidRequest for a schema that cannot be enforced."""
    writing = WRITINGS.get(format, LIST)
    tags = [
        _tag(
            writing.begin.format(tool["function"]["name"]),
            {"type": "json_schema", "json_schema": arguments(tool["function"]["parameters"], i)},
            writing.end,
        )
        for i, tool in enumerate(tools)
    ]
    one_or_more = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": writing.separator,
        "at_least_one": True,
        "stop_after_first": not (many and writing.many),
    }
    return _sequence(_text(writing.first), one_or_more, _text(writing.last))


def arguments(parameters: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The schema of the i-th tool's arguments: an object that has its parameters, and no more unless it says
    something of others."""
    checked(parameters, f"tools[{i}].function.parameters")
    known, required = parameters.get("properties", {}), parameters.get("required", ())
    more = parameters.keys() & MORE or not known.keys() >= set(required)
    return {"type": "object", **({} if more else {"additionalProperties": False}), **parameters}


def thoughts(format: Format | None, prompt: str) -> Part | None:
    """What a model that reasons writes before its output; None for nothing. `prompt`: its end."""
    return _THOUGHTS[format](prompt.rstrip()) if format in _THOUGHTS else None


def output(format: Format | None) -> Part:
    """The output itself, as a model that reasons writes it."""
    return _sequence(_text("<|channel|>final<|message|>"), OUTPUT) if format is harmony else OUTPUT


def whole(thoughts: Part | None, forms: list[Part]) -> Part:
    """One of `forms` behind the thoughts."""
    form = forms[0] if len(forms) == 1 else {"type": "or", "elements": forms}
    return form if thoughts is None else _sequence(thoughts, form)


def _deepseek_r1(prompt: str) -> Part | None:
    if prompt.endswith(CLOSE):  # the template has turned thinking off
        return None
    return _sequence(_tag("", TEXT, CLOSE), _lines())


def _qwen3(prompt: str) -> Part | None:
    if prompt.endswith((OPEN, CLOSE)):
        return _deepseek_r1(prompt)
    return _maybe(_tag(OPEN, TEXT, CLOSE), _lines())


def _granite(prompt: str) -> Part | None:
    return _maybe(_tag(THOUGHT[0], TEXT, RESPONSE[0]), _lines())


def _harmony(prompt: str) -> Part | None:
    return _maybe(_tag("<|channel|>analysis<|message|>", TEXT, "<|end|>"), _text("<|start|>assistant"))


_THOUGHTS: dict[Format | None, Callable[[str], Part | None]] = {
    deepseek_r1: _deepseek_r1,
    qwen3: _qwen3,
    granite_reasoning: _granite,
    harmony: _harmony,
}


def _sequence(*parts: Part) -> Part:
    return {"type": "sequence", "elements": list(parts)}


def _maybe(*parts: Part) -> Part:
    return {"type": "or", "elements": [_text(""), _sequence(*parts)]}


def _tag(begin: str, content: Part, end: str) -> Part:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _text(text: str) -> Part:
    return {"type": "const_string", "value": text}


def _lines() -> Part:
    return {"type": "regex", "pattern": "\\n{0,2}"}
