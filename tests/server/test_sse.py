import asyncio

import pytest

from jaxserve.errors import EngineDied, InvalidRequest
from jaxserve.server import sse


def send_all(events):
    """What an EventStream of `events` sends, as one text."""
    sent = []

    async def send(message):
        sent.append(message)

    async def main():
        response = await sse.event_stream(events)
        await response({}, None, send)

    asyncio.run(main())
    assert [m["type"] for m in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    assert [m["more_body"] for m in sent[1:]] == [True] * (len(sent) - 2) + [False]
    return b"".join(m["body"] for m in sent[1:]).decode()


async def quiet_then(seconds, *events):
    await asyncio.sleep(seconds)
    for event in events:
        yield event


def test_events_end_with_done():
    assert send_all(quiet_then(0, b"1", b"2")) == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


def test_comments_while_it_is_quiet(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.05)
    comments, _, rest = send_all(quiet_then(0.5, b"1")).partition("data: ")
    assert rest == "1\n\ndata: [DONE]\n\n"
    assert comments and set(comments.split("\n\n")) == {": keep-alive", ""}


def test_an_error_before_the_first_event_is_raised():
    async def events():
        raise InvalidRequest("no", "prompt")
        yield b""

    with pytest.raises(InvalidRequest):
        send_all(events())


def test_an_error_later_is_an_event():
    async def events():
        yield b"1"
        raise EngineDied("gone")

    first, error, done, _ = send_all(events()).split("\n\n")
    assert (first, done) == ("data: 1", "data: [DONE]")
    assert error.startswith('data: {"error":{"message":"gone"')


def test_events_are_closed_when_the_client_goes_away():
    closed = []

    async def events():
        try:
            while True:
                yield b"1"
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    async def main():
        async def send(message):
            if len(sent := received) < 5:
                sent.append(message)
            else:
                await asyncio.sleep(60)

        received = []
        response = await sse.event_stream(events())
        task = asyncio.create_task(response({}, None, send))
        while len(received) < 5:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(main())
    assert closed == [True]
