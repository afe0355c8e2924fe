"""The formats whose calls are not JSON, or stand between tags of their own."""
# ruff: noqa: RUF001 (the tags are what they are)

import pytest

from tests.text.parsers.feeding import Feed

PYTHONIC = [
    ("Hello.", "Hello.", []),
    ('[weather(city="Paris")]', "", [("weather", '{"city": "Paris"}')]),
    ("[weather(city='Paris', days=3)]", "", [("weather", '{"city": "Paris", "days": 3}')]),
    ("[f(), g(x=1.5), f(y=None)]", "", [("f", "{}"), ("g", '{"x": 1.5}'), ("f", '{"y": null}')]),
    ("\n[ f ( ) ]", "\n[ f ( ) ]", []),
    ("[f( )]", "", [("f", "{}")]),
    ("[g(x=True, y=false)]", "", [("g", '{"x": true, "y": false}')]),
    ('[g(x=[1, {"a": (2, 3)}], y={})]', "", [("g", '{"x": [1, {"a": [2, 3]}], "y": {}}')]),
    ("[g(x=\"a, b) ]'\", y='it\\'s')]", "", [("g", '{"x": "a, b) ]\'", "y": "it\'s"}')]),
    ('[g(x="""a\n"b" """)]', "", [("g", '{"x": "a\\n\\"b\\" "}')]),
    ("[g(x=\"\", y='é🌍')]", "", [("g", '{"x": "", "y": "é🌍"}')]),
    ("[g(x=-1, y=1e3,)]", "", [("g", '{"x": -1, "y": 1000.0}')]),
    ("<|python_start|>[g(x=1)]<|python_end|>", "", [("g", '{"x": 1}')]),
    ("Yes. <|python_start|>[g(x=1)]<|python_end|>", "Yes. ", [("g", '{"x": 1}')]),
    ("[g(x=1)] done", " done", [("g", '{"x": 1}')]),
    # cut off
    ('[weather(city="San Fr', "", [("weather", '{"city": "San Fr')]),
    ("[g(x=[1, 2", "", [("g", '{"x": [1, 2')]),
    ("[g(x=1, y", ", y", [("g", '{"x": 1')]),
    ("[g(", "[g(", []),
    # malformed
    ("[1, 2, 3]", "[1, 2, 3]", []),
    ("[unknown(x=1)]", "[unknown(x=1)]", []),
    ("[f() is a call", "[f() is a call", []),
    ("[f(1, 2)]", "[f(1, 2)]", []),
    ("[f(x == 1)]", "[f(x == 1)]", []),
    ("[g(x=a.b + 1)]", "", [("g", '{"x": "a.b + 1"}')]),
    ("[g(x=1, 2)]", ", 2)]", [("g", '{"x": 1')]),
    ("[g(x=1), oops]", ", oops]", [("g", '{"x": 1}')]),
    ("[g(x=1]]", "]", [("g", '{"x": 1')]),
]
QWEN = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
PARIS = ("weather", '{"city": "Paris"}')
SHORT = "<function=weather><parameter=city>Paris</parameter></function>"
QWEN3_CODER = [
    ("Hello.", "Hello.", []),
    (QWEN, "", [PARIS]),
    (f"Sure.\n{QWEN}", "Sure.\n", [PARIS]),
    (SHORT, "", [PARIS]),
    (f"{SHORT}{SHORT}", "", [PARIS, PARIS]),
    (f"<tool_call>{SHORT}</tool_call>\nok", "\nok", [PARIS]),
    ("<tool_call><function=f></function></tool_call>", "", [("f", "{}")]),
    ("<function=weather><parameter=days>\n3\n</parameter></function>", "", [("weather", '{"days": 3}')]),
    ("<function=weather><parameter=city>3</parameter></function>", "", [("weather", '{"city": "3"}')]),
    ("<function=weather><parameter=days>soon</parameter></function>", "", [("weather", '{"days": "soon"}')]),
    ("<function=f><parameter=k>\na\n<b>\n\n</parameter></function>", "", [("f", '{"k": "a\\n<b>\\n"}')]),
    ('<function=f><parameter=k>"é"\\🌍</parameter></function>', "", [("f", '{"k": "\\"é\\"\\\\🌍"}')]),
    (
        "<function=f><parameter=a>1</parameter><parameter=b>2</parameter></function>",
        "",
        [("f", '{"a": "1", "b": "2"}')],
    ),
    ("<function=f><parameter=k></parameter></function>", "", [("f", '{"k": ""}')]),
    ('<function=weather>{"city": "Paris"}</function>', "", [PARIS]),
    ('<tool_call>\n<function=f>\n{"k": "}"}\n</function>\n</tool_call>x', "\nx", [("f", '{"k": "}"}')]),
    # cut off
    ('<function=f>{"k": [1', "", [("f", '{"k": [1')]),
    ("<function=weather><parameter=city>Par", "", [("weather", '{"city": "Par')]),
    ("<function=weather><parameter=days>3", "", [("weather", '{"days": 3')]),
    ("<function=f><parameter=a>1</parameter>", "", [("f", '{"a": "1"')]),
    ("<tool_call>\n<function=we", "<tool_call>\n<function=we", []),
    # malformed
    ("<function=f><parameter=a>\n1\n<parameter=b>\n2\n</function>", "", [("f", '{"a": "1", "b": "2"}')]),
    ("<tool_call><function=f><parameter=a>\n1\n</tool_call>", "", [("f", '{"a": "1"}')]),
    ("<tool_call><function=f></tool_call>x", "x", [("f", "{}")]),
    ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
    ("<function=>", "<function=>", []),
    ("<function=f>what</function>", "what</function>", [("f", "")]),
    ("a <b> <func", "a <b> <func", []),
]
B, E, C, D, S = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
V3 = f'{C}function{S}g\n```json\n{{"x": 1}}\n```{D}'
V31 = f'{C}g{S}{{"x": 1}}{D}'
ONE = ("g", '{"x": 1}')
DEEPSEEK = [
    ("Hello.", "Hello.", []),
    (f"{B}{V3}{E}", "", [ONE]),
    (f"{B}{V31}{E}", "", [ONE]),
    (f"{B}{V31}{V31}{E}", "", [ONE, ONE]),
    (f"{V3}\n{V3}", "", [ONE, ONE]),
    (f"Wait.{B}{V31}{E}", "Wait.", [ONE]),
    (f"{V31}{E} ok", " ok", [ONE]),
    (f"{C}f{S}{{}}{D}", "", [("f", "{}")]),
    (f'{C}g{S}{{"a": {{"b": "}}"}}}}{D}', "", [("g", '{"a": {"b": "}"}}')]),
    (f'{C}g{S}{{"s": "```"}}{D}', "", [("g", '{"s": "```"}')]),
    (f'{C}g{S}{{"s": "\\"né🌍"}}{D}', "", [("g", '{"s": "\\"né🌍"}')]),
    (f"{C}function{S}f\n```json\n{{}}\n```", "", [("f", "{}")]),
    # cut off
    (f'{C}g{S}{{"x": "a', "", [("g", '{"x": "a')]),
    (f"{C}g{S}", f"{C}g{S}", []),
    (f"{B}{C}fun", f"{C}fun", []),
    ("<｜tool▁c", "<｜tool▁c", []),
    # malformed
    (f'{C}g{S}{{"x": "a{D}b', "b", [("g", '{"x": "a')]),
    (f"{C}g{D}", f"{C}g{D}", []),
    (f"{C}{S}{{}}{D}", f"{C}{S}{{}}{D}", []),
    (f"{C}g{S}[1]{D}", f"{C}g{S}[1]{D}", []),
    (f"{B}nothing{E}", "nothing", []),
    (f'{C}g{S}{{"x": [1}}{D}', "", [("g", '{"x": [1}')]),
    ("a <｜b｜> c", "a <｜b｜> c", []),
]
GEMMA = [
    ("Hello.", "Hello.", []),
    ('```tool_code\nweather(city="Paris")\n```', "", [PARIS]),
    ("```tool_code\nf()\n```", "", [("f", "{}")]),
    ("```tool_code\ng(x=1)\ng(x=2)\n```", "", [("g", '{"x": 1}'), ("g", '{"x": 2}')]),
    ("Ok\n```tool_code\ng(x=1)\n``` bye", "Ok\n bye", [("g", '{"x": 1}')]),
    (
        "<start_function_call>call:weather{city:<escape>Paris<escape>}<end_function_call>",
        "",
        [PARIS],
    ),
    ('<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>', "", [PARIS]),
    ("<|tool_call>call:g{a:1,b:true,c:null}<tool_call|>", "", [("g", '{"a": 1, "b": true, "c": null}')]),
    ('<|tool_call>call:g{l:[1,<|"|>x<|"|>,[]],o:{k:2}}', "", [("g", '{"l": [1, "x", []], "o": {"k": 2}}')]),
    ("<|tool_call>call:f{}<tool_call|><|tool_call>call:f{}<tool_call|>", "", [("f", "{}"), ("f", "{}")]),
    ('<|tool_call>call:g{s:<|"|>a,}]"\n<b<|"|>}<tool_call|>', "", [("g", '{"s": "a,}]\\"\\n<b"}')]),
    ('<|tool_call>call:g{s:<|"|>é🌍<|"|>}<tool_call|>', "", [("g", '{"s": "é🌍"}')]),
    ("<|tool_call>call:g{s:plain word}<tool_call|>", "", [("g", '{"s": "plain word"}')]),
    ('<|tool_call>call:g{<|"|>k<|"|>:-1.5}<tool_call|>', "", [("g", '{"k": -1.5}')]),
    # cut off
    ('<|tool_call>call:g{s:<|"|>Par', "", [("g", '{"s": "Par')]),
    ("<|tool_call>call:g{n:12", "", [("g", '{"n": 12')]),
    ("<|tool_call>call:g", "<|tool_call>call:g", []),
    ("```tool_code\nweather(ci", "```tool_code\nweather(ci", []),
    # malformed
    ("<|tool_call>g{}<tool_call|>", "<|tool_call>g{}<tool_call|>", []),
    ("<|tool_call>call:g{a}<tool_call|>k", "a}k", [("g", "{")]),
    ("<|tool_call>call:g{a:[1}<tool_call|>", "}", [("g", '{"a": [1')]),
    ("```python\nf()\n```", "```python\nf()\n```", []),
    ("```tool_code\nx = 1\n```", "```tool_code\nx = 1\n```", []),
]
CASES = {"pythonic": PYTHONIC, "qwen3_coder": QWEN3_CODER, "deepseek_v3": DEEPSEEK, "gemma": GEMMA}


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_however_it_is_cut(name, text, content, calls):
    Feed(name).check(text, ("", content, calls))


@pytest.mark.parametrize("name", CASES)
def test_twenty_outputs(name):
    assert len({case[0] for case in CASES[name]}) >= 20
