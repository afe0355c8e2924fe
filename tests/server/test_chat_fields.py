"""Fields of chat and completions about the prompt: OpenAI's client, and a core that repeats the prompt."""

import json

import openai
import pytest

USER = {"role": "user", "content": "Hello"}
SHOWN = {"ignore_eos": True, "skip_special_tokens": False}


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def render(http):
    def render(*messages, **fields):
        response = http.post("/v1/chat/completions/render", json={"messages": messages, **fields})
        assert response.status_code == 200, response.text
        return response.json()["prompt"]

    return render


def test_continuing_the_last_message(render):
    started = {"role": "assistant", "content": "Well, "}
    assert render(USER, started, continue_final_message=True) == "<|user|>Hello<|end|><|assistant|>Well, "
    assert render(USER, add_generation_prompt=False) == "<|user|>Hello<|end|>"


def test_refusals_are_text(render):
    parts = [{"type": "text", "text": "I"}, {"type": "refusal", "refusal": "won't"}]
    assert render(USER, {"role": "assistant", "content": parts}).endswith(
        "<|assistant|>I\nwon't<|end|><|assistant|>"
    )
    refused = {"role": "assistant", "content": None, "refusal": "no"}
    assert "<|assistant|>no<|end|>" in render(USER, refused)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "refusal"])
def test_other_parts_are_refused_and_it_is_told_which_are_not(http, role, kind):
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: "b" if kind == "refusal" else {}}]
    last = {"role": role, "content": parts} | ({"tool_call_id": "1"} if role == "tool" else {})
    answer = http.post("/v1/chat/completions/render", json={"messages": [USER, last]})
    if (role, kind) == ("assistant", "refusal"):
        assert answer.status_code == 200
        return
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "messages[1].content[1].type"
    supported = "text or refusal" if role == "assistant" else "text"
    assert error["message"].endswith(f"parts of this message must be {supported}, not {kind!r}")


def test_rendering_is_what_a_chat_runs_on(client, http):
    body = {"messages": [USER], "max_tokens": 5, "temperature": 0.5}
    rendered = http.post("/v1/chat/completions/render", json=body).json()
    assert rendered["prompt"] == "<|user|>Hello<|end|><|assistant|>"
    reply = client.chat.completions.create(
        model="tiny", messages=[USER], extra_body={"return_token_ids": True}
    )
    assert reply.prompt_token_ids == rendered["prompt_token_ids"]
    refused = http.post("/v1/chat/completions/render", json=body | {"temperature": -1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize("n", [1, 2])
def test_chat_echo_repeats_the_last_message(client, n):
    last = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    asked = {"model": "tiny", "messages": [USER, last], "max_tokens": 6, "n": n, "extra_body": {"echo": True}}
    reply = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in reply.choices] == ["a\nbHello"] * n
    assert reply.usage.completion_tokens == 6 * n
    texts = [""] * n
    roles = [0] * n
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        roles[choice.index] += choice.delta.role is not None
        texts[choice.index] += choice.delta.content or ""
    assert (texts, roles) == (["a\nbHello"] * n, [1] * n)


def test_echo_and_continuing_give_the_whole_message(client):
    messages = [USER, {"role": "assistant", "content": "Well, "}]
    reply = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=6,
        extra_body={"echo": True, "continue_final_message": True},
    )
    assert reply.choices[0].message.content == "Well, Hello"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [["ab", "cd"], [[103, 104], [105, 106]]])
def test_completion_echo(client, http, prompt, stream):
    reply = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=2, n=2, stream=stream, extra_body={"echo": True}
    )
    texts = [""] * 4
    for part in reply if stream else [reply]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    given = [text if isinstance(text, str) else _text(http, text) for text in prompt]
    assert texts == [given[0] * 2] * 2 + [given[1] * 2] * 2


