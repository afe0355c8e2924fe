"""A route that uses the engine: let in, read, answered, and ended at once when the client goes away."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.server.body import read_json
from jaxserve.server.request_id import USABLE
from jaxserve.server.state import ServerState


class Caller(NamedTuple):
    """Who asks, and since when."""

    request_id: str
    tenant: str
    """Different for each API key; empty without one."""
    arrived: float
    """When the whole request was there, in seconds of `time.monotonic()`."""


Handler = Callable[[ServerState, dict[str, Any], Caller], Awaitable[Response]]
"""(state, the body's JSON object, caller) -> response"""


class EngineEndpoint:
    """The ASGI app of one `POST` route."""

    def __init__(self, state: ServerState, handler: Handler):
        self._state = state
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            fields = await read_json(Request(scope, receive), self._state.max_body_size)
            await self._admitted(fields, scope, receive, send)

    async def _admitted(self, fields: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        with self._state.admitted():
            work = asyncio.create_task(self._answer(fields, scope, receive, send))
            gone = asyncio.create_task(_disconnect(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                finished = work.done()
                for task in (work, gone):
                    task.cancel()
                await asyncio.wait({work, gone})
            if finished:
                work.result()

    async def _answer(self, fields: dict[str, Any], scope: Scope, receive: Receive, send: Send) -> None:
        named = fields.get("request_id")
        if isinstance(named, str) and USABLE.fullmatch(named):
            scope["state"]["request_id"] = named
        caller = Caller(scope["state"]["request_id"], scope["state"].get("tenant", ""), time.monotonic())
        response = await self._handler(self._state, fields, caller)
        await response(scope, receive, send)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
