"""Grammars for what a model writes: calls that must come or must fit, thoughts before an output with a form.

They are formats of structural tags (docs/structured_output.md).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.engine.grammar.schema import checked
from jaxserve.errors import InvalidRequest
from jaxserve.text.parsers.deepseek_v3 import CALL, CALLS, END_CALL, END_CALLS, SEPARATOR, deepseek_v3
from jaxserve.text.parsers.granite import granite, granite_tagged
from jaxserve.text.parsers.granite_reasoning import RESPONSE, THOUGHT, granite_reasoning, granite_thinks
from jaxserve.text.parsers.harmony import harmony
from jaxserve.text.parsers.hermes import hermes
from jaxserve.text.parsers.json_calls import call_list
from jaxserve.text.parsers.llama3_json import llama3_json
from jaxserve.text.parsers.mistral import TOOL_CALLS, mistral
from jaxserve.text.parsers.phi4_mini_json import phi4_mini_json
from jaxserve.text.parsers.qwen3_coder import qwen3_coder
from jaxserve.text.parsers.registry import Format
from jaxserve.text.parsers.scanner import Scanner, Wait
from jaxserve.text.parsers.think import CLOSE, OPEN, deepseek_r1, qwen3, thinks
from jaxserve.text.tools import ToolUse

Part = dict[str, Any]
TEXT: Part = {"type": "any_text"}
OBJECT: Part = {"type": "json_schema", "json_schema": {"type": "object"}}
OUTPUT: Part = {"type": "output"}
"""Where the form stands that a request asks for."""
MORE = {"patternProperties", "minProperties", "$ref", "anyOf", "oneOf", "allOf"}
"""Keywords of schemas whose properties are not all of an object's."""
MOST = 32
"""Calls of an answer that must have some: a small model would make others for ever."""


class Writing(NamedTuple):
    """How calls are written around the JSON of their arguments; `{}` is the name."""

    begin: str
    end: str
    separator: str = ""
    first: str = ""
    last: str = ""
    many: bool = True
    trigger: str = ""
    """What calls begin with, and no other text does."""
    free: Part = OBJECT
    """Arguments that need not fit."""


LIST = Writing('{{"name": "{}", "arguments": ', "}", ", ", "[", "]")
TAGGED = Writing('<tool_call>\n{{"name": "{}", "arguments": ', "}\n</tool_call>", "\n", trigger="<tool_call>")
CODER = Writing(
    "<tool_call>\n<function={}>\n", "\n</function>\n</tool_call>", "\n", trigger="<tool_call>", free=TEXT
)
FINAL = "<|channel|>final<|message|>"
WRITINGS: dict[Format, Writing] = {
    hermes: TAGGED,
    llama3_json: Writing('{{"name": "{}", "parameters": ', "}", "; "),
    mistral: LIST._replace(first=f"{TOOL_CALLS}[", trigger=TOOL_CALLS),
    phi4_mini_json: LIST._replace(first="<|tool_call|>[", last="]<|/tool_call|>", trigger="<|tool_call|>"),
    deepseek_v3: Writing(f"{CALL}{{}}{SEPARATOR}", END_CALL, "", CALLS, END_CALLS, trigger=CALLS),
    qwen3_coder: CODER,
    harmony: Writing("<|channel|>commentary to=functions.{} <|constrain|>json<|message|>", "", many=False),
}
CHOSEN: dict[Format, tuple[Writing, ...]] = {
    **{format: (writing,) for format, writing in WRITINGS.items() if writing.trigger},
    qwen3_coder: (CODER, CODER._replace(begin="<function={}>\n", end="\n</function>", trigger="<function=")),
    granite: (
        TAGGED,
        LIST._replace(first="<tool_call>[", trigger="<tool_call>"),
        LIST._replace(first="<|tool_call|>[", trigger="<|tool_call|>"),
    ),
}
"""All ways in which a model may begin a call by itself."""


def json_list(s: Scanner) -> Wait[None]:
    """Reads what `LIST` writes, for formats that have no writing of their own."""
    yield from s.attempt(call_list(s, bare=True))


def read_by(format: Format, use: ToolUse) -> Format:
    """The format in which calls are read that must come, or must fit."""
    if use.forced:
        return format if format in WRITINGS else json_list
    return granite_tagged if format is granite and use.strict else format


def constraint(
    calls: Format | None,
    reasoning: Format | None,
    use: ToolUse,
    prompt: str,
    wanted: Any,
    continued: str | None = None,
) -> Constraint | None:
    """What an output is held to; `wanted`, if that is all.

    A form that is wanted is the content's: thoughts come before it, and a call may stand in its place. Where
    a call must come there is nothing else. `prompt`: its end; `continued`: the text of the message that the
    output goes on with, None where it begins one. Raises InvalidRequest for what cannot be enforced.
    """
    thoughts = _THOUGHTS[reasoning](prompt, continued) if reasoning in _THOUGHTS else None
    begun = reasoning is not harmony or continued is not None
    content = OUTPUT if begun else _sequence(_text(FINAL), OUTPUT)
    writing = WRITINGS.get(calls, LIST) if calls else LIST
    if calls and use.forced:
        return _held(thoughts, _calls(writing, use), "tool_choice")
    if calls and wanted is None:
        if calls is harmony and use.strict:
            return _held(None, _messages(writing, use, continued is not None), "tools")
        if calls in CHOSEN and use.strict:
            return _held(thoughts, _text_and_calls(CHOSEN[calls], use), "tools")
        return None
    if wanted is None or (calls is None and thoughts is None and content is OUTPUT):
        return wanted
    if calls and calls not in WRITINGS:
        told = f"with this model's calls {wanted.param} needs tool_choice none or required"
        raise InvalidRequest(told, wanted.param, "unsupported_field")
    form = _either(content, _calls(writing, use)) if calls else content
    return replace(wanted, within=_after(thoughts, form))


