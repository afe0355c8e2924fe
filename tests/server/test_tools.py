"""Tools and reasoning over HTTP: OpenAI's client, and a core that says what the last message says."""

import json

import openai
import pytest

ECHO = "{% if tools %}{% endif %}{# tool_calls #}{{ messages[-1].content }}<|end|>{{ reasoning_effort }}"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": SCHEMA}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
OSLO = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TIME = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
THOUGHT = "<think>\nNorwegian, then.\n</think>\n\n"


@pytest.fixture(scope="module")
def says(launch):
    config = {"chat_template": ECHO, "reasoning_parser": "qwen3", "served_model_name": ["tiny"]}
    server = launch(config).wait_ready()
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, text, *, stream=False, **fields):
    """The message, why it ended, and the usage; a streamed one put together again."""
    fields = {"tools": TOOLS} | fields
    asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}
    if not stream:
        reply = client.chat.completions.create(**asked)
        (choice,) = reply.choices
        message = choice.message.to_dict()
        for call in message.get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
        return message, choice.finish_reason, reply.usage
    message = {"content": None, "refusal": None}
    reasons = []
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            reasons.append(choice.finish_reason)
            add(message, choice.delta.to_dict())
        usage = chunk.usage
    assert set(reasons[:-1]) <= {None}
    return message, reasons[-1], usage


def add(message, delta):
    for name, value in delta.items():
        if name != "tool_calls":
            message[name] = (message.get(name) or "") + value
            continue
        (new,) = value
        calls = message.setdefault("tool_calls", [])
        if new["index"] == len(calls):  # named first, and once
            assert new["id"].startswith("call_") and new["function"] == {
                "name": new["function"]["name"],
                "arguments": "",
            }
            calls.append({"type": new["type"], "function": new["function"]})
        else:
            assert new["index"] == len(calls) - 1 and new.keys() == {"index", "function"}
            calls[-1]["function"]["arguments"] += new["function"]["arguments"]


def called(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CALLS = [called("weather", '{"city": "Oslo"}'), called("clock", "{}")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("Hi", "Hi", None, []),
        (OSLO, None, None, CALLS[:1]),
        (f"I look.\n{OSLO}\n{TIME}", "I look.\n", None, CALLS),
        (THOUGHT + OSLO, None, "Norwegian, then.\n", CALLS[:1]),
        (THOUGHT + "Hi", "Hi", "Norwegian, then.\n", []),
        (f"<think>{OSLO}", None, OSLO, []),
        ("<tool_call>{no", "<tool_call>{no", None, []),
    ],
)
def test_messages(says, text, content, reasoning, calls, stream):
    message, reason, usage = ask(says, text, stream=stream)
    expected = {"content": content, "role": "assistant", "refusal": None}
    if reasoning:
        expected |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        expected["tool_calls"] = calls
    assert message == expected
    assert reason == ("tool_calls" if calls else "stop")
    assert usage.completion_tokens == len(text) + 1
    thought = text.partition("</think>")[0] if reasoning else ""  # a token is a byte
    assert usage.completion_tokens_details.reasoning_tokens == len(thought)


@pytest.mark.parametrize("stream", [False, True])
def test_at_most_one_call(says, stream):
    message, reason, _ = ask(says, f"{OSLO}{TIME} Done", stream=stream, parallel_tool_calls=False)
    assert message["tool_calls"] == CALLS[:1] and reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": None}])
def test_without_tools_nothing_is_a_call(says, fields, stream):
    message, reason, _ = ask(says, OSLO, stream=stream, **fields)
    assert message == {"content": OSLO, "role": "assistant", "refusal": None} and reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_can_be_left_out(says, stream):
    message, _, usage = ask(says, THOUGHT + "Hi", stream=stream, extra_body={"include_reasoning": False})
    assert message == {"content": "Hi", "role": "assistant", "refusal": None}
    assert usage.completion_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "thinks"), [(THOUGHT + "Hi", False), ("Well. <think>\n" + "Norwegian, " * 20, True)]
)
def test_a_message_that_goes_on(says, text, thinks, stream):
    """The core says it again: all of it is what the message was at, thoughts or content."""
    message, _, _ = ask(
        says, text, stream=stream, max_tokens=len(text), extra_body={"continue_final_message": True}
    )
    assert (message.get("reasoning"), message["content"]) == ((text, None) if thinks else (None, text))


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_ended_by_length(says, stream):
    message, reason, _ = ask(says, OSLO, stream=stream, max_tokens=len(OSLO) - 18)
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Os' and reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_the_next_call_is_no_text_where_length_cuts_it_off(says, stream):
    text = f"I look.\n{TIME}{OSLO}"
    message, reason, _ = ask(says, text, stream=stream, max_tokens=len(text) - 40)
    assert message["tool_calls"] == CALLS[1:] and reason == "length"
    assert message["content"] == "I look.\n"


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_a_stop_string_cuts_is_no_call_to_make(says, stream):
    message, reason, _ = ask(says, OSLO, stream=stream, stop=["slo"])
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "O' and reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_found_before_anything_is_parsed(says, stream):
    message, reason, _ = ask(says, f"{TIME} and {OSLO}", stream=stream, stop=["</tool_call> and"])
    assert message["tool_calls"] == CALLS[1:] and message["content"] is None and reason == "tool_calls"


