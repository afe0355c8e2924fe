"""What holds for every parser."""
# ruff: noqa: RUF001 (the tags are what they are)

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.text.parsers import (
    Arguments,
    CallBegin,
    Content,
    OutputParser,
    Reasoning,
    choose_reasoning_parser,
    choose_tool_parser,
    collect,
    parse,
    reasoning_parser,
    register_reasoning_parser,
    register_tool_parser,
    registry,
    tool_parser,
)
from tests.text.parsers.feeding import Feed
from tests.text.parsers.test_json_formats import CASES as JSON_CASES
from tests.text.parsers.test_reasoning import HARMONY
from tests.text.parsers.test_text_formats import CASES as TEXT_CASES

OUTPUTS = {name: [case[0] for case in cases] for name, cases in (JSON_CASES | TEXT_CASES).items()}
OUTPUTS["openai"] = [text for text, _ in HARMONY]
PIECES = sorted(
    {text[i : i + n] for texts in OUTPUTS.values() for text in texts for i in (0, 9, 17) for n in (4, 13)}
)


@pytest.mark.parametrize("name", OUTPUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_text_in_any_pieces(name, data):
    """Outputs run together and pieces of the markup of all formats, cut anywhere."""
    parts = st.lists(
        st.one_of(st.sampled_from(OUTPUTS[name]), st.sampled_from(PIECES), st.text(max_size=4)), max_size=6
    )
    text = "".join(data.draw(parts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
    reasoning = (
        data.draw(st.sampled_from(["", "qwen3", "deepseek_r1", "granite"])) if name != "openai" else ""
    )
    feed = Feed(name, reasoning)
    assert feed(*pieces) == feed(text) == feed(*text)


@pytest.mark.parametrize("name", OUTPUTS)
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="abc,.!? \néß🌍0123456789", max_size=60))
def test_text_without_markup_is_content_word_for_word(name, text):
    assert Feed(name)(*text) == ("", text, [])


@pytest.mark.parametrize("name", OUTPUTS)
def test_text_that_can_be_no_tag_is_given_at_once(name):
    parser = Feed(name).parser()
    for piece in (
        "H",
        "ello",
        " a",
        " < b > c [x] {y} `z` .",
        "\n",
        " n",
        "function <tool> [TOOLS] <|x|> ``` é",
    ):
        assert collect(parser.feed(piece)).content == piece


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("hermes", "<tool_call>"),
        ("llama3_json", "<|python_tag|>"),
        ("mistral", "[TOOL_CALLS]"),
        ("pythonic", "<|python_start|>"),
        ("qwen3_coder", "<function="),
        ("deepseek_v3", "<｜tool▁call▁begin｜>"),
        ("granite", "<|tool_call|>"),
        ("phi4_mini_json", "functools"),
        ("gemma", "```tool_code"),
        ("openai", "<|channel|>"),
    ],
)
def test_only_what_could_become_a_tag_is_held_back_and_only_as_long(name, tag):
    for n in range(1, len(tag)):
        parser = Feed(name).parser()
        assert collect(parser.feed("x" + tag[:n])).content == "x"
        assert collect(parser.feed("~y")).content == tag[:n] + "~y"


@pytest.mark.parametrize(
    ("name", "answer"), [("llama3_json", '{"answer": "'), ("granite", '[{"x": 1'), ("pythonic", "[1,")]
)
def test_an_answer_that_begins_like_a_bare_call_is_given_as_soon_as_it_is_none(name, answer):
    assert collect(Feed(name).parser().feed(answer)).content == answer


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "g", "arguments": {"x": "one two"}}'),
        ("llama3_json", '{"name": "g", "parameters": {"x": "one two"}}'),
        ("mistral", '[TOOL_CALLS]g{"x": "one two"}'),
        ("deepseek_v3", '<｜tool▁call▁begin｜>g<｜tool▁sep｜>{"x": "one two"}'),
        ("openai", '<|channel|>commentary to=functions.g<|message|>{"x": "one two"}'),
        ("qwen3_coder", "<function=g><parameter=x>one two"),
        ("gemma", '<|tool_call>call:g{x:<|"|>one two'),
    ],
)
def test_arguments_come_as_they_are_written(name, text):
    parser = Feed(name).parser()
    given = ""
    for piece in text:
        for event in parser.feed(piece):
            given += event.text if isinstance(event, Arguments) else ""
        if piece in "one two":
            assert given.endswith(piece) or "x" not in given
    assert "one two" in given


def test_events_in_order():
    parser = Feed("hermes", "qwen3").parser()
    call = '<tool_call>{"name": "g", "arguments": {"x": 1}}</tool_call>'
    events = parser.feed(f"<think>a</think>b{call}{call}c") + parser.finish()
    ids = [event.id for event in events if isinstance(event, CallBegin)]
    assert events == [
        Reasoning("a"),
        Content("b"),
        CallBegin(0, ids[0], "g"),
        Arguments(0, '{"x": 1}'),
        CallBegin(1, ids[1], "g"),
        Arguments(1, '{"x": 1}'),
        Content("c"),
    ]
    assert ids[0] != ids[1] and ids[0].startswith("call_")


