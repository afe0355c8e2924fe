"""An answer of each family of models, laid out as its model card or chat template lays it out."""
# ruff: noqa: RUF001 (the tags are what they are)

import json

import pytest

from jaxserve.text.parsers import collect
from tests.text.parsers.feeding import Feed, plain

OSLO = {"city": "Oslo", "unit": "celsius"}
ROME = {"city": "Rome", "unit": "celsius"}
THOUGHT = "They want two forecasts."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        },
    },
}


def call(key: str, arguments: dict) -> str:
    return json.dumps({"name": "get_weather", key: arguments})


def hermes(arguments: dict) -> str:
    return f"<tool_call>\n{call('arguments', arguments)}\n</tool_call>"


def deepseek(arguments: dict) -> str:
    code = f"```json\n{json.dumps(arguments)}\n```"
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n{code}<｜tool▁call▁end｜>"


def deepseek31(arguments: dict) -> str:
    return f"<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{json.dumps(arguments)}<｜tool▁call▁end｜>"


def coder(arguments: dict) -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function=get_weather>\n{values}</function>\n</tool_call>"


def gemma(arguments: dict, quote: str, opening: str, closing: str) -> str:
    values = ",".join(f"{key}:{quote}{value}{quote}" for key, value in arguments.items())
    return f"{opening}call:get_weather{{{values}}}{closing}"


def harmony(arguments: dict) -> str:
    header = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    return f"{header}{json.dumps(arguments)}<|call|>"


def python(arguments: dict) -> str:
    return f"get_weather({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


BOTH = call("arguments", OSLO) + ", " + call("arguments", ROME)
FUNCTION = ("<escape>", "<start_function_call>", "<end_function_call>")
GEMMA4 = ('<|"|>', "<|tool_call>", "<tool_call|>")
SECTION = "<｜tool▁calls▁begin｜>{}\n{}<｜tool▁calls▁end｜>"


TWO = pytest.mark.parametrize(
    ("model", "tools", "reasoning", "text"),
    [
        ("Qwen 2.5", "hermes", "", hermes(OSLO) + "\n" + hermes(ROME)),
        ("Qwen 3", "hermes", "qwen3", f"<think>\n{THOUGHT}</think>\n\n{hermes(OSLO)}\n{hermes(ROME)}"),
        ("Qwen 3 Coder", "qwen3_coder", "", coder(OSLO) + "\n" + coder(ROME)),
        ("Llama 3.1", "llama3_json", "", f"{call('parameters', OSLO)}; {call('parameters', ROME)}"),
        ("Llama 4", "pythonic", "", f"<|python_start|>[{python(OSLO)}, {python(ROME)}]<|python_end|>"),
        ("Llama 3.2", "pythonic", "", f"[{python(OSLO)}, {python(ROME)}]"),
        ("Mistral 7B v0.3", "mistral", "", f"[TOOL_CALLS] [{BOTH}]"),
        (
            "Mistral Small 3.2",
            "mistral",
            "",
            f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(OSLO)}[TOOL_CALLS]get_weather[ARGS]{json.dumps(ROME)}",
        ),
        ("DeepSeek V3", "deepseek_v3", "", SECTION.format(deepseek(OSLO), deepseek(ROME))),
        (
            "DeepSeek R1",
            "deepseek_v3",
            "deepseek_r1",
            f"{THOUGHT}</think>\n\n" + SECTION.format(deepseek(OSLO), deepseek(ROME)),
        ),
        ("DeepSeek V3.1", "deepseek_v3", "", SECTION.format(deepseek31(OSLO), deepseek31(ROME))),
        ("Granite 3.0", "granite", "", f"<|tool_call|>[{BOTH}]"),
        (
            "Granite 3.2",
            "granite",
            "granite",
            f"Here is my thought process:\n\n{THOUGHT}Here is my response:\n\n<tool_call>[{BOTH}]",
        ),
        ("Granite 4", "granite", "", hermes(OSLO) + "\n" + hermes(ROME)),
        ("Phi-4-mini", "phi4_mini_json", "", f"<|tool_call|>[{BOTH}]<|/tool_call|>"),
        ("Gemma 3", "gemma", "", f"```tool_code\n{python(OSLO)}\n{python(ROME)}\n```"),
        ("FunctionGemma", "gemma", "", gemma(OSLO, *FUNCTION) + gemma(ROME, *FUNCTION)),
        ("Gemma 4", "gemma", "", gemma(OSLO, *GEMMA4) + gemma(ROME, *GEMMA4)),
        (
            "gpt-oss",
            "openai",
            "gpt_oss",
            f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant{harmony(OSLO)}"
            f"<|start|>assistant{harmony(ROME)}",
        ),
    ],
)


@TWO
def test_two_calls(model, tools, reasoning, text):
    feed = Feed(tools, reasoning, functions=[WEATHER])
    thought, content, calls = feed(text)
    assert (thought, content) == (THOUGHT if reasoning else "", "")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("get_weather", OSLO),
        ("get_weather", ROME),
    ]
    feed.check(text, (thought, content, calls), thrice=False)


@TWO
def test_two_calls_that_are_cut_off_leave_no_markup_behind(model, tools, reasoning, text):
    feed = Feed(tools, reasoning, functions=[WEATHER])
    whole = feed(text)[2]
    for end in range(len(text)):
        parser = feed.parser()
        _, content, calls = plain(collect(parser.feed(text[:end]) + parser.finish(cut=True)))
        assert content == "", text[:end]
        assert [name for name, _ in calls] == ["get_weather"] * len(calls)
        assert all(call == whole[0] for call in calls[:1] if len(calls) == 2 or call[1].endswith('"}'))
