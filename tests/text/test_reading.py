"""Outputs with tool calls and reasoning, from tokens: special tokens that are tags, stop strings, counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from jaxserve.engine.messages import CoreOutput, Thoughts
from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.structs import to_struct
from jaxserve.text.output import OutputProcessor
from jaxserve.text.parsers import merged, reasoning_parser, tool_parser
from jaxserve.text.reading import Formats
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tools import ToolUse

from .conftest import NAMED, byte_fallback, byte_level

TAGS = ["[TOOL_CALLS]", "<think>", "</think>", "<|other|>"]
USE = to_struct({"tools": [{"type": "function", "function": {"name": "f"}}]}, ToolUse)
TEXT = '<think>It é.</think>\n\nWell[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]'


@pytest.fixture(scope="module", params=[byte_level, byte_fallback])
def tok(request) -> Tokenizer:
    backend = request.param()
    backend.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in TAGS])
    return Tokenizer(backend, NAMED)


def run(tok, ids, kind="delta", formats=None, prompt="", **params):
    """The events, and the tokens of reasoning, of one request that gets a token a step."""
    formats = formats or Formats.choose("mistral", "qwen3", "", None)
    proc = OutputProcessor(tok, [1], max_model_len=1000)
    wanted = SamplingParams(max_tokens=500, output_kind=kind, **params)
    (core,) = proc.add("r", "p", [5, 6], wanted, make_parser=reader(formats, tok, USE, prompt))
    events, reasoning, text = [], 0, ""
    for i, token in enumerate(ids):
        end = "stop" if i == len(ids) - 1 else None
        for output in proc.process([CoreOutput(id=core.id, token_ids=[token], finish_reason=end)])[0]:
            (sequence,) = output.outputs
            if kind == "delta":
                events += sequence.events
                reasoning += sequence.reasoning_tokens
                text += sequence.text
            else:
                events, reasoning, text = sequence.events, sequence.reasoning_tokens, sequence.text
    return merged(events), reasoning, text


def reader(formats, tok, use, prompt=""):
    return formats.reading(tok, use, prompt, SamplingParams())[0]


def shown(events):
    return [getattr(event, "text", None) or event.name for event in events]


@pytest.mark.parametrize("kind", ["delta", "cumulative", "final"])
def test_tags_that_are_special_tokens_are_read(tok, kind):
    ids = tok.encode(TEXT, add_special_tokens=False)
    events, reasoning, text = run(tok, ids, kind)
    assert shown(events) == ["It é.", "Well", "f", '{"a": 1}']
    assert text.replace(" ", "") == TEXT.replace(" ", "")  # the text stays raw
    assert reasoning == ids.index(tok.special_tokens["</think>"])


def test_only_tags_of_the_formats_are_shown(tok):
    ids = [*tok.encode("Hi", False), tok.special_tokens["<|other|>"], *tok.encode("[TOOL_CALLS]", False)]
    events, _, text = run(tok, ids)
    assert "other" not in text and shown(events)[-1].endswith("[TOOL_CALLS]")
    (shows, _, text) = run(tok, ids, skip_special_tokens=False)
    assert "<|other|>" in text and shown(shows) == [text]


def test_a_tag_that_is_spelt_out_is_text(tok):
    spelled = [
        token
        for part in ("[TOOL_", 'CALLS][{"name": "f", "arguments": {}}]')
        for token in tok.encode(part, False)
    ]
    events, _, text = run(tok, spelled)
    assert shown(events) == [text]


@given(cut=st.integers(1, 40), stop=st.integers(1, 40))
def test_stop_strings_come_first_whatever_they_hold_back(tok, cut, stop):
    """What the stop strings leave of the text is what is read."""
    ids = tok.encode(TEXT, add_special_tokens=False)
    text = run(tok, ids)[2]
    stops = [text[cut : cut + stop], "never" * 5]
    events, reasoning, left = run(tok, ids, stop=stops)
    whole, *others = run(tok, ids, kind="final", stop=stops)
    assert left == text[: text.find(stops[0])] and [reasoning, left] == others
    assert shown(events) == shown(whole) and all(piece in left for piece in shown(events))


def test_without_tools_and_reasoning_there_is_no_parser(tok):
    formats = Formats.choose("mistral", "auto", "mistral", "tools")
    assert reader(formats, tok, ToolUse(), "") is None
    assert reader(formats, tok, to_struct({"tools": USE.tools, "tool_choice": "none"}, ToolUse), "") is None
    proc = OutputProcessor(tok, [1], max_model_len=100)
    (core,) = proc.add("r", "p", [5], SamplingParams(output_kind="final"))
    ((output,), _) = proc.process([CoreOutput(id=core.id, token_ids=[40], finish_reason="stop")])
    assert output.outputs[0].events is None and output.outputs[0].message.content == output.outputs[0].text


def test_the_names_of_parsers():
    assert Formats.choose("none", "none", "qwen3", "<think>")[:2] == (None, None)
    with pytest.raises(ConfigError, match="unknown tool parser 'hermse'"):
        Formats.choose("hermse", "auto", "", None)
    with pytest.raises(InvalidRequest) as error:
        reader(Formats.choose("none", "none", "", None), None, USE)
    assert error.value.param == "tools"


@pytest.mark.parametrize(
    ("parser", "prompt", "thinks"),
    [
        ("qwen3", "Hi", "if it begins so"),
        ("qwen3", "Hi<think>\n", True),
        ("qwen3", "<think>\n\n</think>\n\n", False),
        ("qwen3", "</think>Hi", "if it begins so"),
        ("deepseek_r1", "Hi", True),
        ("deepseek_r1", "</think>", False),
    ],
)
def test_what_a_budget_of_thoughts_is_for(tok, parser, prompt, thinks):
    tags = Formats.choose("hermes", parser, "", None).tags(tok)
    proc = OutputProcessor(tok, [1], max_model_len=1000, tags=tags)
    (core,) = proc.add("r", None, tok.encode(prompt, False), SamplingParams(thinking_token_budget=3))
    open, close = tok.special_tokens["<think>"], tok.special_tokens["</think>"]
    expected = {True: Thoughts(3, close, None), False: None}
    assert core.thoughts == expected.get(thinks, Thoughts(3, close, open))


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
def test_a_budget_of_a_message_that_goes_on(tok, parser):
    formats = Formats.choose("hermes", parser, "", None)
    wanted = SamplingParams(thinking_token_budget=3)

    def thoughts(continued):
        make_parser, params = formats.reading(tok, ToolUse(), continued, wanted, continued)
        proc = OutputProcessor(tok, [1], max_model_len=1000, tags=formats.tags(tok))
        (core,) = proc.add("r", None, tok.encode(continued, False), params, make_parser=make_parser)
        return core.thoughts

    assert thoughts("Oslo is") is None and thoughts("<think>Hm.</think>Oslo is") is None
    assert thoughts("<think>Let me see.") == Thoughts(3, tok.special_tokens["</think>"], None)


def test_a_budget_needs_thoughts_between_tokens(tok, byte_level_tokenizer):
    assert Formats.choose("hermes", "none", "", None).tags(tok) is None
    assert Formats.choose("openai", "gpt_oss", "", None).tags(tok) is None
    assert Formats.choose("hermes", "qwen3", "", None).tags(byte_level_tokenizer) is None
    with pytest.raises(InvalidRequest) as error:
        OutputProcessor(tok, [1], 100).add("r", None, [5], SamplingParams(thinking_token_budget=3))
    assert error.value.param == "thinking_token_budget"


def test_a_template_of_the_request_is_read_by_its_own_format():
    formats = Formats.choose("auto", "auto", "llama", "{{ tools }} ipython")
    assert formats.tools is tool_parser("llama3_json") and formats.of(None) is formats
    assert formats.of("Hi").tools is tool_parser("hermes")
    assert formats.of("{{ tools }} [TOOL_CALLS] <think>")[:2] == (
        tool_parser("mistral"),
        reasoning_parser("qwen3"),
    )
