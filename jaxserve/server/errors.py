"""Every failure as an HTTP answer in OpenAI's shape."""

import logging

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.errors import EngineDied, InvalidRequest

log = logging.getLogger(__name__)

RETRY_SECONDS = "2"
LONGEST = 500
"""Characters of a message or a path: what is wrong may be a name of a megabyte."""


class ErrorInfo(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorInfo


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = ErrorBody(ErrorInfo(_cut(message), kind, _cut(param) if param else None, code))

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body)

    def response(self) -> Response:
        return Response(self.encode(), self.status, self.headers, "application/json")


def unavailable(reason: str, code: str = "engine_unavailable") -> ApiError:
    return ApiError(503, reason, code=code, headers={"retry-after": RETRY_SECONDS})


def as_api_error(error: BaseException) -> ApiError:
    """What to answer for any exception; one that is nobody's fault but ours is logged."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case EngineDied():
            return unavailable(str(error), "engine_died")
        case HTTPException(status_code=404):
            return ApiError(404, "there is nothing at this path", code="not_found")
        case HTTPException(status_code=405):
            headers = dict(error.headers or {})
            told = f"this path answers {headers.get('Allow')} only"
            return ApiError(405, told, code="method_not_allowed", headers=headers)
        case HTTPException():
            return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "an error in the server, which its log describes", code="internal_error")


async def answer(request: Request, error: Exception) -> Response:
    """Starlette's exception handler."""
    return as_api_error(error).response()


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"
