"""Calls that must come and thoughts before a form: random walks over the masks, read back by the parsers."""

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from jaxserve.engine.grammar.compiler import Compiler
from jaxserve.engine.grammar.constraint import Constraint, from_structured_outputs
from jaxserve.engine.grammar.source import grammar
from jaxserve.engine.grammar.vocabulary import Vocabulary
from jaxserve.errors import InvalidRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.structs import to_struct
from jaxserve.text.call_grammar import MOST, WRITINGS
from jaxserve.text.parsers import Message, collect
from jaxserve.text.parsers.registry import TOOL_PARSERS
from jaxserve.text.reading import Formats
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools import ToolUse
from tests.engine.grammar.walks import text_of, walk

WALKS = 4
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
SCHEMAS = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
    "move": {"$defs": {"point": POINT}, "properties": {"to": {"$ref": "#/$defs/point"}}, "required": ["to"]},
    "now": {},
    "stop": {"type": "object", "required": ["why"]},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
TOOLS.append({"type": "function", "function": {"name": "clock", "strict": True}})
JSON = from_structured_outputs({"json": {"enum": [3, {"a": 1}]}})


@pytest.fixture(scope="session")
def write(
    tokenizer: Tokenizer, compiler: Compiler, special: dict[str, int], vocabulary: Vocabulary
) -> Callable[..., list[tuple[str, Message]]]:
    """Texts that a model may write to a request, each with the message that it is read as."""

    def texts(
        formats: Formats,
        prompt: str = "",
        wanted: Constraint | None = None,
        begin: str = "",
        continued: str | None = None,
        **use: Any,
    ) -> list[tuple[str, Message]]:
        asked = SamplingParams(structured_outputs=wanted)
        make, params = formats.reading(tokenizer, to_struct(use, ToolUse), prompt, asked, continued)
        assert isinstance(params.structured_outputs, Constraint) and make is not None
        matcher = compiler.compile(grammar(params.structured_outputs, special))
        for token in tokenizer.encode(begin, add_special_tokens=False):
            assert matcher.accept(token), begin
        found = [begin + text_of(walk(matcher.copy(), vocabulary, i), vocabulary) for i in range(WALKS)]
        parsers = [make() for _ in found]
        return [
            (text, collect(parser.feed(text) + parser.finish()))
            for text, parser in zip(found, parsers, strict=True)
        ]

    return texts


def check(message: Message) -> None:
    for call in message.tool_calls:
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        jsonschema.validate(arguments, SCHEMAS.get(call.name, {"maxProperties": 0}))
        assert call.name != "now" or not arguments


@pytest.mark.parametrize("name", dict.fromkeys(TOOL_PARSERS.values()), ids=lambda format: format.__name__)
def test_a_call_that_must_come_is_one(name: Any, write: Callable[..., Any]) -> None:
    formats = Formats(name, None)
    for text, message in write(formats, tools=TOOLS, tool_choice="required"):
        assert message.tool_calls and not message.content.strip(), text
        check(message)
    named = {"type": "function", "function": {"name": "move"}}
    for _, message in write(formats, tools=TOOLS, tool_choice=named):
        (call,) = message.tool_calls
        assert call.name == "move"
        check(message)


def test_calls_are_as_many_as_may_be(write: Callable[..., Any]) -> None:
    formats = Formats.choose("hermes", "none", "", None)
    clock = {"tools": TOOLS[-1:], "tool_choice": "required"}
    assert {len(message.tool_calls) for _, message in write(formats, **clock)} > {1}
    for text, message in write(formats, **clock, parallel_tool_calls=False):
        assert text == '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
        assert [(call.name, call.arguments) for call in message.tool_calls] == [("clock", "{}")]
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    begin = "\n".join([call] * (MOST - 1))
    lengths = {len(message.tool_calls) for _, message in write(formats, **clock, begin=begin)}
    assert lengths == {MOST - 1, MOST}


