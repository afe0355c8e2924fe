import asyncio

import pytest

from jaxserve.errors import EngineDied, InvalidRequest
from jaxserve.server import sse
from jaxserve.server.protocol import WRITE


def send_all(produce, scope=None):
    """What an EventStream of `produce` sends, as one text."""
    sent = []

    async def send(message):
        sent.append(message)

    async def main():
        response = await sse.event_stream(produce)
        await response(scope or {}, None, send)

    asyncio.run(main())
    assert [m["type"] for m in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
    assert [m["more_body"] for m in sent[1:]] == [True] * (len(sent) - 2) + [False]
    return b"".join(m["body"] for m in sent[1:]).decode()


def quiet_then(seconds, *events):
    async def produce(stream):
        await asyncio.sleep(seconds)
        stream.write(*events)

    return produce


def test_events_end_with_done():
    assert send_all(quiet_then(0, b"1", b"2")) == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"


def test_comments_while_it_is_quiet(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.05)
    comments, _, rest = send_all(quiet_then(0.5, b"1")).partition("data: ")
    assert rest == "1\n\ndata: [DONE]\n\n"
    assert len(comments.split("\n\n")) > 2 and set(comments.split("\n\n")) == {": keep-alive", ""}


def test_no_comments_beside_events_that_take_the_short_way(monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE_SECONDS", 0.3)

    async def produce(stream):
        for _ in range(30):
            stream.write(b"1")
            await asyncio.sleep(0.02)

    scope = {"extensions": {WRITE: lambda data: True}}
    assert send_all(produce, scope) == "data: 1\n\ndata: [DONE]\n\n"


def test_nothing_is_not_sent():
    """An empty chunk would end the body."""
    sent = []

    async def produce(stream):
        stream.write(b"1")
        await asyncio.sleep(0.02)
        stream.write()
        stream.write(b"2")

    scope = {"extensions": {WRITE: lambda data: sent.append(data) or True}}
    assert send_all(produce, scope) == "data: 1\n\ndata: [DONE]\n\n"
    assert sent == [b"data: 2\n\n"]


def test_an_error_before_the_first_event_is_raised():
    async def produce(stream):
        raise InvalidRequest("no", "prompt")

    with pytest.raises(InvalidRequest):
        send_all(produce)


def test_an_error_later_is_an_event():
    async def produce(stream):
        stream.write(b"1")
        raise EngineDied("gone")

    first, error, done, _ = send_all(produce).split("\n\n")
    assert (first, done) == ("data: 1", "data: [DONE]")
    assert error.startswith('data: {"error":{"message":"gone"')


def test_the_work_is_cancelled_when_the_client_goes_away():
    closed = []

    async def produce(stream):
        try:
            while True:
                stream.write(b"1")
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
        response = await sse.event_stream(produce)
        task = asyncio.create_task(response({}, None, send))
        while len(received) < 5:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(main())
    assert closed == [True]


def test_order_whichever_way_events_take():
    """A connection that now keeps up and now does not, while what was held is on its way."""
    keeps_up, out = [True], []

    def write_now(data):
        if keeps_up[0]:
            out.append(data)
        return keeps_up[0]

    async def send(message):
        await asyncio.sleep(0.001)
        out.append(message.get("body", b""))

    async def produce(stream):
        for i in range(200):
            keeps_up[0] = i % 20 < 10
            stream.write(b"%d" % i)
            if i % 3:
                await asyncio.sleep(0.0005 * (i % 5))

    async def main():
        response = await sse.event_stream(produce)
        await response({"extensions": {WRITE: write_now}}, None, send)

    asyncio.run(main())
    numbers = [*range(200)]
    assert b"".join(out) == b"".join(b"data: %d\n\n" % i for i in numbers) + b"data: [DONE]\n\n"
    assert any(data.count(b"\n\n") > 1 for data in out), "some were held and sent together"


def test_one_write_for_all_that_one_step_gives_and_no_task_for_it():
    """Events of a stream under way reach the connection in the turn in which they are written."""
    out, turns = [], []

    def write_now(data):
        out.append(data)
        return True

    async def send(message):
        pass

    async def produce(stream):
        stream.write(b"1")
        await stream.taken()
        stream.write(b"2", b"3")
        turns.append(list(out))

    async def main():
        response = await sse.event_stream(produce)
        await response({"extensions": {WRITE: write_now}}, None, send)

    asyncio.run(main())
    assert turns == [[b"data: 2\n\ndata: 3\n\n"]]
