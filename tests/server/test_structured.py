"""The `openai` client asks for the form of outputs; the model is random and tiny."""

import json
import re
from enum import Enum
from typing import Annotated, Literal

import openai
import pytest
from pydantic import BaseModel, Field

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "why": {"type": "string", "maxLength": 9}},
    "required": ["answer", "why"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
GRAMMAR = 'start: "<" WORD ">"\nWORD: /[a-d]{1,5}/'
TAG = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}


@pytest.fixture
def client(real_server):
    return openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def ask(client):
    """ask(kind, **fields): what `chat` or `completions` answers."""

    def ask(kind="chat", **fields):
        known = {name: fields.pop(name) for name in ("n", "stream", "response_format") if name in fields}
        given = {"model": None, "max_tokens": 300, "temperature": 1, "seed": 1, "extra_body": fields}
        if kind == "chat":
            given["messages"] = [{"role": "user", "content": "Who?"}]
            return client.chat.completions.create(**known, **given)
        fields |= {name: known.pop(name) for name in list(known) if name == "response_format"}
        return client.completions.create(prompt=["Who?", "Where?"], **known, **given)

    return ask


def check(text):
    value = json.loads(text)
    assert set(value) == {"answer", "why"} and value["answer"] in ("yes", "no") and len(value["why"]) <= 9


def test_a_json_schema(ask):
    for choice in ask(response_format=FORMAT, n=4).choices:
        check(choice.message.content)
        assert choice.finish_reason == "stop"
    for choice in ask("completions", response_format=FORMAT).choices:
        check(choice.text)


def test_a_stream_is_the_same(ask):
    whole = ask(response_format=FORMAT).choices[0].message.content
    chunks = [chunk.choices[0] for chunk in ask(response_format=FORMAT, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]


@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[a-c]{4}"}}, "[a-c]{4}"),
        ({"guided_regex": "[a-c]{4}"}, "[a-c]{4}"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"structured_outputs": {"grammar": GRAMMAR}}, "<[a-d]{1,5}>"),
        ({"guided_grammar": GRAMMAR}, "<[a-d]{1,5}>"),
        ({"guided_json": json.dumps({"enum": [1, [2, 3]]})}, r"1|\[2, ?3\]"),
        ({"guided_json": {"enum": [[2, 3]]}, "guided_whitespace_pattern": "[ ]{2}"}, r"\[\s*2\s*,\s*3\s*\]"),
        ({"structured_outputs": {"json": {"const": [2, 3]}, "disable_any_whitespace": True}}, r"\[2,3\]"),
        ({"response_format": {"type": "structural_tag", **TAG}, "stop": ["x"]}, "(?s).*"),
    ],
)
def test_every_way_to_ask(ask, kind, fields, pattern):
    for choice in ask(kind, **fields).choices:
        text = choice.message.content if kind == "chat" else choice.text
        assert re.fullmatch(pattern, text), text
        assert choice.finish_reason == "stop"


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    kind: Literal["leg", "arm"]
    length: Annotated[int, Field(ge=1, le=9)]
    colour: Colour | None


class Robot(BaseModel):
    name: Annotated[str, Field(max_length=6)]
    head: Part
    parts: Annotated[list[Part], Field(min_length=1, max_length=3)]


def test_parse_gives_nested_models(client):
    asked = {"model": "", "messages": [{"role": "user", "content": "Who?"}], "response_format": Robot}
    for seed in range(3):
        asked |= {"model": client.models.list().data[0].id, "max_tokens": 400, "temperature": 1, "seed": seed}
        (choice,) = client.chat.completions.parse(**asked).choices
        assert isinstance(choice.message.parsed, Robot) and 1 <= len(choice.message.parsed.parts) <= 3
        with client.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == choice.message.parsed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_json": {"type": "array", "items": {"type": "odd"}}}, "guided_json#/items"),
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format.json_schema.schema#/not",
        ),
    ],
)
def test_what_cannot_be_is_a_400_before_anything_is_sent(ask, fields, param, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(stream=stream, **fields)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"
    check(ask(response_format=FORMAT).choices[0].message.content)


def test_forced_tokens_are_counted(ask, real_server):
    def forced():
        (value,) = re.findall(r"forced_tokens_total{.*} (\d+)", real_server.http.get("/metrics").text)
        return int(value)

    before = forced()
    assert ask(guided_choice=["only this"]).choices[0].message.content == "only this"
    assert forced() == before + len("only this") - 1
