"""The whole server and the whole AsyncEngine, with the real core and a tiny random Llama."""

import asyncio
import json
import os
import random
import signal

import openai
import pytest

from jaxserve import AsyncEngine, SamplingParams

PROMPTS = ["".join(random.Random(i).choices("abcdefgh ", k=3 + 11 * i)) for i in range(12)]
GREEDY = {"model": None, "temperature": 0, "max_tokens": 24, "logprobs": 0}


@pytest.fixture(scope="module")
def alone(real_server):
    """Each prompt's greedy tokens, asked for one by one."""
    client = openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none")
    replies = [client.completions.create(prompt=prompt, **GREEDY) for prompt in PROMPTS]
    return [reply.choices[0].logprobs.tokens for reply in replies]


async def _together(url):
    async def one(client, prompt):
        stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
        return [token async for chunk in stream for token in chunk.choices[0].logprobs.tokens]

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        return await asyncio.gather(*(one(client, prompt) for prompt in PROMPTS))


def test_concurrent_streams_give_the_same_tokens_as_alone(real_server, alone):
    assert asyncio.run(_together(real_server.url)) == alone


def test_an_engine_killed_under_load_ends_every_stream_and_serves_the_same_tokens_again(
    real_server, alone, eventually
):
    (engine,) = real_server.engine_pids()

    async def lost(client, prompt, begun):
        stream = await client.completions.create(
            prompt=prompt, stream=True, model=None, max_tokens=300, extra_body={"ignore_eos": True}
        )
        async for _ in stream:
            begun.set()

    async def load():
        async with openai.AsyncOpenAI(
            base_url=f"{real_server.url}/v1", api_key="none", max_retries=0
        ) as client:
            begun = asyncio.Event()
            streams = [asyncio.create_task(lost(client, prompt, begun)) for prompt in PROMPTS]
            await begun.wait()
            os.kill(engine, signal.SIGKILL)
            return await asyncio.gather(*streams, return_exceptions=True)

    ends = asyncio.run(asyncio.wait_for(load(), 60))
    assert all(isinstance(end, openai.APIError) and end.code == "engine_died" for end in ends)
    eventually(lambda: real_server.http.get("/ready").status_code == 200, 120)
    assert real_server.engine_pids() != [engine]
    assert 'jaxserve:engine_restarts_total{replica="0"} 1.0' in real_server.http.get("/metrics").text
    assert asyncio.run(_together(real_server.url)) == alone


def test_requests_that_are_closed_at_any_moment_leave_nothing_behind(model_dir):
    chance = random.Random(0)

    async def one(engine, i):
        params = SamplingParams(max_tokens=60, ignore_eos=True, output_kind="delta", n=1 + i % 2)
        stream = engine.generate(PROMPTS[i % len(PROMPTS)], params)
        wanted = chance.randrange(8)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen > wanted:
                break
        await stream.aclose()

    async def main():
        async with AsyncEngine(model=str(model_dir), dtype="float32", max_num_seqs=8) as engine:
            await asyncio.gather(*(one(engine, i) for i in range(40)))
            while (stats := await engine.stats())["running"] + stats["waiting"]:
                await asyncio.sleep(0.01)
            while (await engine.stats())["blocks_used"]:
                await asyncio.sleep(0.01)
            return await engine.stats()

    stats = asyncio.run(asyncio.wait_for(main(), 120))
    assert stats["blocks_used"] == 0 and stats["compiles_on_request_path"] == 0


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_beam_search(real_server, path):
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": ["Hi", "Ho"]}
    asked = {"use_beam_search": True, "best_of": 4, "max_tokens": 9, "return_token_ids": True, **prompt}

    def choices(**more):
        reply = real_server.http.post(path, json=asked | more).json()
        assert [choice["index"] for choice in reply["choices"]] == [*range(len(reply["choices"]))]
        given = sum(len(choice["token_ids"]) for choice in reply["choices"])
        assert reply["usage"]["completion_tokens"] == given
        return [choice["token_ids"] for choice in reply["choices"]]

    all_four, two = choices(n=4), choices(n=2)
    assert two == [tokens for i, tokens in enumerate(all_four) if i % 4 < 2]
    assert len({tuple(tokens) for tokens in all_four[:4]}) == 4
    greedy = real_server.http.post(
        path, json=asked | {"use_beam_search": False, "best_of": 1, "temperature": 0}
    )
    (one, *_) = choices(best_of=1)
    assert one == greedy.json()["choices"][0]["token_ids"]
    stream = real_server.http.post(path, json=asked | {"n": 2, "stream": True}).text.split("\n\n")
    assert stream[-2] == "data: [DONE]"
    streamed = [[] for _ in two]
    for line in stream[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            streamed[choice["index"]] += choice.get("token_ids") or []
    assert streamed == two