def _text(http, tokens):
    return http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_costs_no_token_and_runs_nothing(client, journal, stream):
    before = journal.read_text()
    reply = client.completions.create(
        model="tiny",
        prompt=["ab", "c" * 512],
        n=2,
        max_tokens=0,
        stream=stream,
        extra_body={"echo": True, "return_token_ids": True},
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    parts = list(reply) if stream else [reply]
    choices = [choice for part in parts for choice in part.choices]
    assert [choice.text for choice in choices] == ["ab"] * 2 + ["c" * 512] * 2
    assert {choice.finish_reason for choice in choices} == {"length"}
    assert [len(choice.prompt_token_ids) for choice in choices] == [2, 2, 512, 512]
    assert all(choice.token_ids == [] for choice in choices)
    assert (parts[-1].usage.prompt_tokens, parts[-1].usage.completion_tokens) == (514, 0)
    assert journal.read_text() == before


@pytest.mark.parametrize("count", [1, 4])  # the first has no text
@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_a_chat(client, stream, count):
    asked = {"model": "tiny", "messages": [USER], "max_tokens": count, "n": 2, "stream": stream}
    reply = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    parts = list(reply) if stream else [reply]
    prompts = [part.prompt_token_ids for part in parts if hasattr(part, "prompt_token_ids")]
    assert len(prompts) == (2 if stream else 1) and all(len(prompt) == 8 for prompt in prompts)
    tokens = [[], []]
    for part in parts:
        for choice in part.choices:
            tokens[choice.index] += getattr(choice, "token_ids", None) or []
    assert tokens == [prompts[0][:count]] * 2
    plain = (
        list(client.chat.completions.create(**asked)) if stream else [client.chat.completions.create(**asked)]
    )
    assert "token_ids" not in plain[0].to_json()


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids_of_completions(client, stream):
    reply = client.completions.create(
        model="tiny",
        prompt=[[40, 41], [50]],
        max_tokens=3,
        stream=stream,
        extra_body={"return_token_ids": True},
    )
    prompts, tokens = [[], []], [[], []]
    for part in reply if stream else [reply]:
        for choice in part.choices:
            prompts[choice.index] += getattr(choice, "prompt_token_ids", None) or []
            tokens[choice.index] += choice.token_ids
    assert prompts == [[40, 41], [50]] and tokens == [[40, 41, 40], [50, 50, 50]]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_request_id_is_the_answers_name(http, path, stream):
    prompt = {"messages": [USER]} if "chat" in path else {"prompt": "a"}
    body = {"request_id": "mine-1", "max_tokens": 1, "stream": stream, **prompt}
    response = http.post(path, json=body, headers={"x-request-id": "theirs"})
    assert response.headers["x-request-id"] == "mine-1"
    assert '"id":"chatcmpl-mine-1"' in response.text or '"id":"cmpl-mine-1"' in response.text
    refused = http.post(path, json=body | {"temperature": -1})
    assert refused.status_code == 400 and refused.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_that_is_truncated(http, path):
    prompt = (
        {"messages": [{"role": "user", "content": "x" * 10_000}]} if "chat" in path else {"prompt": "ab" * 9}
    )
    keep = 3 if "chat" in path else 5
    body = {"truncate_prompt_tokens": keep, "max_tokens": 2, "return_token_ids": True, **prompt}
    reply = http.post(path, json=body).json()
    prompt = reply.get("prompt_token_ids") or reply["choices"][0]["prompt_token_ids"]
    assert len(prompt) == keep == reply["usage"]["prompt_tokens"]
    assert reply["choices"][0]["token_ids"] == prompt[:2]
    rest = http.post(path, json=body | {"truncate_prompt_tokens": -1, "max_tokens": 510}).json()
    assert rest["usage"]["prompt_tokens"] == 2


def test_a_text_of_any_length_can_be_truncated(launch, model_dir):
    with launch({"max_body_size": 4_000_000}).wait_ready().http as http:
        body = {"prompt": "a" * 3_000_000, "max_tokens": 1}
        assert http.post("/v1/completions", json=body).json()["error"]["code"] == "context_length_exceeded"
        for more in ({}, {"add_special_tokens": False}, {"echo": True, "max_tokens": 0}):
            kept = http.post("/v1/completions", json=body | {"truncate_prompt_tokens": 7} | more)
            assert kept.json()["usage"]["prompt_tokens"] == 7


def test_echo_and_rendering_show_what_was_kept(http):
    for more in ({"max_tokens": 1}, {"max_tokens": 0}):
        body = {"prompt": "abcdef", "echo": True, "truncate_prompt_tokens": 2, **more}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"].startswith("ef")
    rendered = http.post(
        "/v1/chat/completions/render", json={"messages": [USER], "truncate_prompt_tokens": 3}
    )
    assert len(rendered.json()["prompt_token_ids"]) == 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_best_of_gives_n_and_counts_all(http, path):
    prompt = {"messages": [USER]} if "chat" in path else {"prompt": ["Hi", "Ho"]}
    prompts = 1 if "chat" in path else 2
    reply = http.post(path, json={"n": 2, "best_of": 5, "max_tokens": 3, **prompt}).json()
    assert [choice["index"] for choice in reply["choices"]] == [*range(2 * prompts)]
    assert all(choice["logprobs"] is None for choice in reply["choices"])
    assert reply["usage"]["completion_tokens"] == 3 * 5 * prompts
    streamed = http.post(path, json={"n": 2, "best_of": 2, "max_tokens": 3, "stream": True, **prompt})
    assert streamed.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_without_text_there_are_still_tokens(http, path, stream):
    prompt = {"messages": [USER]} if "chat" in path else {"prompt": "Hello"}
    body = {"detokenize": False, "return_token_ids": True, "max_tokens": 4, "stream": stream, **prompt}
    answer = http.post(path, json=body)
    lines = answer.text.split("\n\n")[:-2] if stream else [answer.text]
    choices = [choice for line in lines for choice in json.loads(line.removeprefix("data: "))["choices"]]
    said = [
        choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")
        for choice in choices
    ]
    assert not any(said)
    assert sum(len(choice.get("token_ids") or []) for choice in choices) == 4


def test_tokens_as_token_ids(http):
    asked = {"max_tokens": 2, "return_tokens_as_token_ids": True}
    chat = http.post(
        "/v1/chat/completions", json={"messages": [USER], "logprobs": True, "top_logprobs": 2, **asked}
    ).json()
    tokens = http.post("/v1/chat/completions/render", json={"messages": [USER]}).json()["prompt_token_ids"]
    content = chat["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{token}" for token in tokens[:2]]
    top = [entry["token"] for entry in content[0]["top_logprobs"]]
    assert top == ["token_id:10", f"token_id:{tokens[0]}"]
    assert bytes(content[0]["bytes"]).decode() == "<|user|>"
    reply = http.post("/v1/completions", json={"prompt": [40, 41], "logprobs": 2, **asked}).json()
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:40", "token_id:41"]
    assert logprobs["top_logprobs"][0].keys() == {"token_id:40", "token_id:10"}
