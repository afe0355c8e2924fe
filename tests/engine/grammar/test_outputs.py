"""Random walks over the masks of the default model's tokens give only what is described."""

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import regex

from jaxserve.engine.grammar.compiler import Compiler
from jaxserve.engine.grammar.constraint import from_structured_outputs
from jaxserve.engine.grammar.matcher import Matcher
from jaxserve.engine.grammar.source import grammar
from jaxserve.engine.grammar.vocabulary import Vocabulary
from tests.engine.grammar.walks import text_of, walk

WALKS = 3


def obj(required: bool = True, **properties: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    return found | ({"required": list(properties)} if required else {})


STRING, INTEGER, NUMBER, BOOLEAN = ({"type": t} for t in ("string", "integer", "number", "boolean"))
TREE = {
    "$defs": {
        "node": obj(
            value=INTEGER, children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
        )
    }
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "string": STRING,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": BOOLEAN,
    "null": {"type": "null"},
    "types": {"type": ["string", "null", "integer"]},
    "object": {"type": "object"},
    "person": obj(name=STRING, age=INTEGER, tall=BOOLEAN),
    "optional": obj(False, a=STRING, b=INTEGER, c=BOOLEAN),
    "nested": obj(a=obj(b=obj(c=NUMBER))),
    "list": {"type": "array", "items": INTEGER},
    "list of 2 to 4": {"type": "array", "items": BOOLEAN, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [STRING, INTEGER], "items": False, "minItems": 2},
    "draft 7 tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [STRING, INTEGER],
        "additionalItems": False,
    },
    "enum": {"enum": ["red", "green", 3, None, {"a": [1]}]},
    "const": {"const": {"kind": 'a "quoted"\nline', "n": 1.5}},
    "short string": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
    "part of pattern": {"type": "string", "pattern": "ab+c", "maxLength": 30},
    "somewhere": {"type": "string", "pattern": "v1\\.0\\.\\d+"},
    "one that is known": {"enum": ["x" * 200 + "v1.0.3"], "pattern": "v1\\.0\\.\\d+"},
    "at its end": {"type": "string", "pattern": "\\.jso?n$", "minLength": 3},
    "date": {"type": "string", "format": "date"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "range": {"type": "integer", "minimum": -12, "maximum": 345},
    "open range": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    "any of": {"anyOf": [obj(a=INTEGER), obj(b=STRING), {"type": "array", "items": {"type": "null"}}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "one of, apart": {"oneOf": [STRING, INTEGER, {"type": "null"}]},
    "union": {
        "$defs": {
            "cat": obj(kind={"const": "cat"}, lives=INTEGER),
            "dog": obj(kind={"enum": ["dog", "wolf"]}),
        },
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    },
    "tagged union": {
        "$defs": {
            "cat": obj(kind={"const": "cat"}, lives=INTEGER),
            "dog": obj(kind={"enum": ["dog", "wolf"]}),
        },
        "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
        "discriminator": {"propertyName": "kind"},
    },
    "tree": {**TREE, "$ref": "#/$defs/node"},
    "recursive root": {
        "type": "object",
        "properties": {"next": {"$ref": "#"}},
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": INTEGER, "minProperties": 1},
    "patterned names": {
        "type": "object",
        "patternProperties": {"^x_": BOOLEAN},
        "additionalProperties": False,
    },
    "unicode": obj(**{"größe 📏": {"enum": ["日本", "é"]}}),
    "not unique": {"type": "array", "items": INTEGER, "uniqueItems": False, "maxItems": 2},
}
REGEXES = (
    "",
    "a",
    "[a-z]+",
    "\\d{4}-\\d{2}-\\d{2}",
    "(yes|no|maybe)",
    "(?:ab|cd)*ef",
    "[^\\n]{3,10}",
    "\\w{1,8}@\\w{1,8}\\.(com|org)",
    "-?(0|[1-9][0-9]*)(\\.[0-9]+)?",
    "(a|b)*abb",
    "x{3}y{0,2}z?",
    "^anchored$",
    "a/b\\\\c",
    '"[^"]*"',
    "é+|日本語",
    "[\\s\\S]{1,4}",
    "(?i:select) \\* from [a-z_]{1,9};",
    "#[0-9a-f]{6}",
    "((1[0-2]|[1-9]):[0-5][0-9] (AM|PM))",
    "\\p{Lu}\\p{Ll}*",
)
GRAMMARS = {
    'start: "yes" | "no"': "yes|no",
    'start: "a"* "b"': "a*b",
    'start: pair\npair: "(" pair? ")"': r"(\((?1)?\))",
    "start: sum\nsum: NUM | sum OP NUM\nOP: /[-+]/\nNUM: /[0-9]{1,5}/": r"\d{1,5}([-+]\d{1,5})*",
    'start: "GET " NAME ("," NAME)* " OF " NAME\nNAME: /[a-z]{1,9}/': "GET [a-z]+(,[a-z]+)* OF [a-z]+",
    'start: "x=" %json {"type": "array", "items": {"type": "null"}}': r"x=\[(null(, ?null)*)?\]",
    "start: A B\nA: /a+/\nB: /b+/": "a+b+",
    'root ::= hello " " name\nhello ::= "hi" | "hello"\nname ::= [A-Z] [a-z]*': "(hi|hello) [A-Z][a-z]*",
    'root ::= "[" (n ("," n)*)? "]"\nn ::= "0" | [1-9] [0-9]*': r"\[((0|[1-9]\d*)(,(?2))*)?\]",
    "start: WORD\nWORD: /[a-c]{1,6}/ & ~/(.*)b(.*)/": "[ac]{1,6}",
}
"""Each with the pattern of all that it describes."""


@pytest.fixture
def outputs(compiler: Compiler, vocabulary: Vocabulary, special: dict[str, int]) -> Callable[..., list[str]]:
    def make(**fields: Any) -> list[str]:
        start: Matcher = compiler.compile(grammar(from_structured_outputs(fields), special))
        return [text_of(walk(start.copy(), vocabulary, seed), vocabulary) for seed in range(WALKS)]

    return make


@pytest.mark.parametrize("name", SCHEMAS)
def test_outputs_are_valid(name: str, outputs: Callable[..., list[str]]) -> None:
    schema = SCHEMAS[name]
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    for text in outputs(json=schema):
        validator.validate(json.loads(text))


@pytest.mark.parametrize("pattern", REGEXES)
def test_outputs_match(pattern: str, outputs: Callable[..., list[str]]) -> None:
    for text in outputs(regex=pattern):
        assert regex.fullmatch(pattern, text), text


@pytest.mark.parametrize("source", GRAMMARS)
def test_outputs_are_of_the_grammar(source: str, outputs: Callable[..., list[str]]) -> None:
    for text in outputs(grammar=source):
        assert regex.fullmatch(GRAMMARS[source], text), text


def test_choices(outputs: Callable[..., list[str]]) -> None:
    choices = ["yes", "no", 'say <|im_end|> "now"\n', "a/b\\c", "日本", "no way"]
    assert set(outputs(choice=choices)) <= set(choices)


def test_json_has_no_free_whitespace(outputs: Callable[..., list[str]]) -> None:
    schema = obj(a={"type": "array", "items": {"enum": [1, 2]}, "minItems": 3, "maxItems": 3}, b=BOOLEAN)
    for text in outputs(json=schema):
        assert re.fullmatch(r'\{"a": ?\[[12], ?[12], ?[12]\], ?"b": ?(true|false)\}', text)
    for text in outputs(json=schema, disable_any_whitespace=True):
        assert " " not in text
    for text in outputs(json=schema, whitespace_pattern="[ \\n]{0,2}"):
        assert not re.search(r"\s{3}", text)


def test_structural_tags(outputs: Callable[..., list[str]]) -> None:
    tag = {"begin": "<f=a>", "schema": obj(x=INTEGER), "end": "</f>"}
    other = {"begin": "<f=b>", "schema": BOOLEAN, "end": "</f>"}
    for text in outputs(structural_tag={"structures": [tag, other], "triggers": ["<f="]}):
        for part in text.split("<f=")[1:]:
            assert re.match(r'a>\{"x": ?-?\d+\}</f>|b>(true|false)</f>', part), text


def test_nested_structural_tags(outputs: Callable[..., list[str]], special: dict[str, int]) -> None:
    def tag(begin: str, content: dict[str, Any], end: str) -> dict[str, Any]:
        return {"type": "tag", "begin": begin, "content": content, "end": end}

    digits = {"type": "regex", "pattern": "[0-9]{1,3}"}
    either = {"type": "or", "elements": [digits, {"type": "json_schema", "json_schema": BOOLEAN}]}
    parts = {"type": "sequence", "elements": [{"type": "const_string", "value": "v "}, either]}
    for text in outputs(structural_tag={"format": tag("<|im_start|>x:", parts, ";")}):
        assert re.fullmatch(r"<\|im_start\|>x:v (\d{1,3}|true|false);", text), text
    tags = [tag("<a>", digits, "</a>"), tag("<b>", digits, "</b>")]
    rows = {"type": "tags_with_separator", "tags": tags, "separator": ", ", "at_least_one": True}
    for text in outputs(structural_tag={"format": rows}):
        assert re.fullmatch(r"<([ab])>\d{1,3}</\1>(, <([ab])>\d{1,3}</\3>)*", text), text


TAG = {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": "[0-9]{1,3}"}, "end": "</a>"}
OPEN = {"type": "tag", "begin": "<b>", "content": {"type": "any_text"}, "end": "</b>"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<a", "<b"], "tags": [TAG, OPEN]}
ONCE = {**TRIGGERED, "at_least_one": True, "stop_after_first": True}


@pytest.mark.parametrize(
    ("form", "text", "taken"),
    [
        (TRIGGERED, "only text", True),
        (TRIGGERED, "some <a>12</a> and <b>any <a> text</b> more", True),
        (TRIGGERED, "some <a", False),
        (TRIGGERED, "some <a>x", False),
        (TRIGGERED, "some <b>x", False),
        (TRIGGERED, "less < a", True),
        (ONCE, "only text", False),
        (ONCE, "text <a>12</a>", True),
        (ONCE, "text <a>12</a> more", False),
        ({**TRIGGERED, "at_least_one": True}, "text", False),
        ({**TRIGGERED, "at_least_one": True}, "<a>1</a><a>2</a>", True),
        ({**TRIGGERED, "stop_after_first": True}, "text", True),
        ({**TRIGGERED, "stop_after_first": True}, "text <a>12</a>", True),
        ({**TRIGGERED, "stop_after_first": True}, "text <a>12</a> more", False),
        ({**TRIGGERED, "stop_after_first": True}, "text <a>x", False),
        ({"type": "any_text"}, "what <a ever\n", True),
    ],
)
def test_triggers(
    form: Any, text: str, taken: bool, compiler: Compiler, vocabulary: Vocabulary, special: dict[str, int]
) -> None:
    constraint = from_structured_outputs({"structural_tag": {"type": "structural_tag", "format": form}})
    matcher = compiler.compile(grammar(constraint, special))
    assert (all(map(matcher.accept, vocabulary.spell(text))) and matcher.complete) == taken
