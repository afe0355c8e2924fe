"""Whatever a client gets wrong: the right status, OpenAI's shape, and the full path of the field."""

import json
import socket

import pytest

MESSAGES = [{"role": "user", "content": "Hello"}]


def message(**fields):
    return [{"role": "user", "content": "Hello"} | fields]


def part(**fields):
    return message(content=[{"type": "text", "text": "a"}, fields])


def tool(**fields):
    return {"type": "function", "function": {"name": "f"} | fields}


def call(**fields):
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"} | fields}


def called(**fields):
    return message(role="assistant", content=None, tool_calls=[call(**fields)])


NAMED = {"type": "function", "function": {"name": "f"}}
CHAT = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": {}}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": message(content=None)}, "messages[0].content"),
    ({"messages": message(content=3)}, "messages[0].content"),
    ({"messages": message(contents="a")}, "messages[0].contents"),
    ({"messages": message(name=3)}, "messages[0].name"),
    ({"messages": message(reasoning="so")}, "messages[0].reasoning"),
    ({"messages": message(role="assistant", content=None)}, "messages[0].content"),
    ({"messages": message(role="assistant", refusal="no")}, "messages[0].refusal"),
    ({"messages": message(role="assistant", reasoning="a", reasoning_content="b")}, "messages[0].reasoning"),
    ({"messages": message(role="assistant", reasoning_content=3)}, "messages[0].reasoning_content"),
    ({"messages": part(type="refusal", refusal="no")}, "messages[0].content[1].type"),
    ({"messages": message(role="owner")}, "messages[0].role"),
    ({"messages": message(role="function", name="f")}, "messages[0].role"),
    ({"messages": message(role="tool")}, "messages[0].tool_call_id"),
    ({"messages": message(role="tool", tool_call_id=1)}, "messages[0].tool_call_id"),
    ({"messages": message(role="tool", tool_call_id="1", content=None)}, "messages[0].content"),
    ({"messages": message(tool_call_id="1")}, "messages[0].tool_call_id"),
    ({"messages": message(tool_calls=[call()])}, "messages[0].tool_calls"),
    ({"messages": message(role="assistant", tool_calls=[{}])}, "messages[0].tool_calls[0].id"),
    ({"messages": called(name=3)}, "messages[0].tool_calls[0].function.name"),
    ({"messages": called(arguments={})}, "messages[0].tool_calls[0].function.arguments"),
    ({"messages": called(argument="{}")}, "messages[0].tool_calls[0].function.argument"),
    ({"messages": message(role="assistant", tool_calls=[{}, 3])}, "messages[0].tool_calls[0].id"),
    ({"messages": message(role="assistant", function_call={})}, "messages[0].function_call"),
    (
        {"messages": message(role="assistant", function_call={"name": "f", "arguments": 3})},
        "messages[0].function_call",
    ),
    ({"messages": message(function_call={"name": "f", "arguments": ""})}, "messages[0].tool_calls"),
    ({"messages": part(type="text", txet="b")}, "messages[0].content[1].txet"),
    ({"messages": part(type="text")}, "messages[0].content[1].text"),
    ({"messages": part(type="image_url")}, "messages[0].content[1].type"),
    ({"messages": part(text="b")}, "messages[0].content[1].type"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"mesages": MESSAGES}, "mesages"),
    ({"model": 3}, "model"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 5}, "max_tokens"),
    ({"max_completion_tokens": 600}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"min_tokens": 505}, "min_tokens"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"logit_bias": {"288": 1}}, "logit_bias[288]"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"tools": {}}, "tools"),
    ({"tools": [3]}, "tools[0]"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [tool(), tool(name="a b")]}, "tools[1].function.name"),
    ({"tools": [tool(name="")]}, "tools[0].function.name"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name"),
    ({"tools": [tool(description=3)]}, "tools[0].function.description"),
    ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
    ({"tools": [tool(parameters={"properties": []})]}, "tools[0].function.parameters.properties"),
    ({"tools": [tool(parameters={"required": None})]}, "tools[0].function.parameters.required"),
    ({"tools": [tool(name="f\n")]}, "tools[0].function.name"),
    ({"bad_words": ["x" * 257]}, "bad_words[0]"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
    ({"tools": [tool(arguments={})]}, "tools[0].function.arguments"),
    ({"tools": [tool()], "detokenize": False}, "detokenize"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": "any", "tools": [tool()]}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools"}, "tools": [tool()]}, "tool_choice.type"),
    ({"tool_choice": NAMED, "tools": [tool(name="g")]}, "tool_choice.function.name"),
    ({"tool_choice": NAMED}, "tool_choice.function.name"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"include_reasoning": 1}, "include_reasoning"),
    ({"reasoning_effort": "utmost"}, "reasoning_effort"),
    ({"functions": {}}, "functions"),
    ({"functions": [{"name": "f"}], "tools": []}, "tools"),
    ({"functions": [{}]}, "functions[0].name"),
    ({"functions": [{"name": "f", "parameters": {"type": "array"}}]}, "functions[0].parameters.type"),
    ({"functions": [{"name": "f"}], "function_call": "required"}, "function_call"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
    ({"function_call": {"name": "g"}}, "functions"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
        "response_format.json_schema.schema#/not",
    ),
    ({"structured_outputs": {"json": {"items": {"format": "x"}}}}, "structured_outputs.json#/items/format"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
        "response_format.json_schema.name",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs"),
    ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    (
        {"structured_outputs": {"json": {}, "whitespace_pattern": " *"}},
        "structured_outputs.whitespace_pattern",
    ),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex",
    ),
    ({"guided_json": 3}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", 3]}, "guided_choice[1]"),
    ({"guided_regex": "a", "guided_grammar": "start: A"}, "guided_grammar"),
    ({"guided_regex": "a", "guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern"),
    ({"guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern"),
    ({"guided_decoding_backend": "auto"}, "guided_decoding_backend"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"chat_template": 3}, "chat_template"),
    ({"add_generation_prompt": 1}, "add_generation_prompt"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"documents": [{"text": "a"}]}, "documents"),
    ({"documents": ["a"]}, "documents[0]"),
    ({"add_special_tokens": "no"}, "add_special_tokens"),
    ({"echo": 1}, "echo"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"request_id": 3}, "request_id"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "x" * 129}, "request_id"),
]
COMPLETION = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [1.0]}, "prompt[0]"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": ["a", [1]]}, "prompt[1]"),
    ({"prompt": [[40], [40, "1"]]}, "prompt[1][1]"),
    ({"prompt": [40, 288]}, "prompt[1]"),
    ({"prompt": [40, -1]}, "prompt[1]"),
    ({"prompt": [[40], [41, 2**70]]}, "prompt[1][1]"),
    ({"prompt": ["a"] * 2049}, "prompt"),
    ({"prompt": "a" * 600}, "prompt"),
    ({"prompt": ["a", "a" * 600]}, "prompt[1]"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"max_tokens": 16.0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 512}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_k": 10**60}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"prompt": ["a"] * 17, "n": 128}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": ["a", 3]}, "stop[1]"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop_token_ids": [288]}, "stop_token_ids[0]"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [7] * 1025}, "stop_token_ids"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"stream": True, "max_tokens": 512}, "max_tokens"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"presence_penalty": False}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"typical_p": 1.5}, "typical_p"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias[5]"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"logit_bias": {"a": 1}}, "logit_bias[a]"),
    ({"logit_bias": {"-1": 1}}, "logit_bias[-1]"),
    ({"logit_bias": {"05": 1}}, "logit_bias[05]"),
    ({"logit_bias": {"287": 1, "288": 1}}, "logit_bias[288]"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [5, 288]}, "allowed_token_ids[1]"),
    ({"bad_words": "no"}, "bad_words"),
    ({"bad_words": ["no", ""]}, "bad_words[1]"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"detokenize": 0}, "detokenize"),
    ({"detokenize": False, "stop": "a"}, "stop"),
    ({"spaces_between_special_tokens": "no"}, "spaces_between_special_tokens"),
    ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    ({"suffix": "end"}, "suffix"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"echo": True, "logprobs": 5, "prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": True}, "prompt_logprobs"),
    ({"echo": True, "max_tokens": 0, "temperature": -1}, "temperature"),
    ({"echo": True, "max_tokens": 0, "prompt": ""}, "prompt"),
    ({"echo": True, "max_tokens": 0, "prompt": [[40], [288]]}, "prompt[1][0]"),
    ({"echo": True, "max_tokens": 0, "prompt": "a" * 600}, "prompt"),
    ({"chat_template": "x"}, "chat_template"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"use_beam_search": 1}, "use_beam_search"),
    ({"use_beam_search": True, "n": 11}, "n"),
    ({"use_beam_search": True, "best_of": 11}, "best_of"),
    ({"use_beam_search": True, "temperature": 0.7}, "temperature"),
    ({"use_beam_search": True, "top_p": 0.9}, "top_p"),
    ({"use_beam_search": True, "stop": "a"}, "stop"),
    ({"use_beam_search": True, "response_format": {"type": "json_object"}}, "response_format"),
    ({"use_beam_search": True, "n": 10, "stop_token_ids": [*range(20, 31)]}, "n"),
    ({"length_penalty": 2}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"early_stopping": "soon", "use_beam_search": True}, "early_stopping"),
    ({"prompt": ["a"] * 17, "best_of": 128}, "best_of"),
    ({"store": True}, "store"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"metadata": {"a": 1}}, "metadata[...]"),
    ({"metadata": []}, "metadata"),
    ({"user": 3}, "user"),
    ({"temprature": 1}, "temprature"),
    ({"messages": MESSAGES}, "messages"),
]