@pytest.mark.parametrize(
    ("name", "prompt", "begin"),
    [
        ("deepseek_r1", "", "Hm {.</think>\n\n"),
        ("deepseek_r1", "<think>\n", "Hm {.</think>"),
        ("deepseek_r1", "</think>", ""),
        ("qwen3", "", "<think>\nHm {.</think>\n\n"),
        ("qwen3", "<think>\n", "Hm {.</think>"),
        ("qwen3", "<think>\n\n</think>\n\n", ""),
        ("granite", "", "Here is my thought process: Hm {. Here is my response:"),
        ("gpt_oss", "", "<|channel|>analysis<|message|>Hm {.<|end|><|start|>assistant<|channel|>"),
        ("gpt_oss", "", "<|channel|>"),
    ],
)
def test_thoughts_are_free_before_calls_and_forms(
    name: str, prompt: str, begin: str, write: Callable[..., Any]
) -> None:
    formats = Formats.choose("openai" if name == "gpt_oss" else "hermes", name, "", None)
    if begin == "<|channel|>":
        call, final = "<|channel|>commentary", "<|channel|>final"
    else:
        call = final = begin
    thought = "Hm {." if "Hm" in begin else ""
    for text, message in write(formats, prompt, begin=call, tools=TOOLS, tool_choice="required"):
        assert message.tool_calls and not message.content.strip(), text
        assert message.reasoning.strip() == thought
        check(message)
    for text, message in write(formats, prompt, JSON, final):
        assert message.content.strip() in ("3", '{"a": 1}', '{"a":1}'), text
        assert message.reasoning.strip() == thought


@pytest.mark.parametrize(
    ("name", "continued", "begin"),
    [
        ("deepseek_r1", "<think> Well, ", "Hm {.</think>"),
        ("deepseek_r1", "So ", ""),
        ("qwen3", "<think> Well, ", "Hm {.</think>"),
        ("qwen3", "<think> Well, </think>So ", ""),
        ("granite", "Here is my thought process: Well, ", "Hm {.Here is my response:"),
        ("granite", "Here is my thought process: Well, Here is my response:", ""),
        ("gpt_oss", "So ", ""),
    ],
)
def test_a_form_of_a_message_that_goes_on(
    name: str, continued: str, begin: str, write: Callable[..., Any]
) -> None:
    formats = Formats.choose("openai" if name == "gpt_oss" else "hermes", name, "", None)
    for text, message in write(formats, f"…{continued}", JSON, begin, continued):
        assert message.content.strip() in ("3", '{"a": 1}', '{"a":1}'), text
        assert message.reasoning == ("Hm {." if begin else "")


def test_a_form_beside_tools_is_for_the_content(write: Callable[..., Any]) -> None:
    formats = Formats.choose("hermes", "qwen3", "", None)
    kinds = set()
    for text, message in write(formats, "<think></think>", JSON, tools=TOOLS):
        assert bool(message.tool_calls) != (message.content in ("3", '{"a": 1}', '{"a":1}')), text
        check(message)
        kinds.add(bool(message.tool_calls))
    with pytest.raises(InvalidRequest) as error:
        write(Formats.choose("pythonic", "none", "", None), "", JSON, tools=TOOLS)
    assert error.value.param == JSON.param


def test_what_needs_no_grammar_has_none(tokenizer: Tokenizer) -> None:
    formats = Formats.choose("hermes", "qwen3", "", None)
    plain = SamplingParams()
    assert formats.reading(tokenizer, to_struct({"tools": TOOLS[:-1]}, ToolUse), "", plain)[1] is plain
    assert formats.reading(tokenizer, ToolUse(), "", plain)[1] is plain
    wanted = SamplingParams(structured_outputs=JSON)
    settled = formats.reading(tokenizer, ToolUse(), "<think>\n\n</think>", wanted)[1]
    assert settled is wanted


def test_a_schema_that_cannot_be_enforced_is_named_by_its_tool(write: Callable[..., Any]) -> None:
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(InvalidRequest) as error:
        write(Formats.choose("hermes", "none", "", None), tools=[*TOOLS, wrong], tool_choice="required")
    assert error.value.param == "tools[5].function.parameters#/properties/a/not"


@pytest.mark.parametrize("name", ["hermes", "deepseek_v3"])
@pytest.mark.parametrize(("choice", "wanted"), [("required", None), ("auto", JSON), ("auto", None)])
def test_a_schema_that_does_not_compile_is_named_by_its_tool(
    name: str, choice: str, wanted: Constraint | None, write: Callable[..., Any]
) -> None:
    parameters = {"properties": {"a": {"items": {"type": "strin"}}}}
    wrong = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    formats = Formats.choose(name, "none", "", None)
    with pytest.raises(InvalidRequest) as error:
        write(formats, wanted=wanted, tools=[*TOOLS, wrong], tool_choice=choice)
    assert error.value.param == "tools[5].function.parameters#/properties/a/items"
    assert str(error.value) == "tools[5].function.parameters: Invalid type: strin (at #/properties/a/items)"


