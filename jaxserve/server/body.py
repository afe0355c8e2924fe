"""A request's body as a checked struct: exact types, nothing unknown, nothing ignored."""

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from jaxserve.errors import InvalidRequest
from jaxserve.server.errors import ApiError

Wire = TypeVar("Wire", bound=msgspec.Struct)


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


def to_struct(fields: dict[str, Any], kind: type[Wire]) -> Wire:
    """Raises InvalidRequest with the full path of the first field that is wrong."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequest):
            raise error.__cause__ from None
        raise _explained(str(error)) from None


def _explained(text: str) -> InvalidRequest:
    problem, _, place = text.partition(" - at `$")
    path = place.rstrip("`").removeprefix(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem, re.DOTALL):
        path = f"{path}.{unknown[1]}" if path else unknown[1]
        return InvalidRequest(f"unknown field {path}", path, "unknown_field")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", problem):
        path = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidRequest(f"{path} is required", path, "missing_field")
    problem = problem[:1].lower() + problem[1:]
    return InvalidRequest(f"{path}: {problem}" if path else problem, path or None, "invalid_value")
