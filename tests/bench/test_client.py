"""The client against a server that behaves, and misbehaves, as its URL says."""

import asyncio

import pytest

aiohttp = pytest.importorskip("aiohttp")

from jaxserve.bench import client  # noqa: E402
from jaxserve.bench.client import Client  # noqa: E402
from jaxserve.bench.workload import Ask  # noqa: E402


def send(fake, manner, endpoint="completions", tokens=5, timeout=30.0, **extra):
    """The record of one request."""

    async def go():
        limits = aiohttp.ClientTimeout(total=timeout)
        async with aiohttp.ClientSession(timeout=limits) as http:
            one = Client(http, f"{fake.url}/{manner}", endpoint, "m", extra)
            return await one.send(Ask("a prompt", 2, tokens), begin=0.0)

    return asyncio.run(go())


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
@pytest.mark.parametrize("manner", ["ok", "crlf", "pieces", "no-usage"])
def test_every_token_is_timed(fake, manner, endpoint):
    record = send(fake, manner, endpoint)
    assert record.error is None
    assert len(record.times) == 5  # neither the role nor the end of a chat is a token
    assert record.times == sorted(record.times)
    assert 0 < record.times[0] < record.times[-1] <= record.end
    counted = (None, None) if manner == "no-usage" else (11, 5)
    assert (record.prompt_tokens, record.output_tokens) == counted
    assert record.tokens == 5


def test_several_tokens_in_an_event_are_counted_by_the_server(fake):
    record = send(fake, "pairs", tokens=6)
    assert (len(record.times), record.tokens) == (3, 6)


def test_an_answer_that_is_not_streamed_counts_too(fake):
    record = send(fake, "whole")
    assert record.error is None
    assert (len(record.times), record.tokens, record.prompt_tokens) == (1, 5, 11)


def test_what_is_asked(fake):
    send(fake, "ok", "completions", 7, temperature=0.5)
    _, body = fake.seen[-1]
    assert body == {
        "model": "m",
        "prompt": "a prompt",
        "max_tokens": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
    }
    send(fake, "ok", "chat")
    assert fake.seen[-1][1]["messages"] == [{"role": "user", "content": "a prompt"}]


@pytest.mark.parametrize(
    ("manner", "kind", "said"),
    [
        ("400", "HTTP 400", "no: 400"),
        ("503", "HTTP 503", "no: 503"),
        ("error", "error in the stream", "it broke"),
        ("garbage", "no JSON", "{"),
        ("cut", "disconnected", ""),
        ("ends", "disconnected", "before it was finished"),
        ("leaves", "disconnected", ""),
        ("hangs", "timeout", ""),
    ],
)
def test_what_goes_wrong_has_a_kind(fake, manner, kind, said):
    record = send(fake, manner, timeout=1.0 if manner == "hangs" else 30.0)
    assert record.error == kind
    assert said in record.detail


def test_nobody_there(fake):
    async def go():
        async with aiohttp.ClientSession() as http:
            return await Client(http, "http://127.0.0.1:9", "chat", "m", {}).send(Ask("p", 1, 1), 0.0)

    assert asyncio.run(go()).error == "cannot connect"


def loop(fake, run):
    async def go():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
            return await run(Client(http, f"{fake.url}/ok", "completions", "m", {}))

    return asyncio.run(go())


def asks(count):
    return [Ask(f"p{i}", 1, 3) for i in range(count)]


def test_a_closed_loop_keeps_so_many_at_once(fake):
    fake.most_at_once = 0
    records = loop(fake, lambda c: client.closed_loop(c, asks(20), 4, None))
    assert [r.error for r in records] == [None] * 20
    assert fake.most_at_once == 4


def test_a_closed_loop_ends_with_its_time(fake):
    endless = iter(lambda: Ask("p", 1, 3), None)
    records = loop(fake, lambda c: client.closed_loop(c, endless, 2, 0.2))
    assert len(records) >= 4
    assert all(record.start < 0.2 for record in records)


def test_an_open_loop_does_not_wait(fake):
    due = [0.001 * i for i in range(10)]
    fake.most_at_once = 0
    records = loop(fake, lambda c: client.open_loop(c, asks(10), due, None, None))
    assert [record.start for record in records] == pytest.approx(due)
    assert fake.most_at_once > 3


def test_an_open_loop_times_from_when_a_request_was_due(fake):
    """With room for one at a time the last of several waits for all others, and that counts."""
    records = loop(fake, lambda c: client.open_loop(c, asks(5), [0.0] * 5, 1, None))
    firsts = [record.times[0] for record in records]
    lasts = [record.end for record in records]
    assert all(late > done for late, done in zip(firsts[1:], lasts, strict=False))


def test_an_open_loop_ends_with_its_time(fake):
    records = loop(fake, lambda c: client.open_loop(c, asks(9), [0.0, 0.01, 5.0], None, 1.0))
    assert len(records) == 2


def test_a_server_that_closes_the_connection_after_each_stream():
    """Without saying so ahead, as llama.cpp does: the next request finds it closed, and is sent again."""
    event = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(event)
    asked = 0

    async def answer(reader, writer):
        nonlocal asked
        await reader.readuntil(b'"stream"')
        asked += 1
        writer.write(head + event)
        writer.close()

    async def go():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, aiohttp.ClientSession() as http:
            one = Client(http, f"http://127.0.0.1:{port}", "completions", "m", {})
            return [await one.send(Ask("a prompt", 2, 1), begin=0.0) for _ in range(5)]

    assert [record.error for record in asyncio.run(go())] == [None] * 5
    assert asked == 5
