"""What cannot be enforced is refused with the place where it stands, and soon."""

import time
from collections.abc import Mapping
from concurrent.futures import wait
from typing import Any

import pytest

from jaxserve.engine.grammar import schema
from jaxserve.engine.grammar.compiler import Compiler
from jaxserve.engine.grammar.constraint import (
    from_guided,
    from_response_format,
    from_structured_outputs,
    only_one,
)
from jaxserve.engine.grammar.source import LONGEST_GBNF, LONGEST_TEXT, grammar
from jaxserve.errors import InvalidRequest

DEEP: dict[str, Any] = {"type": "string"}
for _ in range(schema.DEEPEST + 1):
    DEEP = {"items": DEEP}
SCHEMAS = [
    *(
        ({"properties": {"a": {"items": {key: {}}}}}, f"/properties/a/items/{key}")
        for key in sorted(schema.UNENFORCED)
    ),
    ({"properties": {"a/b~c": {"anyOf": [{}, {"not": {}}]}}}, "/properties/a~1b~0c/anyOf/1/not"),
    ({"$defs": {"x": {"if": {}}}}, "/$defs/x/if"),
    ({"items": {"format": "idn-email"}}, "/items/format"),
    ({"format": "unknown"}, "/format"),
    ({"$ref": "#/$defs/x"}, "/$ref"),
    ({"$ref": "https://example.com/x"}, "/$ref"),
    ({"items": 3}, "/items"),
    ({"properties": [3]}, "/properties"),
    ({"anyOf": {}}, "/anyOf"),
    ({"type": "array", "minItems": 1_000_000_000}, "/minItems"),
    ({"type": "string", "minLength": 2**20 + 1}, "/minLength"),
    ({"type": "object", "minProperties": 2}, "/minProperties"),
    (DEEP, "/items" * (schema.DEEPEST + 1)),
    ({"anyOf": [{}] * 2**17}, f"/anyOf/{schema.MOST - 1}"),
    # found by the library
    ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "/properties/a"),
    ({"properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]}, "/properties/a"),
    ({"items": {"type": "strin"}}, "/items"),
    ({"items": {"type": "integer", "minimum": "5"}}, "/items"),
    ({"items": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}}, "/items"),
    ({"items": {"patternProperties": {"^a": {}, "b$": {}}}}, "/items"),
    (
        {
            "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}},
            "required": ["a"],
            "type": "object",
        },
        "",
    ),
    ({"type": "object", "properties": {"a": {}}, "minProperties": 1, "maxProperties": 3}, ""),
    ({"enum": []}, ""),
    ({"$ref": "#"}, ""),
    ({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}, ""),
    ({"$schema": "https://example.com/mine"}, ""),
]
OTHERS: list[tuple[Mapping[str, Any], str]] = [
    ({"regex": "("}, "regex"),
    ({"regex": "(?=a)b"}, "regex"),
    ({"regex": "(a)\\1"}, "regex"),
    ({"regex": "\ud800"}, "regex"),
    ({"regex": "a" * LONGEST_TEXT}, "regex"),
    ({"grammar": "start: ("}, "grammar"),
    ({"grammar": "start: missing"}, "grammar"),
    ({"grammar": "start: start"}, "grammar"),
    ({"grammar": "root ::= missing"}, "grammar"),
    ({"grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000}, "grammar"),
    ({"grammar": 'root ::= "' + "a" * LONGEST_GBNF + '"'}, "grammar"),
    ({"grammar": 'start: %json {"not": {}}'}, "grammar#/not"),
    ({"grammar": "start: %json {"}, "grammar"),
    ({"json": False}, "json"),
    ({"json": "{"}, "json"),
    ({"json": "3"}, "json"),
    ({"json": 3}, "json"),
    ({"choice": []}, "choice"),
    ({"choice": ["a", ""]}, "choice[1]"),
    ({"choice": ["a", 3]}, "choice[1]"),
    ({"json_object": True, "whitespace_pattern": "[ \\n]*"}, "whitespace_pattern"),
    ({"json_object": True, "whitespace_pattern": "\\s+"}, "whitespace_pattern"),
    ({"json_object": True, "whitespace_pattern": "x?"}, "whitespace_pattern"),
    (
        {"json_object": True, "whitespace_pattern": " ", "disable_any_whitespace": True},
        "disable_any_whitespace",
    ),
    ({"regex": "a", "whitespace_pattern": " ?"}, "whitespace_pattern"),
    ({"structural_tag": {"structures": [], "triggers": ["<"]}}, "structural_tag.structures"),
    (
        {"structural_tag": {"structures": [{"begin": "<a", "end": ""}], "triggers": ["<b"]}},
        "structural_tag.structures[0].begin",
    ),
    (
        {
            "structural_tag": {
                "structures": [{"begin": "<a", "end": "", "schema": {"not": {}}}],
                "triggers": ["<a"],
            }
        },
        "structural_tag.structures[0].schema#/not",
    ),
    (
        {"structural_tag": {"structures": [{"begin": "<a", "end": ""}], "triggers": ["<a", "<"]}},
        "structural_tag.triggers[0]",
    ),
    (
        {"structural_tag": {"structures": [{"begin": "<a", "end": ""}], "triggers": [""]}},
        "structural_tag.triggers[0]",
    ),
    (
        {"structural_tag": {"format": {"type": "json_schema", "json_schema": {"items": {"type": "strin"}}}}},
        "structural_tag.format.json_schema#/items",
    ),
    ({"grammar": 'start: "a" %json {"items": {"type": "strin"}}'}, "grammar#/items"),
    ({"structural_tag": {"format": {"type": "tag", "begin": 3}}}, "structural_tag.format.begin"),
    ({"structural_tag": {"format": {"type": "grammar"}}}, "structural_tag.format.type"),
    ({"structural_tag": {"format": {"type": "or", "elements": []}}}, "structural_tag.format.elements"),
]


@pytest.mark.parametrize(("given", "pointer"), SCHEMAS, ids=range(len(SCHEMAS)))
def test_schemas_are_refused_with_their_pointer(given: Any, pointer: str, compiler: Compiler) -> None:
    with pytest.raises(InvalidRequest) as refused:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": given}}
        compiler.compile(grammar(from_response_format(form), {}))
    assert refused.value.param == f"response_format.json_schema.schema#{pointer}"
    assert f"(at #{pointer})" in str(refused.value)
    assert schema.LEAD not in str(refused.value)


@pytest.mark.parametrize(("given", "field"), OTHERS, ids=range(len(OTHERS)))
def test_the_rest_is_refused_with_its_field(given: Any, field: str, compiler: Compiler) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.compile(grammar(from_structured_outputs(given), {}))
    assert refused.value.param == f"structured_outputs.{field}"


def test_what_nothing_can_match_is_told_so(compiler: Compiler) -> None:
    for given in ({"json": {"$ref": "#"}}, {"grammar": "start: start"}):
        with pytest.raises(InvalidRequest, match="no output can match it"):
            compiler.compile(grammar(from_structured_outputs(given), {}))


def test_exactly_one_is_taken() -> None:
    for given in ({}, {"json": {}, "regex": "a"}, {"json_object": False}):
        with pytest.raises(InvalidRequest) as refused:
            from_structured_outputs(given)
        assert refused.value.param == "structured_outputs"
    regex = from_guided({"guided_regex": "a"})
    with pytest.raises(InvalidRequest) as refused:
        only_one(from_response_format({"type": "json_object"}), None, regex)
    assert refused.value.param == "guided_regex"
    assert only_one(None, regex, None) is regex
    assert only_one(None, None) is None


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (3, "response_format"),
        ({}, "response_format"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "text", "json_schema": {"name": "a"}}, "response_format.json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "no spaces"}}, "response_format.json_schema.name"),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "strict": 1}},
            "response_format.json_schema.strict",
        ),
        ({"type": "json_schema", "json_schema": {"name": "a", "more": 1}}, "response_format.json_schema"),
    ],
)
def test_response_formats_are_checked(given: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        from_response_format(given)
    assert refused.value.param == param


def test_every_older_name_is_the_same_as_its_new_one() -> None:
    for old, new, value in (
        ("guided_json", "json", {"type": "string"}),
        ("guided_json", "json", '{"type": "string"}'),
        ("guided_regex", "regex", "a+"),
        ("guided_choice", "choice", ["a", "b"]),
        ("guided_grammar", "grammar", 'start: "a"'),
    ):
        older = from_guided({old: value, "guided_regex": None} if old != "guided_regex" else {old: value})
        newer = from_structured_outputs({new: value})
        assert older is not None and older.param == old
        assert (older.kind, older.value) == (newer.kind, newer.value)
        with pytest.raises(InvalidRequest) as refused:
            from_guided({old: 3})
        assert refused.value.param == old
    spaced = from_guided({"guided_json": {}, "guided_whitespace_pattern": "[ ]?"})
    assert spaced is not None and '"whitespace_pattern":"[ ]?"' in grammar(spaced, {}).text
    for wrong in (
        {"guided_whitespace_pattern": " "},
        {"guided_json": {}, "guided_whitespace_pattern": "\\s*"},
    ):
        with pytest.raises(InvalidRequest) as refused:
            from_guided(wrong)
        assert refused.value.param == "guided_whitespace_pattern"
    with pytest.raises(InvalidRequest):
        from_guided({"guided_regex": "a", "guided_choice": ["a"]})
    assert from_guided({}) is None and from_response_format({"type": "text"}) is None


SLOW = {"type": "object", "properties": {f"property {i}": {"type": "string"} for i in range(12000)}}


def test_a_slow_schema_is_refused_and_holds_up_nobody(compiler: Compiler) -> None:
    slow = [
        compiler.submit(grammar(from_structured_outputs({"json": {**SLOW, "title": str(i)}}), {}))
        for i in range(3)
    ]
    compiler.compile(grammar(from_structured_outputs({"regex": "quick [a-z]+"}), {}))
    assert not any(future.done() for future in slow)
    wait(slow)
    for future in slow:
        assert isinstance(refusal := future.exception(), InvalidRequest)
        assert "takes more than 2 s" in str(refusal) and refusal.param == "structured_outputs.json"


def test_the_checks_process_starts_again(compiler: Compiler) -> None:
    compiler.compile(grammar(from_structured_outputs({"regex": "before"}), {}))
    process = compiler._checker._process
    assert process is not None
    process.kill()
    process.wait()
    while compiler._checker._process is process:
        time.sleep(0.01)
    compiler.compile(grammar(from_structured_outputs({"regex": "after"}), {}))
