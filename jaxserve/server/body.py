"""A request's body as a JSON object."""

from typing import Any

import msgspec
from starlette.requests import Request

from jaxserve.errors import InvalidRequest
from jaxserve.server.errors import ApiError


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body's JSON object. Raises 413 past `limit` bytes, 415 for another type, 400 for broken JSON."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(
            415, f"the body must come as 'content-type: application/json', not {kind or 'without one'}"
        )
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return parse_object(bytes(body))


def parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not valid UTF-8: {error.reason}") from None
    except RecursionError:
        raise InvalidRequest("the body's JSON is nested too deeply") from None
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {str(error).partition(' - at')[0]}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {type(value).__name__}")
    return value
