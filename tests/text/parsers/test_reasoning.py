"""Reasoning, alone and before tool calls; harmony, which is both."""

import pytest

from tests.text.parsers.feeding import Feed

CALL = '<tool_call>{"name": "g", "arguments": {"x": 1}}</tool_call>'
G = ("g", '{"x": 1}')
R1 = [
    ("<think>\nHm.\n</think>\n\nYes.", ("Hm.\n", "Yes.", [])),
    ("Hm.\n</think>\n\nYes.", ("Hm.\n", "Yes.", [])),
    ("Hm. No end <", ("Hm. No end <", "", [])),
    ("<think></think>Yes.", ("", "Yes.", [])),
    (f"a </b> c</think>\n{CALL}", ("a </b> c", "", [G])),
    (f"I could {CALL} …</think>No.", (f"I could {CALL} …", "No.", [])),
    ("a</think>b<think>c</think>d", ("a", "b<think>c</think>d", [])),
    ("", ("", "", [])),
]
QWEN3 = [
    ("<think>\nHm.\n</think>\n\nYes.", ("Hm.\n", "Yes.", [])),
    ("\n<think>Hm.</think>Yes.", ("Hm.", "Yes.", [])),
    ("Yes.", ("", "Yes.", [])),
    ("A <think>b</think>", ("", "A <think>b</think>", [])),
    ("<think>Hm", ("Hm", "", [])),
    ("<thin", ("", "<thin", [])),
    (f"<think>Hm.</think>\n\n{CALL}", ("Hm.", "", [G])),
    (f"<think>Hm.</think>Ok {CALL}", ("Hm.", "Ok ", [G])),
]
GRANITE = [
    ("Here is my thought process: Hm.\nHere is my response: Yes.", ("Hm.\n", "Yes.", [])),
    ("Here's my thought process:\nHm. Here's my response:\nYes.", ("Hm. ", "Yes.", [])),
    ("Here is my house.", ("", "Here is my house.", [])),
    ("Here is my thought process: Hm. Here is my", ("Hm. Here is my", "", [])),
    ("Yes. Here is my response: no", ("", "Yes. Here is my response: no", [])),
    (f"Here is my thought process:a Here is my response:{CALL}", ("a ", "", [G])),
]
THOUGHTS = "Here is my thought process: Hm. Here is my response:"
CASES = {"deepseek_r1": R1, "qwen3": QWEN3, "granite": GRANITE}

HEAD = "<|channel|>commentary to=functions.g <|constrain|>json<|message|>"
HARMONY = [
    ("<|channel|>final<|message|>Yes.<|return|>", ("", "Yes.", [])),
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        ("Hm.", "Yes.", []),
    ),
    (f'{HEAD}{{"x": 1}}<|call|>', ("", "", [G])),
    (f'<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{HEAD}{{"x": 1}}<|call|>', ("Hm.", "", [G])),
    (' to=functions.g<|channel|>commentary json<|message|>{"x": 1}<|call|>', ("", "", [G])),
    (
        '<|start|>assistant to=functions.g<|channel|>commentary<|message|>{"x": 1}<|call|>',
        ("", "", [G]),
    ),
    (f'{HEAD}{{"x": 1}}<|call|><|start|>assistant{HEAD}{{}}<|call|>', ("", "", [G, ("g", "{}")])),
    (f"{HEAD}<|call|>", ("", "", [("g", "{}")])),
    (HEAD, ("", "", [("g", "{}")])),
    ("<|channel|>commentary<|message|>I will look.<|end|>", ("", "I will look.", [])),
    ("<|channel|>analysis to=python<|message|>1 + 1<|call|>", ("1 + 1", "", [])),
    (
        '<|channel|>commentary to=functions.g<|message|>{"s": "<|x|>é🌍"}',
        ("", "", [("g", '{"s": "<|x|>é🌍"}')]),
    ),
    ("<|channel|>final<|message|>a < b <| c<|return|>", ("", "a < b <| c", [])),
    # cut off
    ("<|channel|>analysis<|message|>Hm. <|en", ("Hm. <|en", "", [])),
    (f'{HEAD}{{"x": ', ("", "", [("g", '{"x": ')])),
    ("<|channel|>ana", ("", "<|channel|>ana", [])),
    ("<|channel|>final<|message|>", ("", "", [])),
    # malformed
    ("Just text.", ("", "Just text.", [])),
    (" to be or not", ("", " to be or not", [])),
    ("<|message|>Yes.<|return|>", ("", "Yes.", [])),
    ("<|channel|>final Yes.<|end|>", ("", "<|channel|>final Yes.", [])),
    ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Yes.", ("Hm.", "Yes.", [])),
    ("<|channel|>commentary to=functions.<|message|>x<|call|>", ("x", "", [])),
    (f"{HEAD}not json<|call|>", ("", "", [("g", "not json")])),
    (
        "<|start|>assistant<|start|>assistant<|channel|>final<|message|>Yes.",
        ("", "<|start|>assistantYes.", []),
    ),
]


@pytest.mark.parametrize(
    ("name", "text", "expected"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_reasoning_then_calls_then_content(name, text, expected):
    Feed("hermes", name).check(text, expected)


@pytest.mark.parametrize(("text", "expected"), HARMONY)
@pytest.mark.parametrize("both", [True, False])
def test_harmony_is_a_reasoning_and_a_tool_format_at_once(text, expected, both):
    Feed("openai", "gpt_oss" if both else "").check(text, expected, thrice=both)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", "Hm.</think>Yes.", ("Hm.", "Yes.", [])),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes.", ("", "Yes.", [])),
    ],
)
def test_the_prompt_may_have_opened_or_closed_the_thoughts(name, prompt, text, expected):
    Feed("hermes", name, prompt=prompt).check(text, expected)


@pytest.mark.parametrize(
    ("name", "continued", "text", "expected"),
    [
        ("deepseek_r1", "Oslo is", " cold.", ("", " cold.", [])),
        ("deepseek_r1", "<think>Hm.</think>Oslo is", f" c</think>. {CALL}", ("", " c</think>. ", [G])),
        ("deepseek_r1", "<think>\nOslo", " is.</think>\n\nCold.", (" is.", "Cold.", [])),
        ("qwen3", "Oslo is", " cold.", ("", " cold.", [])),
        ("qwen3", "Write ", "<think> first.", ("", "<think> first.", [])),
        ("qwen3", "<think>" + "Hm. " * 99, " Oslo.</think>Cold.", (" Oslo.", "Cold.", [])),
        ("qwen3", "<think>\n\n</think>\n\n<think>\nHm,", f" yes.</think>{CALL}", (" yes.", "", [G])),
        ("granite", "Here is my thought process: Hm,", " so. Here is my response: No.", (" so. ", "No.", [])),
        ("granite", "Say", "Here is my thought process: a", ("", "Here is my thought process: a", [])),
        ("granite", f"{THOUGHTS} No", " Here is my response:", ("", " Here is my response:", [])),
        ("gpt_oss", "Oslo is", " cold.<|return|>", ("", " cold.", [])),
    ],
)
def test_a_message_that_goes_on_is_in_thoughts_if_it_opened_them(name, continued, text, expected):
    prompt = "<think>\n" if name != "gpt_oss" else ""
    tools = "openai" if name == "gpt_oss" else "hermes"
    Feed(tools, name, prompt=prompt, continued=continued).check(text, expected)


def test_without_a_tool_parser_calls_are_content():
    assert Feed(reasoning="qwen3")(f"<think>a</think>{CALL}") == ("a", CALL, [])
    assert Feed()(CALL) == ("", CALL, [])