def test_n_choices_have_their_own_calls(says):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": OSLO}], "tools": TOOLS, "n": 2}
    reply = says.chat.completions.create(**asked)
    first, second = (choice.message.tool_calls[0] for choice in reply.choices)
    assert first.id != second.id and first.function == second.function
    texts = ["", ""]
    for chunk in says.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        for call in choice.delta.tool_calls or ():
            texts[choice.index] += call.function.arguments
    assert texts == ['{"city": "Oslo"}'] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_and_token_ids_of_a_call_are_complete(says, stream):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": TIME}], "tools": TOOLS}
    reply = says.chat.completions.create(
        **asked, logprobs=True, stream=stream, extra_body={"return_token_ids": True}
    )
    choices = [part.choices[0] for part in (reply if stream else [reply]) if part.choices]
    tokens = [id for choice in choices for id in getattr(choice, "token_ids", None) or ()]
    logprobs = [entry.token for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert len(tokens) == len(logprobs) == len(TIME) + 1 and "".join(logprobs[:-1]) == TIME


def test_the_prompt_of_a_round_trip(http):
    """This template knows no tools: nothing of them is dropped."""
    call = {"id": "call_1"} | called("weather", '{"city":"Oslo"}')
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12"},
    ]
    body = {"messages": messages, "tools": TOOLS}
    prompt = http.post("/v1/chat/completions/render", json=body).json()["prompt"]
    assert prompt.startswith("<|system|># Tools\n") and json.dumps(WEATHER) in prompt
    assert prompt.endswith(
        f"<|user|>Weather?<|end|><|assistant|>{OSLO}<|end|>"
        "<|user|><tool_response>\n12\n</tool_response><|end|><|assistant|>"
    )
    tokens = http.post("/tokenize", json=body).json()
    assert tokens["tokens"] == http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]
    prompt = http.post("/v1/chat/completions/render", json=body | {"tool_choice": "none"}).json()["prompt"]
    assert prompt.startswith("<|user|>Weather?<|end|><|assistant|><tool_call>") and "12" in prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", [OSLO, f"I look.\n{OSLO}{TIME}"])
def test_functions_are_answered_as_functions(says, text, stream):
    functions = [tool["function"] for tool in TOOLS]
    asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], "functions": functions}
    reply = says.chat.completions.create(**asked, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in reply]
        deltas = [choice.delta for choice in choices]
        called = [delta.function_call for delta in deltas if delta.function_call]
        assert [call.name for call in called] == ["weather"] + [None] * (len(called) - 1)
        arguments = "".join(call.arguments for call in called)
        content = "".join(delta.content or "" for delta in deltas) or None
        assert not any(delta.tool_calls for delta in deltas)
    else:
        choices = reply.choices
        message = choices[0].message
        arguments, content = message.function_call.arguments, message.content
        assert message.function_call.name == "weather" and message.tool_calls is None
    assert arguments == '{"city": "Oslo"}' and choices[-1].finish_reason == "function_call"
    assert content == ("I look.\n" if text != OSLO else None)
    plain = says.chat.completions.create(**asked, function_call="none")
    assert plain.choices[0].message.content == text and plain.choices[0].finish_reason == "stop"


def test_the_prompt_of_functions_is_that_of_tools(http):
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    asked, answer = {"role": "user", "content": "Weather?"}, {"content": "12", "name": "weather"}
    older = [
        asked,
        {"role": "assistant", "content": None, "function_call": call},
        {"role": "function"} | answer,
    ]
    newer = [
        asked,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "a", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "a"} | answer,
    ]
    for path in ("/v1/chat/completions/render", "/tokenize"):
        functions = [tool["function"] for tool in TOOLS]
        told = http.post(path, json={"messages": older, "functions": functions})
        assert told.status_code == 200, told.text
        assert told.json() == http.post(path, json={"messages": newer, "tools": TOOLS}).json()


