"""The formats whose calls are JSON: what each recognises, and what it leaves as content."""

import pytest

from tests.text.parsers.feeding import Feed

ARGS = '{"a": {"b": "}"}}'
CALL = '{"name": "f", "arguments": ' + ARGS + "}"
F = ("f", ARGS)

HERMES = [
    ("Hello.", "Hello.", []),
    ("", "", []),
    ("  \n", "  \n", []),
    (f"<tool_call>\n{CALL}\n</tool_call>", "", [F]),
    (f"Let me see.\n<tool_call>{CALL}</tool_call>", "Let me see.\n", [F]),
    (f"<tool_call>{CALL}</tool_call>\nDone.", "\nDone.", [F]),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>\n", "", [F, F]),
    ('<tool_call>{"name":"g"}</tool_call>', "", [("g", "{}")]),
    ('<tool_call>{"name":"g","arguments":null}</tool_call>', "", [("g", "{}")]),
    ('<tool_call>{"arguments": {"x": 1}, "name": "g"}</tool_call>', "", [("g", '{"x": 1}')]),
    ('<tool_call>{"id":1,"name":"g","arguments":{},"k":[{}]}</tool_call>', "", [("g", "{}")]),
    ('<tool_call>{"name":"g","args":{"x":1}}', '<tool_call>{"name":"g","args":{"x":1}}', []),
    ('<tool_call>{"name":"g","arguments":"{\\"x\\":1}"}</tool_call>', "", [("g", '{"x":1}')]),
    (r'<tool_call>{"name":"g","arguments":{"q":"\"}\\"}}</tool_call>', "", [("g", r'{"q":"\"}\\"}')]),
    (
        '<tool_call>{"name":"g","arguments":{"t":"</tool_call>"}}</tool_call>',
        "",
        [("g", '{"t":"</tool_call>"}')],
    ),
    (
        '<tool_call>{"name":"g","arguments":{"t":"né 🌍 \\ud83c"}}</tool_call>',
        "",
        [("g", '{"t":"né 🌍 \\ud83c"}')],
    ),
    # cut off at max_tokens
    ('Hm <tool_call>{"name": "g", "argu', 'Hm <tool_call>{"name": "g", "argu', []),
    ('<tool_call>{"name": "g", "arguments": {"x": "a', "", [("g", '{"x": "a')]),
    (f"<tool_call>{CALL}</tool", "</tool", [F]),
    # malformed
    ("<tool_call>g(1)</tool_call>", "<tool_call>g(1)</tool_call>", []),
    ('<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', []),
    (
        '<tool_call>{"name":"g","arguments":[1]}</tool_call>!',
        '<tool_call>{"name":"g","arguments":[1]}</tool_call>!',
        [],
    ),
    ('<tool_call>{"name":"g","arguments":{"x":True,}}</tool_call>', "", [("g", '{"x":True,}')]),
    ('<tool_call>{"name":"g","arguments":{"x":[1}}</tool_call>k', "k", [("g", '{"x":[1}}')]),
    ('<tool_call>{"name":"g","arguments":{}}} oh</tool_call>', "} oh", [("g", "{}")]),
    (f"<tool_<tool_call>{CALL}", "<tool_", [F]),
    (f"a < b <tool_call><tool_call>{CALL}</tool_call>", "a < b <tool_call>", [F]),
    ("x </tool_call> y", "x </tool_call> y", []),
]
LLAMA = '{"name": "f", "parameters": ' + ARGS + "}"
LLAMA3_JSON = [
    ("Hello.", "Hello.", []),
    (LLAMA, "", [F]),
    (f"<|python_tag|>{LLAMA}", "", [F]),
    (f"Calling: <|python_tag|> {LLAMA}", "Calling: ", [F]),
    (f"{LLAMA}; {LLAMA}", "", [F, F]),
    (f'\n {LLAMA};{{"name":"g","parameters":{{}}}}', "", [F, ("g", "{}")]),
    (CALL, "", [F]),
    ('{"type": "function", "name": "g", "parameters": {"x": 1}}', "", [("g", '{"x": 1}')]),
    ('{"name":"g","parameters":{"x":"a;b"}}', "", [("g", '{"x":"a;b"}')]),
    ('{"name": "g"}', "", [("g", "{}")]),
    (f"{LLAMA} That is all.", " That is all.", [F]),
    (f"{LLAMA}; and more", "; and more", [F]),
    ('{"name":"g","parameters":null}', "", [("g", "{}")]),
    ('{"name":"g","parameters":{"x":"é\\n\\"🌍"}}', "", [("g", '{"x":"é\\n\\"🌍"}')]),
    ('{"name": "g", "parameters": {"x": [1, {"y"', "", [("g", '{"x": [1, {"y"')]),
    ('{"name": "g", "para', '{"name": "g", "para', []),
    ('{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ('{"answer": 42}', '{"answer": 42}', []),
    (f"I would say {LLAMA}", f"I would say {LLAMA}", []),
    ('<|python_tag|>print("hi")', '<|python_tag|>print("hi")', []),
    ('<|python_tag|>{"name":"unknown","parameters":{}}', "", [("unknown", "{}")]),
    ("<|python", "<|python", []),
    ("{", "{", []),
]
GRANITE = [
    ("Hello.", "Hello.", []),
    (f"<|tool_call|>[{CALL}]", "", [F]),
    (f"<tool_call>[{CALL}]", "", [F]),
    (f"<|tool_call|>[{CALL}, {CALL}]", "", [F, F]),
    (f"[{CALL}]", "", [F]),
    (f" <|tool_call|> [ {CALL} ]\n", "", [F]),
    (f"<tool_call>\n{CALL}\n</tool_call>", "", [F]),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", [F, F]),
    (f"Sure. <|tool_call|>[{CALL}]", "Sure. ", [F]),
    ('<|tool_call|>[{"name":"g","arguments":{}}] then', " then", [("g", "{}")]),
    ('<|tool_call|>[{"name":"g"}]', "", [("g", "{}")]),
    ('<|tool_call|>[{"arguments":{"x":2},"name":"g"}]', "", [("g", '{"x":2}')]),
    ('<|tool_call|>[{"name":"g","arguments":{"x":"]}\\""}}]', "", [("g", '{"x":"]}\\""}')]),
    ('<|tool_call|>[{"name":"g","arguments":{"x":"日本"}}]', "", [("g", '{"x":"日本"}')]),
    ('<|tool_call|>[{"name":"g","arguments":{"x":', "", [("g", '{"x":')]),
    ('<|tool_call|>[{"name":"g"', '<|tool_call|>[{"name":"g"', []),
    ("<|tool_call|>[]", "<|tool_call|>[]", []),
    ("<|tool_call|>nothing", "<|tool_call|>nothing", []),
    ("[1, 2]", "[1, 2]", []),
    ('[{"name":"Bob","arguments":{}}]', '[{"name":"Bob","arguments":{}}]', []),
    (f"<|tool_call|>[{CALL}, oops]", ", oops]", [F]),
    (f"<|tool_call|>[{CALL},]", "", [F]),
]
PHI4 = [
    ("Hello.", "Hello.", []),
    (f"functools[{CALL}]", "", [F]),
    (f"functools[{CALL}, {CALL}]", "", [F, F]),
    (f"<|tool_call|>[{CALL}]<|/tool_call|>", "", [F]),
    (f"<|tool_call|>{CALL}<|/tool_call|>", "", [F]),
    (f"Well: functools[{CALL}] ok", "Well:  ok", [F]),
    ('functools[{"name":"g","parameters":{"x":1}}]', "", [("g", '{"x":1}')]),
    ('functools[{"name":"g"}]', "", [("g", "{}")]),
    ('functools [{"name":"g"}]', "", [("g", "{}")]),
    ('functools[{"name":"g","arguments":{"l":[[1],[2]]}}]', "", [("g", '{"l":[[1],[2]]}')]),
    ('functools[{"name":"g","arguments":{"s":"]"}}]', "", [("g", '{"s":"]"}')]),
    ('functools[{"name":"g","arguments":{"s":"ü"}}]', "", [("g", '{"s":"ü"}')]),
    ('functools[{"arguments":{},"name":"g"}]', "", [("g", "{}")]),
    ('functools[{"name":"g","arguments":{"s":"x', "", [("g", '{"s":"x')]),
    ('functools[{"na', 'functools[{"na', []),
    ("import functools", "import functools", []),
    ("functools[0]", "functools[0]", []),
    ("func", "func", []),
    ("functools[]", "functools[]", []),
    ('functools[{"name":"g"},{"x":1}]', ',{"x":1}]', [("g", "{}")]),
    ("a<|/tool_call|>b", "a<|/tool_call|>b", []),
]
MISTRAL = [
    ("Hello.", "Hello.", []),
    (f"[TOOL_CALLS][{CALL}]", "", [F]),
    (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [F, F]),
    (f"[TOOL_CALLS]{CALL}", "", [F]),
    (f"[TOOL_CALLS]f{ARGS}", "", [F]),
    (f"[TOOL_CALLS]f{ARGS}[TOOL_CALLS]f{ARGS}", "", [F, F]),
    (f"[TOOL_CALLS]f[ARGS]{ARGS}", "", [F]),
    (f"[TOOL_CALLS]f[CALL_ID]abcdef123[ARGS]{ARGS}", "", [F]),
    ("Sure![TOOL_CALLS]g{}", "Sure!", [("g", "{}")]),
    ("[TOOL_CALLS]g {} bye", " bye", [("g", "{}")]),
    ('[TOOL_CALLS]g{"x":"[1]"}', "", [("g", '{"x":"[1]"}')]),
    ('[TOOL_CALLS]g{"x":"{\\"y\\""}', "", [("g", '{"x":"{\\"y\\""}')]),
    ('[TOOL_CALLS]g{"x":"Zürich 🏔"}', "", [("g", '{"x":"Zürich 🏔"}')]),
    ('[TOOL_CALLS][{"name":"g"}]', "", [("g", "{}")]),
    ('[TOOL_CALLS]g{"x":"unclosed[TOOL_CALLS]g{}', "", [("g", '{"x":"unclosed'), ("g", "{}")]),
    ('[TOOL_CALLS]g{"x": 1', "", [("g", '{"x": 1')]),
    ("[TOOL_CALLS]g", "[TOOL_CALLS]g", []),
    ("[TOOL_CALLS]g[ARGS]", "[TOOL_CALLS]g[ARGS]", []),
    ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ("[TOOL_CALLS][1]", "[TOOL_CALLS][1]", []),
    ("[TOOL_CALLS]g(1)", "[TOOL_CALLS]g(1)", []),
    ("a [TOOL] b [", "a [TOOL] b [", []),
    ('[TOOL_CALLS][{"name":"g"}, x]', ", x]", [("g", "{}")]),
]
CASES = {
    "hermes": HERMES,
    "llama3_json": LLAMA3_JSON,
    "granite": GRANITE,
    "phi4_mini_json": PHI4,
    "mistral": MISTRAL,
}


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"), [(name, *case) for name, cases in CASES.items() for case in cases]
)
def test_however_it_is_cut(name, text, content, calls):
    Feed(name).check(text, ("", content, calls))


@pytest.mark.parametrize("name", CASES)
def test_twenty_outputs(name):
    assert len({case[0] for case in CASES[name]}) >= 20


def test_a_bare_call_counts_by_its_arguments_where_the_tools_are_not_known():
    feed = Feed("llama3_json", functions=[])
    assert feed('{"name": "any", "parameters": {}}') == ("", "", [("any", "{}")])
    assert feed('{"name": "any"}') == ("", '{"name": "any"}', [])
