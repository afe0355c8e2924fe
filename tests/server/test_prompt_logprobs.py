"""Logprobs of prompts over HTTP: `prompt_logprobs`, and `echo` with `logprobs`."""

import math

import openai
import pytest

from jaxserve import Engine, SamplingParams


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def complete(client, prompt, stream=False, **asked):
    """Each choice's texts and logprobs joined, and the last part's usage."""
    known = {name: asked.pop(name) for name in ("n", "logprobs", "max_tokens") if name in asked}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    reply = client.completions.create(
        model="tiny", prompt=prompt, stream=stream, extra_body=asked, **known, **options
    )
    joined: dict[int, dict] = {}
    for part in reply if stream else [reply]:
        usage = part.usage
        for choice in part.choices:
            found = joined.setdefault(choice.index, {"text": "", "extra": choice.model_extra})
            found["text"] += choice.text
            found["finish_reason"] = choice.finish_reason
            if choice.logprobs:
                for name, values in choice.logprobs.model_dump().items():
                    found.setdefault(name, []).extend(values or [])
    return [joined[i] for i in sorted(joined)], usage


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_tells_of_prompt_and_output(client, stream):
    choices, usage = complete(client, "xéy", stream, echo=True, logprobs=1, max_tokens=3, n=2)
    assert len(choices) == 2 and (usage.prompt_tokens, usage.completion_tokens) == (4, 6)
    for choice in choices:
        assert choice["text"] == "xéyxé"  # it repeats the prompt, token by token
        assert choice["tokens"] == ["x", "\ufffd", "\ufffd", "y", "x", "\ufffd", "\ufffd"]
        assert choice["token_logprobs"] == [None, -0.125, -0.25, -0.375] + [-0.5] * 3
        assert choice["text_offset"] == [0, 1, 1, 2, 3, 4, 4]
        assert choice["top_logprobs"][0] is None
        assert [top[token] for token, top in zip("yx", choice["top_logprobs"][3:5], strict=True)] == [
            -0.375,
            -0.5,
        ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", [["ab", "cde"], [[40, 41], [42, 43, 44]]])
def test_echo_alone_with_logprobs_costs_no_token(client, stream, prompt):
    choices, usage = complete(client, prompt, stream, echo=True, logprobs=0, max_tokens=0)
    assert [choice["token_logprobs"] for choice in choices] == [[None, -0.125], [None, -0.125, -0.25]]
    assert [choice["text_offset"] for choice in choices] == [[0, 1], [0, 1, 2]]
    assert [choice["text"] for choice in choices] == ["".join(choice["tokens"]) for choice in choices]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 0)


def test_prompt_logprobs_alone_are_no_logprobs(client):
    asked = {"model": "tiny", "prompt": "ab", "max_tokens": 0}
    reply = client.completions.create(**asked, extra_body={"echo": True, "prompt_logprobs": 0})
    (choice,) = reply.choices
    assert choice.logprobs is None and len(choice.prompt_logprobs) == 2
    assert (choice.text, reply.usage.completion_tokens) == ("ab", 0)


