"""Values that are not written as JSON, as JSON text."""

import ast
import json
import warnings
from typing import Any

KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
NO_VALUE = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)


def dump(value: Any) -> str:
    """Raises ValueError or TypeError for what JSON has no form for."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def escaped(text: str) -> str:
    """What stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def literal(text: str, kinds: frozenset[str] = frozenset()) -> str:
    """A JSON or Python literal as JSON; what is none, or none of the `kinds` beside "string", is a string."""
    for read in (json.loads, _python):
        try:
            value = read(text)
            if "string" not in kinds or _kind(value) & kinds:
                return dump(value)
        except NO_VALUE:
            pass
    return json.dumps(text, ensure_ascii=False)


def kinds(schema: Any) -> frozenset[str]:
    """The JSON types that a parameter's schema allows; none where it does not say."""
    if not isinstance(schema, dict):
        return frozenset()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else {kind for kind in _list(named) if isinstance(kind, str)}
    for option in (*_list(schema.get("anyOf")), *_list(schema.get("oneOf"))):
        found |= kinds(option)
    for value in _list(schema.get("enum")):
        found |= _kind(value)
    return frozenset(found)


def _list(value: Any) -> list[Any]:
    """A schema is a client's: it may hold anything."""
    return value if isinstance(value, list) else []


def _python(text: str) -> Any:
    with warnings.catch_warnings():  # of escapes that Python does not know
        warnings.simplefilter("ignore")
        return ast.literal_eval(text.strip())


def _kind(value: Any) -> set[str]:
    kind = KINDS.get(type(value), "null")
    return {kind, "number"} if kind == "integer" else {kind}
