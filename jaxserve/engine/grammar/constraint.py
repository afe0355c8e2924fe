"""What a request may ask of its output's form: every way to write it, read into one `Constraint`."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from jaxserve.errors import InvalidRequest

Kind = Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
T = TypeVar("T")

GUIDED: dict[str, Kind] = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""The names that older clients send, each a field of its own."""
BLANK = r"(?:[ \t\r\n]|\\[trn]|\\x20)"
BLANKS = rf"(?:(?:{BLANK}|\[{BLANK}+\])(?:\?|\{{\d(?:,\d)?\}})?){{0,4}}"
"""Patterns of JSON whitespace that ends: a greedy small model fills its budget with what does not."""


class Constraint(msgspec.Struct, frozen=True):
    """One request's. `param` is the field that the client wrote, `whitespace` the pattern of what may stand
    between the tokens of JSON; None: a space after a comma and a colon, or none. `within`: a structural tag's
    format in which `{"type": "output"}` stands for the constraint; None: it is the whole output's."""

    kind: Kind
    value: Any
    param: str
    whitespace: str | None = None
    within: dict[str, Any] | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`structured_outputs`: exactly one of the first six."""

    json: Annotated[dict[str, Any] | bool | str | None, Meta(description="a JSON schema")] = None
    json_object: Annotated[bool | None, Meta(description="any JSON object")] = None
    regex: Annotated[str | None, Meta(description="matches the whole output")] = None
    choice: Annotated[list[str] | None, Meta(description="one of these texts")] = None
    grammar: Annotated[str | None, Meta(description="in Lark, GBNF or EBNF")] = None
    structural_tag: Annotated[dict[str, Any] | str | None, Meta(description="text with tagged parts")] = None
    whitespace_pattern: Annotated[str | None, Meta(description="between the tokens of JSON")] = None
    disable_any_whitespace: Annotated[bool | None, Meta(description="compact JSON only")] = None


class _Schema(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}\Z")]
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class _ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None


def from_structured_outputs(value: Any, param: str = "structured_outputs") -> Constraint:
    """Raises InvalidRequest with the field's path for what is no such object, none of its kinds, or two."""
    if isinstance(value, StructuredOutputs):  # made in Python, where types are not checked
        value = msgspec.structs.asdict(value)
    fields = _convert(value, StructuredOutputs, param)
    kinds: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
    given = [kind for kind in kinds if getattr(fields, kind) is not None]
    if fields.json_object is False:  # asks for nothing
        given.remove("json_object")
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise InvalidRequest(f"{param} must have exactly one of {', '.join(kinds)}, not {found}", param)
    (kind,) = given
    pattern = fields.whitespace_pattern
    if fields.disable_any_whitespace:
        if pattern:
            path = f"{param}.disable_any_whitespace"
            raise InvalidRequest(f"{path} and whitespace_pattern exclude each other", path)
        pattern = ""
    return _constraint(kind, getattr(fields, kind), f"{param}.{kind}", pattern, f"{param}.whitespace_pattern")


def from_response_format(value: Any, param: str = "response_format") -> Constraint | None:
    """OpenAI's; None for plain text. `strict` changes nothing: what is accepted is enforced."""
    if isinstance(value, Mapping) and value.get("type") == "structural_tag":
        return _constraint("structural_tag", dict(value), param)
    form = _convert(value, _ResponseFormat, param)
    if form.type == "json_schema":
        if form.json_schema is None:
            raise InvalidRequest(f"{param}.json_schema is missing", f"{param}.json_schema")
        if form.json_schema.schema is not None:
            return _constraint("json", form.json_schema.schema, f"{param}.json_schema.schema")
    elif form.json_schema is not None:
        path = f"{param}.json_schema"
        raise InvalidRequest(f"{path} needs {param}.type 'json_schema'", path)
    return None if form.type == "text" else _constraint("json_object", True, param)


def from_guided(fields: Mapping[str, Any]) -> Constraint | None:
    """The one of `GUIDED` that a request has, with its `guided_whitespace_pattern`."""
    given = [name for name in GUIDED if fields.get(name) is not None]
    pattern = fields.get("guided_whitespace_pattern")
    if len(given) > 1:
        raise InvalidRequest(f"{given[1]} and {given[0]} exclude each other", given[1])
    if not given:
        if pattern is not None:
            name = "guided_whitespace_pattern"
            raise InvalidRequest(f"{name} needs guided_json", name)
        return None
    (name,) = given
    value = _convert(fields[name], StructuredOutputs.__annotations__[GUIDED[name]], name)
    return _constraint(GUIDED[name], value, name, pattern, "guided_whitespace_pattern")


def only_one(*constraints: Constraint | None) -> Constraint | None:
    """Of a request's three ways to ask. Raises InvalidRequest where two are taken."""
    given = [constraint for constraint in constraints if constraint is not None]
    if len(given) > 1:
        first, second = given[0].param, given[1].param
        raise InvalidRequest(f"{second} and {first} exclude each other", second)
    return given[0] if given else None


def _constraint(
    kind: Kind, value: Any, param: str, whitespace: Any = None, whitespace_param: str = ""
) -> Constraint:
    if whitespace is not None:
        if kind not in ("json", "json_object", "structural_tag"):
            raise InvalidRequest(f"{whitespace_param} is about JSON, and {param} is not", whitespace_param)
        if not isinstance(whitespace, str) or not re.fullmatch(BLANKS, whitespace):
            raise InvalidRequest(
                f"{whitespace_param} must match spaces, tabs and newlines, and only so many of them: "
                f"such as '[ ]?' or '[ \\n]{{0,4}}', not {whitespace!r}",
                whitespace_param,
            )
    if kind in ("json", "structural_tag") and isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise InvalidRequest(f"{param} is not valid JSON: {error}", param) from None
    if kind == "choice":
        if not value:
            raise InvalidRequest(f"{param} must not be empty", param)
        for i, text in enumerate(value):
            if not text:
                raise InvalidRequest(f"{param}[{i}] must not be empty", f"{param}[{i}]")
    return Constraint(kind, value, param, whitespace)


def _convert(value: Any, to: type[T], param: str) -> T:
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise InvalidRequest(f"{param}{path.rstrip('`')}: {text}", param + path.rstrip("`")) from None
