"""API keys: one of several, compared in constant time."""

import hashlib
import hmac
from collections.abc import Sequence, Set

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.server.errors import ApiError

OPEN = frozenset({"/health", "/live", "/ready", "/ping"})


class Auth:
    """Lets a request through with `Authorization: Bearer KEY` or `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open: Set[str] = OPEN):
        self._app = app
        self._open = open
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        if self._known(key := _key(Headers(scope=scope))):
            scope.setdefault("state", {})["tenant"] = _digest(key.encode("latin-1")).hex()
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _known(self, key: str) -> bool:
        digest = _digest(key.encode("latin-1"))  # as headers are decoded
        # Every key is compared, whichever matches: the time tells nothing.
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