def test_ids_are_what_the_model_wrote_or_what_its_template_takes():
    own = parse("[TOOL_CALLS]g[CALL_ID]abcdef123[ARGS]{}", tool_parser("mistral")).tool_calls[0].id
    assert own == "abcdef123"
    made = parse("[TOOL_CALLS]g{}", tool_parser("mistral")).tool_calls[0].id
    assert len(made) == 9 and made.isalnum()


def test_a_special_token_that_is_only_spelt_out_is_text():
    text = "The tag [TOOL_CALLS]g{} is "
    parser = OutputParser(tool_parser("mistral"), special_tokens=frozenset({"[TOOL_CALLS]", "<s>"}))
    assert "[TOOL_CALLS]" in parser.tags and "<s>" not in parser.tags
    assert collect(parser.feed(text, specials=[])).content == text
    events = parser.feed("[TOOL_CALLS]g{}", specials=[0]) + parser.finish()
    assert [event.name for event in events if isinstance(event, CallBegin)] == ["g"]


def test_a_tag_that_is_no_special_token_of_this_tokenizer_counts_as_text():
    parser = OutputParser(tool_parser("mistral"), special_tokens=frozenset({"<s>"}))
    assert collect(parser.feed("[TOOL_CALLS]g{}", specials=[])).tool_calls[0].name == "g"


def test_names():
    assert tool_parser("hermes") is tool_parser("qwen3")
    with pytest.raises(
        ConfigError, match=r"tool parser 'hermse'; there are: hermes, .*openai \(nearest: hermes\)"
    ):
        tool_parser("hermse")
    with pytest.raises(ConfigError, match=r"reasoning parser 'deepseek'.*nearest: deepseek_r1"):
        reasoning_parser("deepseek")


def test_a_format_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "TOOL_PARSERS", dict(registry.TOOL_PARSERS))
    monkeypatch.setattr(registry, "REASONING_PARSERS", dict(registry.REASONING_PARSERS))

    def tools(s):
        while (yield from s.until(("CALL ",), s.content)):
            s.begin((yield from s.run(registry_name)))
            s.arguments("{}")

    def reasoning(s):
        yield from s.until(("//",), s.reasoning)

    import re

    registry_name = re.compile(r"\w*")
    register_tool_parser("mine", tools)
    register_reasoning_parser("mine", reasoning)
    Feed("mine", "mine").check("hm//a CALL g; CALL f", ("hm", "a ; ", [("g", "{}"), ("f", "{}")]))


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning"),
    [
        ("qwen2", "tools…<tool_call>\n…", "hermes", None),
        ("qwen3", "tools…<tool_call>…<think>…", "hermes", "qwen3"),
        ("qwen3_moe", "tools…<tool_call>\n<function=…", "qwen3_coder", "qwen3"),
        ("llama", "tools… Environment: ipython …", "llama3_json", None),
        ("llama4", "tools…<|python_start|>…ipython", "pythonic", None),
        ("mistral", "tools…[TOOL_CALLS]…", "mistral", None),
        ("deepseek_v3", "tools…<｜tool▁calls▁begin｜>…<｜Assistant｜><think>…", "deepseek_v3", "deepseek_r1"),
        ("granite", "tools<|start_of_role|>…Here is my thought process:…", "granite", "granite"),
        ("phi3", "tools<|tool|>…<|/tool|>", "phi4_mini_json", None),
        ("gemma3_text", "", "gemma", None),
        ("gpt_oss", "tools<|channel|>…", "openai", "gpt_oss"),
        ("llama", "", "hermes", None),
        ("mistral", "…[TOOL_CALLS]…", "hermes", None),  # no place for tools: the preamble asks for hermes
    ],
)
def test_the_choice_for_a_model(model_type, template, tools, reasoning):
    assert choose_tool_parser(model_type, template) == tools
    assert choose_reasoning_parser(model_type, template) == reasoning


@pytest.mark.parametrize("name", ["pythonic", "gemma", "qwen3_coder"])
@pytest.mark.parametrize(
    "text", [text for name in ("pythonic", "gemma", "qwen3_coder") for text in OUTPUTS[name]]
)
def test_finished_arguments_that_we_write_are_json(name, text):
    for call in parse(text, tool_parser(name)).tool_calls:
        if call.arguments.endswith("}"):
            json.loads(call.arguments)


@pytest.mark.parametrize("name", OUTPUTS)
def test_deep_and_long_outputs_do_no_harm(name):
    for text in OUTPUTS[name][1:4]:
        for run in ("[" * 20_000, "{" * 20_000, "(" * 20_000, '"' * 2_000, "\\" * 2_000, text[:30] * 200):
            parse(text[:-8] + run, tool_parser(name))
            parse("[g(x=" + run, tool_parser(name))
            parse("<|tool_call>call:g{x:" + run, tool_parser(name))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": "{\\"x\\": \\"\\ud83d\\"}", "name": "g"}</tool_call>'),
        ("pythonic", "[g(x='\\ud83d')]"),
        ("qwen3_coder", '<function=weather><parameter=days>"\\ud83d"</parameter></function>'),
    ],
)
def test_half_a_surrogate_pair_never_comes_out(name, text):
    """It could not be sent."""
    assert "\\ud83d" in str(parse(text, tool_parser(name), functions=Feed().functions)).replace("\\\\", "\\")
    for event in Feed(name).parser().feed(text):
        for value in (getattr(event, "text", ""), getattr(event, "name", "")):
            value.encode()