def test_reasoning_effort_is_for_templates_that_know_it(says, http):
    body = {"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "low"}
    told = says.post("/chat/completions/render", body=body, cast_to=object)
    assert told["prompt"] == "Hi<|end|>low"
    refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "reasoning_effort"


def test_tools_need_a_parser(launch):
    server = launch({"tool_call_parser": "none"}).wait_ready()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    refused = server.http.post("/v1/chat/completions", json=body | {"tools": TOOLS})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_parser_of_ones_own(launch, tmp_path):
    plugin = tmp_path / "arrow.py"
    plugin.write_text(
        "import re\n"
        "from jaxserve.text.parsers import register_tool_parser\n"
        "def arrow(s):\n"
        "    while (yield from s.until(('-> ',), s.content)):\n"
        "        s.begin((yield from s.run(re.compile(r'\\w*'))))\n"
        "        yield from s.nested(s.arguments)\n"
        "register_tool_parser('arrow', arrow)\n"
    )
    config = {"chat_template": ECHO, "tool_call_parser": "arrow", "tool_parser_plugin": str(plugin)}
    body = {"messages": [{"role": "user", "content": 'Well -> f{"a": 1}'}], "tools": [CLOCK]}
    reply = launch(config).wait_ready().http.post("/v1/chat/completions", json=body).json()
    message = reply["choices"][0]["message"]
    assert message["content"] == "Well " and message["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"tool_call_parser": "hermse"}, "unknown tool parser 'hermse'"),
        ({"reasoning_parser": "qwen"}, "unknown reasoning parser 'qwen'"),
        ({"tool_parser_plugin": "nowhere.py"}, "tool_parser_plugin nowhere.py failed"),
    ],
)
def test_a_parser_that_is_not_there(launch, config, told):
    server = launch(config)
    assert server.stop(0) == 1 and told in server.err


MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "strict": True,
        "parameters": {
            "properties": {"to": {"enum": ["left", "right"]}, "fast": {"type": "boolean"}},
            "required": ["to", "fast"],
        },
    },
}


def test_a_call_that_must_come_is_one_whatever_the_model(start_real, tmp_path):
    """Streamed and not; OpenAI's client puts it together."""
    (tmp_path / "template").write_text("{% if tools %}{% endif %}{{ messages[-1].content }}")
    server = start_real("--max-num-seqs", "4", "--chat-template", str(tmp_path / "template"))
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    named = {"type": "function", "function": {"name": "move"}}
    for choice, seed in (("required", 1), ("required", 2), (named, 3)):
        asked = {
            "model": client.models.list().data[0].id,
            "messages": [{"role": "user", "content": "Go!"}],
            "tools": [MOVE],
            "tool_choice": choice,
            "parallel_tool_calls": False,
            "seed": seed,
        }
        (whole,) = client.chat.completions.create(**asked).choices
        with client.chat.completions.stream(**asked) as stream:
            (streamed,) = stream.get_final_completion().choices
        for answer in (whole, streamed):
            assert answer.finish_reason == "tool_calls" and answer.message.content is None
            (call,) = answer.message.tool_calls
            arguments = json.loads(call.function.arguments)
            assert arguments["to"] in ("left", "right") and arguments["fast"] in (True, False)
        assert streamed.message.tool_calls[0].function.parsed_arguments == arguments
        assert whole.message.tool_calls[0].function.arguments == call.function.arguments
    begun = asked | {"messages": [{"role": "user", "content": "<tool_call>"}], "tool_choice": "auto"}
    (free,) = client.chat.completions.create(**begun, max_tokens=20).choices
    assert free.message.content and not free.message.tool_calls
    older = {name: value for name, value in begun.items() if name in ("model", "messages", "seed")}
    reply = client.chat.completions.create(
        **older, functions=[MOVE["function"]], function_call={"name": "move"}
    )
    assert reply.choices[0].finish_reason == "function_call"
    assert json.loads(reply.choices[0].message.function_call.arguments)["to"] in ("left", "right")
    strange = {"name": "f", "parameters": {"properties": {"a": {"type": "strin"}}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**older, functions=[strange], function_call={"name": "f"})
    assert error.value.param == "functions[0].parameters#/properties/a"
    wrong = MOVE | {"function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**asked | {"tools": [MOVE, wrong], "tool_choice": "required"})
    assert error.value.param == "tools[1].function.parameters#/properties/a/not"
