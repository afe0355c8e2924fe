"""Server-sent events: `data:` lines, comments while it is quiet, errors inside the stream."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.server.errors import as_api_error
from jaxserve.server.protocol import WRITE

KEEP_ALIVE_SECONDS = 10.0
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or a reverse proxy holds events back
}


class EventStream(Response):
    """Sends what `produce(stream)` gives to `write`, then `[DONE]`.

    What is written goes to the connection at once, without a task or a layer between, while the client keeps
    up; else it is held, and sent as the application's answers are.
    """

    def __init__(self, produce: "Produce"):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._clock = asyncio.get_running_loop().time
        self._sent = self._clock()
        self._write_now: Callable[[bytes], bool] | None = None
        self._held: list[bytes] = []
        self._moved = asyncio.Event()
        """Something is held, or the work has ended."""
        self._taken = asyncio.Event()
        """Nothing is held."""
        self._taken.set()
        self._work = asyncio.create_task(produce(self))
        self._work.add_done_callback(lambda work: self._moved.set())

    def write(self, *events: bytes) -> None:
        """Send JSON texts, an event each."""
        if not events:  # nothing sent as a chunk would end the body
            return
        data = b"".join([b"data: %b\n\n" % event for event in events])
        if not self._held and self._write_now is not None and self._write_now(data):
            self._sent = self._clock()
            return
        self._held.append(data)
        self._taken.clear()
        self._moved.set()

    async def taken(self) -> None:
        """Wait until the client has taken what is held."""
        await self._taken.wait()

    async def begin(self) -> None:
        """Wait for the first event. What fails before raises, and is a plain HTTP error.

        A client that has waited for a while gets the headers, and then comments, all the same.
        """
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), KEEP_ALIVE_SECONDS)
            if self._work.done() and not self._held:
                self._work.result()
        except BaseException:
            await self._close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})
            self._sent = self._clock()

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._write_now = scope.get("extensions", {}).get(WRITE)
            while self._held or not self._work.done():
                if self._held:
                    count = len(self._held)
                    await body(b"".join(self._held))
                    del self._held[:count]  # only now: what is written meanwhile comes after it
                    continue
                self._taken.set()
                self._moved.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._sent + KEEP_ALIVE_SECONDS):
                        await self._moved.wait()
                if not self._moved.is_set() and self._clock() >= self._sent + KEEP_ALIVE_SECONDS:
                    await body(b": keep-alive\n\n")
            self._work.result()
        except Exception as error:
            await body(b"data: %b\n\n" % as_api_error(error).encode())
        finally:
            await self._close()
        await body(b"data: [DONE]\n\n", more=False)

    async def _close(self) -> None:
        self._work.cancel()
        await asyncio.wait({self._work})


Produce = Callable[[EventStream], Awaitable[None]]


async def event_stream(produce: Produce) -> EventStream:
    """The response for what `produce` writes, begun."""
    stream = EventStream(produce)
    await stream.begin()
    return stream
