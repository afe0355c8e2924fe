"""Server-sent events: `data:` lines, comments while it is quiet, errors inside the stream."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.server.errors import as_api_error

KEEP_ALIVE_SECONDS = 10.0
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or a reverse proxy holds events back
}


class EventStream(Response):
    """Sends each JSON text of `events` as one event, then `[DONE]`."""

    def __init__(self, events: AsyncGenerator[bytes], first: asyncio.Future[bytes]):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._events = events
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        sent = clock()

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal sent
            sent = clock()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(sent + KEEP_ALIVE_SECONDS - clock())
                if clock() >= sent + KEEP_ALIVE_SECONDS:
                    await write(b": keep-alive\n\n")

        comments = asyncio.create_task(keep_alive())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await write(_event(await self._first))
            async for event in self._events:
                await write(_event(event))
        except Exception as error:
            await write(_event(as_api_error(error).encode()))
        finally:
            comments.cancel()
            await _close(self._events, self._first)
        await write(b"data: [DONE]\n\n", more=False)


async def event_stream(events: AsyncGenerator[bytes]) -> EventStream:
    """The response for `events`, begun once there is one: what fails before is a plain HTTP error.

    A client that has waited for a while gets the headers, and then comments, all the same.
    """
    first = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({first}, timeout=KEEP_ALIVE_SECONDS)
        if first.done():
            first.result()
    except BaseException:
        await _close(events, first)
        raise
    return EventStream(events, first)


async def _close(events: AsyncGenerator[bytes], first: asyncio.Future[bytes]) -> None:
    first.cancel()
    await asyncio.wait({first})
    await events.aclose()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
