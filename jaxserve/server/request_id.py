"""`x-request-id`: the client's if it sends a usable one, else a new one; on every response.

A body's `request_id` goes before it (`endpoint.py`).
"""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.errors import InvalidRequest

USABLE = re.compile(r"[\x21-\x7e]{1,128}")


def check_id(request_id: str) -> None:
    if not USABLE.fullmatch(request_id):
        told = "request_id must be 1 to 128 visible ASCII characters"
        raise InvalidRequest(told, "request_id", "invalid_value")


class RequestId:
    """Puts the id under `request_id` in the request's state and on the response."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if USABLE.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = state["request_id"]
            await send(message)

        await self._app(scope, receive, send_with_id)