def test_special_tokens_that_are_written_are_a_part_of_the_text(client):
    (choice,), _ = complete(client, "<|user|>a", echo=True, logprobs=0, max_tokens=2)
    assert choice["text"] == "<|user|>aa" and choice["tokens"] == ["<|user|>", "a"] * 2
    assert choice["text_offset"] == [0, 8, 9, 9]
    (choice,), _ = complete(client, [2, 40], echo=True, logprobs=0, max_tokens=1)
    assert choice["text_offset"] == [0, 0, 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_prompt_logprobs_of_a_completion(client, stream, echo):
    more = {"logprobs": 2, "echo": True} if echo else {}
    choices, _ = complete(client, ["ab", "ac"], stream, prompt_logprobs=1, max_tokens=2, **more)
    for choice, letter in zip(choices, "bc", strict=True):
        first, second = choice["extra"]["prompt_logprobs"]
        assert first is None
        own, other = second.values()
        assert own == {"logprob": -0.125, "rank": 1, "decoded_token": letter}
        assert list(second)[1] == "10" and other["rank"] == 1


def test_tokens_as_ids(client):
    (choice,), _ = complete(
        client, "ab", echo=True, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True
    )
    assert all(token.startswith("token_id:") for token in choice["tokens"])
    assert choice["top_logprobs"][1].keys() == {choice["tokens"][1], "token_id:10"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_prompt_logprobs_of_a_chat_are_told_once(client, stream, ids):
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=2,
        n=2,
        stream=stream,
        extra_body={"prompt_logprobs": 0, "return_token_ids": ids},
    )
    parts = list(reply) if stream else [reply]
    (told,) = [part.prompt_logprobs for part in parts if hasattr(part, "prompt_logprobs")]
    assert told == parts[0].prompt_logprobs and told[0] is None
    texts = [entry["decoded_token"] for step in told[1:] for entry in step.values()]
    assert texts == ["H", "i", "<|end|>", "<|assistant|>"]


@pytest.fixture
def real(real_server):
    client = openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0)
    return client, client.models.list().data[0].id


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_of_a_chat_are_in_order_and_spell_its_text(real, stream, temperature):
    client, model = real
    reply = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hé"}],
        max_tokens=24,
        logprobs=True,
        top_logprobs=5,
        temperature=temperature,
        seed=7,
        stream=stream,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    parts = [part.choices[0] for part in reply] if stream else reply.choices
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    text = "".join((part.delta.content if stream else part.message.content) or "" for part in parts)
    assert len(entries) == 24
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == text
    for entry in entries:
        told = [top.logprob for top in entry.top_logprobs]
        assert len(told) == 5 and told == sorted(told, reverse=True)
        assert sum(map(math.exp, told)) <= 1 + 1e-5
        assert entry.logprob == told[0] or (temperature and entry.logprob <= told[0])
        spelled = [bytes(top.bytes) for top in entry.top_logprobs if top.bytes]  # some ids have no text here
        assert len(set(spelled)) == len(spelled)
        for top in entry.top_logprobs:
            assert not top.bytes or top.bytes != entry.bytes or top.logprob == entry.logprob


def test_tokens_have_as_part_of_a_prompt_the_logprobs_that_they_were_chosen_with(real):
    client, model = real
    asked = {"model": model, "temperature": 1.0, "seed": 3, "logprobs": 3}
    chosen = client.completions.create(
        prompt=[40, 41, 42], max_tokens=70, extra_body={"return_token_ids": True, "ignore_eos": True}, **asked
    ).choices[0]
    whole = [40, 41, 42, *chosen.token_ids]
    scored = client.completions.create(prompt=whole, max_tokens=0, extra_body={"echo": True}, **asked)
    again = scored.choices[0]
    assert again.logprobs.token_logprobs[3:] == pytest.approx(chosen.logprobs.token_logprobs, abs=1e-4)
    assert again.logprobs.tokens[3:] == chosen.logprobs.tokens
    for one, other in zip(again.logprobs.top_logprobs[3:], chosen.logprobs.top_logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_loglikelihoods_as_evaluations_read_them(real, model_dir):
    """What lm-evaluation-harness sends, prompts of token ids and one token more, and how it adds up."""
    texts = [("The sky is", " blue"), ("1 + 1", " = 2"), ("a", "b")]
    client, model = real
    with Engine(str(model_dir), dtype="float32", num_blocks=64, max_num_seqs=8) as engine:
        pairs = [tuple(map(engine.tokenizer.encode, pair)) for pair in texts]
        prompts = [context + more for context, more in pairs]
        scored = engine.generate(prompts, SamplingParams(prompt_logprobs=0, max_tokens=1), use_progress=False)
    asked = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "seed": 1234, "temperature": 0}
    for _ in range(2):  # the second time with all of it in the prefix cache
        reply = client.completions.create(model=model, extra_body={"echo": True}, **asked)
        for choice, (context, more), output in zip(reply.choices, pairs, scored, strict=True):
            logprobs = choice.logprobs
            at = slice(len(context), -1)
            assert len(logprobs.token_logprobs) == len(context + more) + 1
            greedy = all(
                own == max(top.values())
                for own, top in zip(logprobs.token_logprobs[at], logprobs.top_logprobs[at], strict=True)
            )
            entries = [
                entry[token]
                for token, entry in zip(more, output.prompt_logprobs[len(context) :], strict=True)
            ]
            assert sum(logprobs.token_logprobs[at]) == pytest.approx(
                sum(entry.logprob for entry in entries), abs=1e-4
            )
            assert greedy == all(entry.rank == 1 for entry in entries)
