"""Counts responses, by path and status."""

from collections import Counter
from collections.abc import Set

from starlette.types import ASGIApp, Message, Receive, Scope, Send

OTHER = "other"


class CountResponses:
    """Middleware around all others. `paths`: those that the server has; every other one is `other`."""

    def __init__(self, app: ASGIApp, responses: Counter[tuple[str, str]], paths: Set[str]):
        self._app = app
        self._responses = responses
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else OTHER
        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self._responses[path, str(message["status"])] += 1
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not begun:  # it is answered further out
                self._responses[path, "500"] += 1
            raise