def test_a_forms_errors_stay_its_own_behind_thoughts(
    tokenizer: Tokenizer, compiler: Compiler, special: dict[str, int]
) -> None:
    formats = Formats.choose("hermes", "deepseek_r1", "", None)
    wanted = from_structured_outputs({"json": {"properties": {"a": {"type": "strin"}}}})
    params = formats.reading(tokenizer, ToolUse(), "", SamplingParams(structured_outputs=wanted))[1]
    assert isinstance(params.structured_outputs, Constraint) and params.structured_outputs.within
    with pytest.raises(InvalidRequest) as error:
        compiler.compile(grammar(params.structured_outputs, special))
    assert error.value.param == "structured_outputs.json#/properties/a"


def test_the_place_of_a_form_is_no_format_for_clients(special: dict[str, int]) -> None:
    wanted = from_structured_outputs({"structural_tag": {"format": {"type": "output"}}})
    with pytest.raises(InvalidRequest) as error:
        grammar(wanted, special)
    assert error.value.param == "structured_outputs.structural_tag.format.type"


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        *((name, WRITINGS[TOOL_PARSERS[name]].trigger) for name in ("hermes", "mistral", "deepseek_v3")),
        *(("phi4_mini_json", "<|tool_call|>"), ("qwen3_coder", "<tool_call>"), ("qwen3_coder", "<function=")),
        *(("granite", "<tool_call>"), ("granite", "<tool_call>["), ("granite", "<|tool_call|>")),
    ],
)
def test_calls_of_strict_tools_fit_where_the_model_chooses_to_call(
    name: str, begin: str, write: Callable[..., Any]
) -> None:
    formats = Formats.choose(name, "qwen3", "", None)
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    for prompt, begun in (
        ("", begin),
        ("", f"Let me see. {begin}"),
        ("<think>\n", f"{begin}?</think>\n\nWell {begin}"),
    ):
        for text, message in write(formats, prompt, begin=begun, tools=strict, parallel_tool_calls=False):
            assert len(message.tool_calls) == 1 and begin not in message.content, text
            assert message.reasoning == (f"{begin}?" if prompt else "")
            check(message)
    if name == "qwen3_coder":  # other tools keep the format's own way to write arguments
        outer = ("<tool_call>\n", "\n</tool_call>") if begin == "<tool_call>" else ("", "")
        begin = "<function=weather>\n<parameter=town>\n1\n</parameter>\n</function>".join(outer)
    loose = [TOOLS[0], TOOLS[-1]]
    for _, message in write(formats, begin=begin, tools=loose, parallel_tool_calls=False):
        assert isinstance(json.loads(message.tool_calls[0].arguments), dict)


@pytest.mark.parametrize("reasoning", ["gpt_oss", "none"])
def test_strict_calls_of_harmony_come_after_thoughts_and_words(
    reasoning: str, write: Callable[..., Any]
) -> None:
    formats = Formats.choose("openai", reasoning, "", None)
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    call = "<|channel|>commentary to="
    thoughts = "<|channel|>analysis<|message|>Hm {.<|end|><|start|>assistant"
    words = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    for begin in (call, thoughts + call, words + call, thoughts + words + thoughts + call):
        for text, message in write(formats, begin=begin, tools=strict):
            assert len(message.tool_calls) == 1, text
            assert message.content == ("I look." if words in begin else "")
            assert message.reasoning == "Hm {." * begin.count(thoughts)
            check(message)
    for _, message in write(formats, begin=f"{thoughts}<|channel|>final", tools=strict):
        assert not message.tool_calls and message.reasoning == "Hm {."


def test_a_bare_list_is_no_call_where_calls_must_fit(write: Callable[..., Any]) -> None:
    formats = Formats.choose("granite", "none", "", None)
    begin = '[{"name": "weather", "arguments": {"town": 1}}]'
    for text, message in write(formats, begin=begin, tools=[TOOLS[0], TOOLS[-1]]):
        assert message.content.startswith(begin), text


def test_strict_tools_leave_text_free(write: Callable[..., Any]) -> None:
    formats = Formats.choose("hermes", "none", "", None)
    for text, message in write(formats, tools=TOOLS):
        assert message.content == text and not message.tool_calls
