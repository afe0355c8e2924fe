"""Plain values as a checked struct: exact types, nothing unknown, nothing ignored."""

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from jaxserve.errors import InvalidRequest

Wire = TypeVar("Wire", bound=msgspec.Struct)
DEEPEST = 100
"""Levels of JSON within JSON; writing it again takes as many calls."""


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


def is_deep(value: Any) -> bool:
    """Whether it has more than `DEEPEST` levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [item for each in level for item in _items(each)]
    return bool(level)


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
