"""OpenAI's own client against a real server whose core repeats the prompt."""

import asyncio

import openai
import pytest

HELLO = "<|user|>Hello<|end|><|assistant|>"
CHAT = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat_answers_with_usage_and_finish_reason(client):
    reply = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=6)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-") and reply.model == "tiny"
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.message.content == "Hello"
    assert choice.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (8, 6, 14)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0
    assert reply.usage.completion_tokens_details.reasoning_tokens == 0


def test_chat_without_max_tokens_goes_on_to_the_end_of_sequence(client):
    (choice,) = client.chat.completions.create(model="also-tiny", messages=CHAT).choices
    assert choice.message.content == "Hello" and choice.finish_reason == "stop"


def test_ignore_eos_goes_on_past_it(client):
    reply = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=14, extra_body={"ignore_eos": True}
    )
    assert reply.choices[0].message.content == "HelloHello" and reply.choices[0].finish_reason == "length"


def test_typed_parts_and_the_developer_role_reach_the_template(client):
    messages = [
        {"role": "developer", "content": "Be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    reply = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_tokens=9,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    assert reply.choices[0].message.content == "<|system|>Be<|end|><|user|>a\nb<|end|>"


def test_chat_stream_has_role_first_finish_once_and_no_usage_unasked(client):
    chunks = list(client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=6, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_chat_stream_usage_comes_last_with_empty_choices(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and all(chunk.choices for chunk in chunks[:-1])
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (8, 6)


def test_continuous_usage_counts_up(client):
    stream = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_tokens=6,
        stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts == sorted(counts) and counts[-1] == 6 and counts[0] < 6


def test_n_gives_choices_and_counts_the_prompt_once(client):
    reply = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=6, n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (8, 18)


def test_n_streamed_has_a_role_and_an_end_for_each(client):
    chunks = list(client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=6, n=2, stream=True))
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == "length"
        assert "".join(choice.delta.content or "" for choice in mine) == "Hello"


def test_stop_string_across_tokens_ends_and_is_not_shown(client):
    for stream in (False, True):
        reply = client.completions.create(
            model="tiny", prompt="one two", stop="e t", max_tokens=50, stream=stream
        )
        parts = list(reply) if stream else [reply]
        assert "".join(part.choices[0].text for part in parts) == "on"
        assert parts[-1].choices[0].finish_reason == "stop"


def test_stop_token_ids(client):
    reply = client.completions.create(
        model="tiny", prompt=[40, 41, 42], max_tokens=9, extra_body={"stop_token_ids": [41]}
    )
    assert reply.choices[0].finish_reason == "stop"


def test_chat_logprobs(client):
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "é"}], max_tokens=3, logprobs=True, top_logprobs=2
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 3
    assert bytes(content[1].bytes + content[2].bytes) == "é".encode()
    assert content[1].logprob == -0.5 and len(content[1].top_logprobs) == 2


def test_chat_logprobs_streamed_line_up_with_the_tokens(client):
    stream = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=6, logprobs=True, stream=True
    )
    entries = [
        entry for chunk in stream if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in entries[1:]] == list("Hello")
    assert all(entry.top_logprobs == [] for entry in entries)


def test_completion_defaults_to_16_tokens(client):
    reply = client.completions.create(model="tiny", prompt="ab")
    assert reply.object == "text_completion" and reply.choices[0].text == "ab" * 8
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (2, 16)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([40, 41], None),
        ([[40, 41], [50]], None),
    ],
)
def test_completion_prompt_forms(client, prompt, texts):
    reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
    batch = isinstance(prompt[0], str | list) and not isinstance(prompt, str)
    assert [choice.index for choice in reply.choices] == list(range(len(prompt) if batch else 1))
    if texts:
        assert [choice.text for choice in reply.choices] == texts


def test_completion_batch_with_n_numbers_choices_by_prompt(client):
    reply = client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, max_tokens=2)
    assert [choice.text for choice in reply.choices] == ["ab", "ab", "cd", "cd"]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 8)


def test_completion_batch_streamed(client):
    texts = ["", ""]
    for chunk in client.completions.create(model="tiny", prompt=["abc", "xyz"], max_tokens=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["abc", "xyz"]


@pytest.mark.parametrize("streamed", [True, False])
def test_completion_logprobs_offsets_point_into_the_text(client, streamed):
    reply = client.completions.create(
        model="tiny", prompt="xéy", max_tokens=5, logprobs=0, stream=streamed, stop="never"
    )
    choices = [part.choices[0] for part in (reply if streamed else [reply])]
    assert "".join(choice.text for choice in choices) == "xéyx"
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert offsets == [0, 1, 1, 2, 3]  # é is two tokens


def test_completion_logprobs_offsets_go_on_over_a_stream(client):
    stream = client.completions.create(model="tiny", prompt="abc", max_tokens=5, logprobs=1, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2, 3, 4]
    assert [token for part in parts for token in part.tokens] == list("abcab")
    assert all(len(top) <= 2 for part in parts for top in part.top_logprobs)


def test_async_client_streams_many_at_once(server):
    async def one(client, i):
        stream = await client.completions.create(
            model="tiny", prompt=f"prompt {i}!", max_tokens=40, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, i) for i in range(32)))

    for i, text in enumerate(asyncio.run(all_of_them())):
        assert text == (f"prompt {i}!" * 9)[:40]


def test_models(client, http):
    cards = client.models.list().data
    assert [card.id for card in cards] == ["tiny", "also-tiny"] and cards[0].max_model_len == 512
    assert client.models.retrieve("also-tiny").id == "also-tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nope")
    assert error.value.code == "model_not_found"


def test_langchains_defaults_ask_for_nothing(client):
    reply = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        max_completion_tokens=6,
        n=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        user="me",
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        parallel_tool_calls=True,
        tool_choice="none",
        verbosity="low",
        prompt_cache_key="k",
        safety_identifier="s",
        extra_body={"reasoning_effort": None, "min_tokens": 0},
    )
    assert reply.choices[0].message.content == "Hello"
