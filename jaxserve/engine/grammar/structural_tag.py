"""Structural tags: free text in which, once a trigger is written, a tag with a form of its own must follow.

Both forms that clients send: `structures` with `triggers`, and the nested `format`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from jaxserve.engine.grammar.schema import checked
from jaxserve.errors import InvalidRequest


class _Part(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    """One kind of `format`, named by its `type`."""


class ConstString(_Part, tag="const_string"):
    value: str


class JsonSchema(_Part, tag="json_schema"):
    json_schema: dict[str, Any] | bool
    param: str = ""
    """The field that it came from, where that is another."""


class Regex(_Part, tag="regex"):
    pattern: str


class AnyText(_Part, tag="any_text"):
    pass


class Sequence_(_Part, tag="sequence"):
    elements: list["Format"]


class Or(_Part, tag="or"):
    elements: list["Format"]


class Tag(_Part, tag="tag"):
    begin: str
    content: "Format"
    end: str


class Output(_Part, tag="output"):
    """Of `around` only."""


class TriggeredTags(_Part, tag="triggered_tags"):
    triggers: list[str]
    tags: list[Tag]
    at_least_one: bool = False
    stop_after_first: bool = False


class TagsWithSeparator(_Part, tag="tags_with_separator"):
    tags: list[Tag]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False
    at_most: Annotated[int, msgspec.Meta(ge=1)] | None = None


Format = (
    ConstString
    | JsonSchema
    | Regex
    | AnyText
    | Sequence_
    | Or
    | Tag
    | Output
    | TriggeredTags
    | TagsWithSeparator
)


class _Structure(msgspec.Struct, forbid_unknown_fields=True):
    begin: str
    end: str
    schema: dict[str, Any] | bool = True


class _Structures(msgspec.Struct, forbid_unknown_fields=True):
    structures: list[_Structure]
    triggers: list[str]
    type: Literal["structural_tag"] = "structural_tag"


class _Nested(msgspec.Struct, forbid_unknown_fields=True):
    format: Format
    type: Literal["structural_tag"] = "structural_tag"


def lark(value: Any, param: str, special: Mapping[str, int], options: Mapping[str, Any]) -> dict[str, Any]:
    """The grammar, and the fields of its schemas. `special`: ids of the special tokens by their texts;
    `options`: of the JSON in it.

    Raises InvalidRequest with the field's path.
    """
    writer = _Writer(special, options)
    nested = isinstance(value, Mapping) and "format" in value
    try:
        if nested:
            start = writer.part(msgspec.convert(value, _Nested).format, f"{param}.format")
        else:
            start = writer.structures(msgspec.convert(value, _Structures), param)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$")
        raise InvalidRequest(f"{param}{path.rstrip('`')}: {text}", param + path.rstrip("`")) from None
    except RecursionError:
        raise InvalidRequest(f"{param} is nested too deeply", param) from None
    return writer.grammar(start)


def around(
    format: Any, special: Mapping[str, int], options: Mapping[str, Any], output: str
) -> dict[str, Any]:
    """The grammar of what stands around another, whose name in it is `output`."""
    writer = _Writer(special, options, output)
    return writer.grammar(writer.part(msgspec.convert(format, Format), ""))


class _Writer:
    def __init__(self, special: Mapping[str, int], options: Mapping[str, Any], output: str | None = None):
        self.special = special
        self.options = options
        self.output = output
        self.rules: list[str] = []
        self.places: list[str] = []
        """Of the schemas in them."""
        names = sorted(special, key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    def rule(self, body: str, *, lazy: bool = False, terminal: bool = False) -> str:
        name = f"{'T' if terminal else 'r'}_{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def grammar(self, start: str) -> dict[str, Any]:
        text = "\n".join([f"start: {start}", "TEXT: /(?s:.*)/", *self.rules])
        return {"lark_grammar": text, "places": self.places}

    def literal(self, text: str) -> str:
        """Text, in which the names of special tokens are those tokens."""
        parts = [part for part in self.split.split(text) if part]
        return " ".join(f"<[{self.special[p]}]>" if p in self.special else json.dumps(p) for p in parts)

    def json(self, schema: Any, param: str) -> str:
        self.places.append(param)
        return self.rule("%json " + json.dumps({**checked(schema, param), "x-guidance": self.options}))

    def structures(self, given: _Structures, param: str) -> str:
        bodies = [
            (s.begin, f"{self.json(s.schema, f'{param}.structures[{i}].schema')} {self.literal(s.end)}")
            for i, s in enumerate(given.structures)
        ]
        return self.triggered(given.triggers, bodies, param, f"{param}.structures")

    def part(self, part: Format, at: str) -> str:
        """A rule's body for it, in brackets where it is more than one symbol."""
        match part:
            case ConstString():
                return self.literal(part.value)
            case JsonSchema():
                return self.json(part.json_schema, part.param or f"{at}.json_schema")
            case Regex():
                from llguidance import regex_to_lark

                return self.rule(f"/{regex_to_lark(part.pattern, '')}/", terminal=True)
            case AnyText():
                return "TEXT"
            case Output():
                if self.output is None:
                    raise InvalidRequest(f"{at}.type: there is no format 'output'", f"{at}.type")
                return self.output
            case Sequence_():
                return " ".join(self.part(p, f"{at}.elements[{i}]") for i, p in enumerate(part.elements))
            case Or():
                self.some(part.elements, f"{at}.elements")
                return self.any_of([self.part(p, f"{at}.elements[{i}]") for i, p in enumerate(part.elements)])
            case Tag():
                return f"{self.literal(part.begin)} {self.inside(part, at)}"
            case TriggeredTags():
                bodies = [(tag.begin, self.inside(tag, f"{at}.tags[{i}]")) for i, tag in enumerate(part.tags)]
                return self.triggered(
                    part.triggers, bodies, at, f"{at}.tags", part.at_least_one, part.stop_after_first
                )
            case TagsWithSeparator():
                self.some(part.tags, f"{at}.tags")
                one = self.any_of([self.part(tag, f"{at}.tags[{i}]") for i, tag in enumerate(part.tags)])
                times = "*" if part.at_most is None else f"{{0,{part.at_most - 1}}}"
                more = f"{one} ({self.literal(part.separator)} {one}){times}"
                more = one if part.stop_after_first or part.at_most == 1 else more
                return self.rule(more) if part.at_least_one else f"({self.rule(more)})?"

    def inside(self, tag: Tag, at: str) -> str:
        """A tag after its `begin`. Any text ends at the first `end`."""
        end = self.literal(tag.end)
        if not isinstance(tag.content, AnyText):
            return f"{self.part(tag.content, f'{at}.content')} {end}"
        return self.upto(tag.end, f"{at}.end") if tag.end else "TEXT"

    def upto(self, mark: str, at: str) -> str:
        """Text and the first `mark` after it."""
        if (literal := self.literal(mark)).startswith("<"):
            return f"TEXT {literal}"
        if "<[" in self.split.sub("<[", mark):
            raise InvalidRequest(f"{at} must begin with its special token", at)
        return self.rule(f"TEXT {literal}", lazy=True)

    def triggered(
        self,
        triggers: Sequence[str],
        bodies: Sequence[tuple[str, str]],
        at: str,
        tags_at: str,
        at_least_one: bool = False,
        stop_after_first: bool = False,
    ) -> str:
        """Text with tags: lazy rules go first, so that a trigger always ends it.

        `bodies`: each tag's `begin`, and what follows that.
        """
        self.some(triggers, f"{at}.triggers")
        self.some(bodies, tags_at)
        groups: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for i, trigger in enumerate(triggers):
            path = f"{at}.triggers[{i}]"
            if not trigger or any(
                trigger.startswith(other) for other in groups if other not in ("", trigger)
            ):
                raise InvalidRequest(f"{path} must not be empty nor begin with another trigger", path)
        for i, (begin, body) in enumerate(bodies):
            trigger = next(filter(begin.startswith, triggers), "")
            if not trigger:
                path = f"{tags_at}[{i}].begin"
                raise InvalidRequest(f"{path} must begin with a trigger", path)
            groups[trigger].append(f"{self.literal(begin.removeprefix(trigger))} {body}")
        one = self.rule(self.any_of([
            f"{self.upto(trigger, f'{at}.triggers[{i}]')} {self.any_of(group)}"
            for i, (trigger, group) in enumerate(groups.items())
            if group
        ]))  # fmt: skip
        if stop_after_first:
            return one if at_least_one else self.any_of([one, "TEXT"])
        return f"{one}{'+' if at_least_one else '*'} TEXT"

    def any_of(self, bodies: Sequence[str]) -> str:
        return "(" + " | ".join(bodies) + ")"

    def some(self, given: Sequence[Any], at: str) -> None:
        if not given:
            raise InvalidRequest(f"{at} must not be empty", at)