def check(response, status, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"] and "Traceback" not in error["message"]
    assert response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(("fields", "param"), CHAT, ids=lambda value: str(value)[:40])
def test_chat(http, fields, param):
    body = {"model": "tiny", "messages": MESSAGES} | fields
    error = check(http.post("/v1/chat/completions", json=body), 400, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param"), COMPLETION, ids=lambda value: str(value)[:40])
def test_completion(http, fields, param):
    body = {"model": "tiny", "prompt": "Hello"} | fields
    error = check(http.post("/v1/completions", json=body), 400, param)
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("levels", [200, 900, 990])
def test_tools_that_are_nested_too_deeply(http, levels):
    schema = '{"a":' * levels + "1" + "}" * levels
    body = json.dumps({"messages": MESSAGES, "tools": [tool(parameters={"b": 0})]}).replace("0", schema)
    response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "nested too deeply" in response.text


def test_too_long_says_all_three_numbers(http):
    body = {"messages": MESSAGES, "max_completion_tokens": 505}
    error = check(http.post("/v1/chat/completions", json=body), 400, "max_completion_tokens")
    assert error["message"].startswith("max_completion_tokens is 505")
    assert "8 tokens" in error["message"] and "512" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_prompt_alone_too_long(http):
    body = {"messages": [{"role": "user", "content": "x" * 10_000}]}
    error = check(http.post("/v1/chat/completions", json=body), 400, "messages")
    assert "10003 tokens" in error["message"] and error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\\udc00b"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a\x00"}',
        b'{"prompt": "a"} trailing',
        b"[" * 100_000,
        b'{"a":' * 20_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_broken_json(http, body):
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert check(response, 400)["type"] == "invalid_request_error"


def test_an_error_does_not_repeat_a_name_of_100_kb(http):
    for body in ({"prompt": "a", "x" * 100_000: 1}, {"prompt": "a", "model": "x" * 100_000}):
        response = http.post("/v1/completions", json=body)
        assert response.status_code in (400, 404) and len(response.content) < 2000
        assert "xxx… (1000" in response.json()["error"]["message"]


def test_the_last_of_equal_keys_counts(http):
    body = b'{"prompt": "a", "max_tokens": "many", "max_tokens": 3}'
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.json()["usage"]["completion_tokens"] == 3


def test_content_type(http):
    body = json.dumps({"prompt": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        check(http.post("/v1/completions", content=body, headers={"content-type": kind}), 415)
    kind = "application/json; charset=utf-8"
    assert http.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == 200


def test_unknown_model_and_route_and_method(http):
    error = check(http.post("/v1/completions", json={"model": "gpt-4", "prompt": "a"}), 404, "model")
    assert error["code"] == "model_not_found" and "tiny" in error["message"]
    check(http.post("/v1/engines"), 404)
    response = http.get("/v1/completions")
    check(response, 405)
    assert response.headers["allow"] == "POST"
    check(http.delete("/v1/models"), 405)


def test_body_limit_by_its_length_and_by_what_comes(http):
    big = json.dumps({"prompt": "a" * 300_000}).encode()
    headers = {"content-type": "application/json"}
    assert "200000" in check(http.post("/v1/completions", content=big, headers=headers), 413)["message"]
    chunks = (big[i : i + 50_000] for i in range(0, len(big), 50_000))
    check(http.post("/v1/completions", content=chunks, headers=headers), 413)


def test_a_length_that_is_announced_but_not_sent_is_refused_at_once(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 99999999999\r\n\r\n"
        )
        assert b" 413 " in sock.recv(4096)


def test_an_engine_error_is_a_500_alone_and_an_event_in_a_stream(http):
    body = {"prompt": "a<|fails|>"}
    error = check(http.post("/v1/completions", json=body), 500)
    assert error["type"] == "server_error" and "a bad token" in error["message"]
    response = http.post("/v1/completions", json=body | {"stream": True})
    *_, failed, done, end = response.text.split("\n\n")
    assert response.status_code == 200 and (done, end) == ("data: [DONE]", "")
    assert json.loads(failed.removeprefix("data: "))["error"] == error
    assert http.post("/v1/completions", json={"prompt": "fine"}).status_code == 200


def test_a_bad_prompt_in_a_batch_ends_the_others(http, journal, eventually):
    body = {"prompt": ["a", "a" * 600], "max_tokens": 400}
    check(http.post("/v1/completions", json=body), 400, "prompt[1]")
    lines = journal.read_text().split("\n")
    begun = {line.removeprefix("add ") for line in lines if line.startswith("add")}
    eventually(lambda: all(f"end {id}\n" in journal.read_text() for id in begun))
