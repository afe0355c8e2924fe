"""What of a JSON schema is enforced, and where in it something is that is not."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from jaxserve.errors import InvalidRequest

FORMATS = (
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
)  # fmt: skip
UNENFORCED = frozenset((
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties",
    "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "contentSchema",
    "nullable", "x-guidance",
))  # fmt: skip
"""Keywords that limit values, unknown to llguidance. One of no known meaning is an annotation."""
MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLE = ("items", "additionalItems", "additionalProperties")
LONGEST = 2**20
"""Items of a list, characters of a text: what must have more is no model's output."""
DEEPEST = 50
"""Schemas within schemas; the library parses 128 levels of JSON."""
MOST = 2**16
"""Schemas in one: other requests of the server wait while they are looked through."""
BEFORE = 100
"""Characters that may come before what a pattern without `^` describes: a model that does not think of it
would write others for ever."""
LEAD = rf"^[\s\S]{{0,{BEFORE}}}(?:"


def checked(schema: Any, param: str) -> dict[str, Any]:
    """The schema as the library takes it, if all of it is enforced.

    Raises InvalidRequest whose `param` ends in the JSON pointer of the keyword (`guided_json#/items/not`).
    """
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{param} must be an object", param)
    found: dict[str, Any] = _Check(schema, param).schema(schema, "")
    return found


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those directly in a schema, each with its pointer from there."""
    for key, value in schema.items():
        if key in MAPS and isinstance(value, Mapping):
            yield from ((f"/{key}/{escaped(name)}", sub) for name, sub in value.items())
        elif isinstance(value, list) and (key in LISTS or key == "items"):
            yield from ((f"/{key}/{i}", sub) for i, sub in enumerate(value))
        elif key in SINGLE:
            yield f"/{key}", value


def embedded(lark: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The schemas in a grammar, each with where it begins and ends. Raises ValueError for what is no JSON."""
    decoder, end = json.JSONDecoder(), 0
    for found in re.finditer(r"%json\s*(?=\{)", lark):
        if found.start() >= end:
            schema, end = decoder.raw_decode(lark, found.end())
            yield found.end(), end, schema


def escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


SPELLED = re.compile(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", re.DOTALL)
"""What of a pattern is no anchor or bar: what is escaped, and classes."""


def begun(pattern: str) -> str:
    """The pattern with at most `BEFORE` characters before it; as it is if it says how a text begins."""
    plain = SPELLED.sub("x", pattern)
    ends = plain.endswith("$")
    if "^" in plain or "$" in plain.removesuffix("$") or (ends and "|" in plain):
        return pattern
    described = pattern.removesuffix("$") if ends else pattern
    return f"{LEAD}{described})" + "$" * ends


class _Check:
    def __init__(self, root: Mapping[str, Any], param: str):
        self.root = root
        self.param = param
        self.seen = 0

    def refuse(self, pointer: str, why: str) -> InvalidRequest:
        return InvalidRequest(f"{self.param}: {why} (at #{pointer})", f"{self.param}#{pointer}")

    def schema(self, schema: Any, at: str, depth: int = 0) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self.refuse(at, "a schema must be an object or a boolean")
        if depth > DEEPEST:
            raise self.refuse(at, f"schemas lie more than {DEEPEST} deep within each other")
        self.seen += 1
        if self.seen > MOST:
            raise self.refuse(at, f"more than {MOST} schemas lie within each other or side by side")
        # saying that nothing is limited
        schema = {k: v for k, v in schema.items() if not (k in ("uniqueItems", "nullable") and v is False)}
        for key in schema.keys() & UNENFORCED:
            raise self.refuse(f"{at}/{escaped(key)}", f"the keyword {key} cannot be enforced")
        self.values(schema, at)
        found = {key: self.keyword(key, value, at, depth) for key, value in self.plain(schema).items()}
        if isinstance(found.get("pattern"), str) and not found.keys() & {"maxLength", "enum", "const"}:
            found["pattern"] = begun(found["pattern"])
        return found

    def keyword(self, key: str, value: Any, at: str, depth: int) -> Any:
        at = f"{at}/{escaped(key)}"
        if key in MAPS:
            if not isinstance(value, Mapping):
                raise self.refuse(at, f"{key} must be an object")
            return {name: self.schema(sub, f"{at}/{escaped(name)}", depth + 1) for name, sub in value.items()}
        if key in LISTS or (key == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise self.refuse(at, f"{key} must be a list")
            return [self.schema(sub, f"{at}/{i}", depth + 1) for i, sub in enumerate(value)]
        return self.schema(value, at, depth + 1) if key in SINGLE else value

    def values(self, schema: Mapping[str, Any], at: str) -> None:
        if (form := schema.get("format")) is not None and form not in FORMATS:
            told = f"the format {form!r} cannot be enforced, only {', '.join(FORMATS)}"
            raise self.refuse(f"{at}/format", told)
        for key in ("minItems", "minLength", "minProperties"):
            least = schema.get(key)
            if isinstance(least, int) and least > LONGEST:
                raise self.refuse(f"{at}/{key}", f"no output is as long as {key} {least} asks")
        least, required = schema.get("minProperties"), schema.get("required") or []
        if isinstance(least, int) and isinstance(required, list) and least > len(set(map(str, required))) + 1:
            told = (
                "minProperties beyond the required ones and one more cannot be enforced: names may come twice"
            )
            raise self.refuse(f"{at}/minProperties", told)
        if "$ref" in schema:
            self.reference(schema["$ref"], f"{at}/$ref")

    def reference(self, reference: Any, at: str) -> None:
        if not isinstance(reference, str):
            raise self.refuse(at, "$ref must be a string")
        if "$id" in self.root or "id" in self.root:
            return  # relative to that: the library resolves it
        if not reference.startswith("#"):
            raise self.refuse(at, f"$ref {reference!r} is not within the schema, and nothing is fetched")
        if reference.startswith("#/") and self.resolved(reference) is None:
            raise self.refuse(at, f"$ref {reference!r} points to nothing")

    def resolved(self, reference: str) -> Any:
        found: Any = self.root
        for part in unquote(reference).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping) and name in found:
                found = found[name]
            elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            else:
                return None
        return found

    def plain(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """oneOf as anyOf where a property tells the options apart, as in pydantic's tagged unions."""
        options = schema.get("oneOf")
        if not isinstance(options, list) or "anyOf" in schema or not self.told_apart(options):
            return schema
        return {("anyOf" if key == "oneOf" else key): value for key, value in schema.items()}

    def told_apart(self, options: list[Any]) -> bool:
        found = [self.tags(option) for option in options]
        common = set.intersection(*map(set, found)) if found else set()
        return any(
            len(set().union(*(tags[name] for tags in found))) == sum(len(tags[name]) for tags in found)
            for name in common
        )

    def tags(self, option: Any) -> dict[str, set[str]]:
        """Required properties of an object that can only be certain texts."""
        if isinstance(option, Mapping) and isinstance(option.get("$ref"), str):
            option = self.resolved(option["$ref"]) if option["$ref"].startswith("#") else None
        if not isinstance(option, Mapping) or option.get("type") != "object":
            return {}
        properties, required = option.get("properties"), option.get("required")
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            return {}
        found = {}
        for name in required:
            rule = properties.get(name) if isinstance(name, str) else None
            if not isinstance(rule, Mapping):
                continue
            texts = [rule["const"]] if "const" in rule else rule.get("enum")
            if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                found[name] = set(texts)
        return found
