"""Uvicorn's HTTP/1.1, with the limits that it leaves open.

Uvicorn waits for ever for a request that has begun, keeps a head of any size, answers what is no HTTP in
plain text, and forgets the request that is being answered when the connection ends with another one waiting.
"""

import asyncio
import socket
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from jaxserve.server.errors import ApiError

MAX_HEAD = 64 * 2**10
"""Bytes of a request's line and headers, besides those in the piece that it began with."""
PATIENCE = 30.0
"""Seconds that a request may take to arrive, and one more for each `SLOWEST` bytes of it."""
SLOWEST = 64 * 2**10
STUCK = 60.0
"""Seconds after which a client that takes nothing of its answer is gone."""

WRITE = "jaxserve.write"
"""In a scope's extensions, a function that sends a part of the body that has begun, at once and past the
layers of the application; False, and nothing sent, where the client does not keep up or is gone."""


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._arriving: asyncio.TimerHandle | None = None
        """Runs while a request arrives, and from the connection's begin."""
        self._received = 0
        """Bytes since it runs."""
        self._head: int | None = None
        """Bytes of the headers that are arriving, before a body or after it; None between them."""
        self._ended = False
        """Nothing more is understood; the connection closes with the answer under way."""
        self._answering: RequestResponseCycle | None = None
        """The last one begun; `self.cycle` is the last one received."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # where there is none, it is known when the connection breaks
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STUCK * 1000))
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)
        if (cycle := self._answering) is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._ended:  # it is read all the same: that is how the client is seen to go
            return
        if not self._busy:
            self._expect()
        self._received += len(data)
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > MAX_HEAD and not self.transport.is_closing():
            self._refuse(431, f"the request's headers are larger than {MAX_HEAD} bytes", "headers_too_large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect()
        self._head = 0

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()
        if self.cycle is not None:  # the one begun now
            self.cycle.scope.setdefault("extensions", {})[WRITE] = partial(_write, self.cycle)

    def on_chunk_header(self) -> None:
        """Part of a body comes now, or, after the last, headers again."""
        self._head = 0

    def on_body(self, body: bytes) -> None:
        self._head = None
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head = None
        self._arrived()
        super().on_message_complete()
        self.cycle.more_body = False  # also where it was answered before it had come

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not HTTP as it should be", "invalid_http")

    def shutdown(self) -> None:
        """A request that has not arrived by now never will."""
        if self._arriving and self._received and not self._busy:
            self._refuse(503, "the server is shutting down", "shutting_down")
        else:
            super().shutdown()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _busy(self) -> bool:
        """A request that has arrived is being answered."""
        cycle = self._answering
        return cycle is not None and not cycle.more_body and not cycle.response_complete

    def _expect(self) -> None:
        if self._arriving is None:
            self._received = 0
            self._begun = self.loop.time()
            self._arriving = self.loop.call_later(PATIENCE, self._check_pace)

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _check_pace(self) -> None:
        """Give a client that is fast enough more time."""
        until = self._begun + PATIENCE + self._received / SLOWEST
        if self._busy or self.flow.read_paused:  # it is we who let it wait
            until = self.loop.time() + PATIENCE
        if until > self.loop.time():
            self._arriving = self.loop.call_at(until, self._check_pace)
        elif self._received:
            self._refuse(408, "the request did not arrive in time", "request_timeout")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer instead of the application, where it has not, and close the connection."""
        self._arrived()
        if self._answering is not None and self._busy:  # the request before this one comes first
            self._answering.keep_alive = False
            self._ended = True
            return
        if not (self.cycle and self.cycle.more_body and self.cycle.response_started):
            body = ApiError(status, message, code=code).encode()
            head = "content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + (head % len(body)).encode() + body)
        self.transport.close()


def _write(cycle: RequestResponseCycle, data: bytes) -> bool:
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
        return False
    cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
    return True