def _held(thoughts: Part | None, form: Part, param: str) -> Constraint:
    return Constraint("structural_tag", {"format": _after(thoughts, form)}, param)


def _after(thoughts: Part | None, form: Part) -> Part:
    return form if thoughts is None else _sequence(thoughts, form)


def _calls(writing: Writing, use: ToolUse, loose: bool = False) -> Part:
    return _tag(writing.first, _one_or_more(writing, use, loose), writing.last)


def _one_or_more(writing: Writing, use: ToolUse, loose: bool) -> Part:
    return {
        "type": "tags_with_separator",
        "tags": _tags(writing, use, loose),
        "separator": writing.separator,
        "at_least_one": True,
        "at_most": MOST if use.many and writing.many else 1,
    }


def _text_and_calls(writings: Sequence[Writing], use: ToolUse) -> Part:
    """Text in which calls of strict tools fit.

    Where the prompt leaves open whether there are thoughts, a call in them has to fit too.
    """
    tags: list[Part] = []
    for writing in writings:
        tags += [_calls(writing, use, True)] if writing.first else _tags(writing, use, True)
    return {
        "type": "triggered_tags",
        "triggers": list(dict.fromkeys(writing.trigger for writing in writings)),
        "tags": tags,
        "stop_after_first": not use.many,
    }


def _messages(writing: Writing, use: ToolUse, begun: bool) -> Part:
    """Harmony's: thoughts and words before a call, then a call, which fits if its tool is strict, or text."""
    last = _either(TEXT if begun else _sequence(_text(FINAL), TEXT), _calls(writing, use, True))
    end = "<|end|><|start|>assistant"
    first = [_tag(f"<|channel|>{name}<|message|>", TEXT, end) for name in ("analysis", "commentary")]
    return last if begun else _sequence({"type": "tags_with_separator", "tags": first, "separator": ""}, last)


def _tags(writing: Writing, use: ToolUse, loose: bool) -> list[Part]:
    """A call of each tool that may be called. `loose`: tools that are not strict take any arguments."""
    tags = []
    for i, function in enumerate(tool["function"] for tool in use.offered):
        if use.named in (None, function["name"]):
            free = loose and not function.get("strict")
            place = f"tools[{i}].function.parameters"
            content = writing.free if free else _arguments(function["parameters"], place)
            tags.append(_tag(writing.begin.format(function["name"]), content, writing.end))
    return tags


def _arguments(parameters: Mapping[str, Any], place: str) -> Part:
    """What fits a tool's schema: an object with its parameters, and with others only if it says
    something of them."""
    checked(parameters, place)
    known, required = parameters.get("properties", {}), parameters.get("required", ())
    more = parameters.keys() & MORE or not known.keys() >= set(required)
    schema = {"type": "object", **({} if more else {"additionalProperties": False}), **parameters}
    return {"type": "json_schema", "json_schema": schema, "param": place}


def _deepseek_r1(prompt: str, continued: str | None) -> Part | None:
    return None if thinks(prompt, continued) is False else _sequence(_tag("", TEXT, CLOSE), _lines())


def _qwen3(prompt: str, continued: str | None) -> Part | None:
    if thinks(prompt, continued) is not None:
        return _deepseek_r1(prompt, continued)
    return _maybe(_tag(OPEN, TEXT, CLOSE), _lines())


def _granite(prompt: str, continued: str | None) -> Part | None:
    match granite_thinks(continued):
        case None:
            return _maybe(_tag(THOUGHT[0], TEXT, RESPONSE[0]), _lines())
        case True:
            return _sequence(_tag("", TEXT, RESPONSE[0]), _lines())
    return None


def _harmony(prompt: str, continued: str | None) -> Part | None:
    if continued is not None:
        return None
    return _maybe(_tag("<|channel|>analysis<|message|>", TEXT, "<|end|>"), _text("<|start|>assistant"))


_THOUGHTS: dict[Format | None, Callable[[str, str | None], Part | None]] = {
    deepseek_r1: _deepseek_r1,
    qwen3: _qwen3,
    granite_reasoning: _granite,
    harmony: _harmony,
}
"""What comes before the output, by the end of the prompt."""


def _sequence(*parts: Part) -> Part:
    return {"type": "sequence", "elements": list(parts)}


def _either(*parts: Part) -> Part:
    return {"type": "or", "elements": list(parts)}


def _maybe(*parts: Part) -> Part:
    return _either(_text(""), _sequence(*parts))


def _tag(begin: str, content: Part, end: str) -> Part:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _text(text: str) -> Part:
    return {"type": "const_string", "value": text}


def _lines() -> Part:
    return {"type": "regex", "pattern": "\\n{0,2}"}
