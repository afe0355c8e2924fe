"""A constraint as one grammar in llguidance's own form: a text that goes to the engine with its request."""

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from jaxserve.engine.grammar import structural_tag
from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.engine.grammar.schema import checked, embedded
from jaxserve.errors import InvalidRequest

LONGEST_TEXT = 2**20
"""Characters of a grammar."""
LONGEST_GBNF = 2**14
"""Of one that is translated first, which takes longer."""
SPACED = {"whitespace_flexible": False, "item_separator": ",\\x20?", "key_separator": ":\\x20?"}
"""A space after a comma or a colon, as most models write, or none; nothing that could go on for ever."""
COMPACT = {"whitespace_flexible": False}


class Grammar(msgspec.Struct, frozen=True):
    """`text`: llguidance's list of grammars, as JSON. `param`: the request's field, for errors."""

    text: str
    param: str


def grammar(constraint: Constraint, special: Mapping[str, int]) -> Grammar:
    """`special`: ids of the special tokens, by their texts: a structural tag may name them.

    Raises InvalidRequest, for a schema with the JSON pointer, for what is known not to be enforced; the rest
    is found when it is compiled.
    """
    param = constraint.param
    try:
        grammars = {"grammars": _grammars(constraint, special)}
        text = json.dumps(grammars, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except RecursionError:
        raise InvalidRequest(f"{param} is nested too deeply", param) from None
    except UnicodeEncodeError:
        told = f"{param} holds half of a surrogate pair, which is no character"
        raise InvalidRequest(told, param) from None
    if len(text) > LONGEST_TEXT:
        raise InvalidRequest(f"{param} has {len(text)} characters; at most {LONGEST_TEXT}", param)
    return Grammar(text, param)


def _grammars(constraint: Constraint, special: Mapping[str, int]) -> list[dict[str, Any]]:
    """The last is the constraint itself."""
    own = _grammar(constraint, special)
    if constraint.within is None:
        return [own]
    around = structural_tag.around(constraint.within, special, _options(constraint.whitespace), "@output")
    return [around, {"name": "output", **own}]


def _grammar(constraint: Constraint, special: Mapping[str, int]) -> dict[str, Any]:
    value, param = constraint.value, constraint.param
    options = _options(constraint.whitespace)
    match constraint.kind:
        case "json":
            return {"json_schema": {**checked(value, param), "x-guidance": options}, "places": [param]}
        case "json_object":
            return {"json_schema": {"type": "object", "x-guidance": options}, "places": [param]}
        case "regex":
            return {"lark_grammar": f"start: /{_regex(value)}/"}
        case "choice":
            return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, value))}
        case "grammar":
            return _embedded(_lark(value, param), param)
        case "structural_tag":
            return structural_tag.lark(value, param, special, options)


def _options(whitespace: str | None) -> dict[str, Any]:
    return SPACED if whitespace is None else {"whitespace_pattern": whitespace} if whitespace else COMPACT


def _regex(pattern: str) -> str:
    from llguidance import regex_to_lark

    return regex_to_lark(pattern, "")


def _lark(text: str, param: str) -> str:
    """GBNF and EBNF, which name their start `root`, are translated."""
    if not re.search(r"^\s*root\s*::=", text, re.MULTILINE):
        return text
    from llguidance.gbnf_to_lark import any_to_lark

    if len(text) > LONGEST_GBNF:
        raise InvalidRequest(f"{param} has {len(text)} characters of GBNF; at most {LONGEST_GBNF}", param)
    lines = filter(str.strip, text.splitlines())  # many blank ones take the translator minutes
    try:
        return str(any_to_lark("\n".join(lines)))
    except RecursionError:
        raise InvalidRequest(f"{param} is nested too deeply", param) from None
    except Exception as error:  # the translator raises plain ones too
        raise InvalidRequest(f"{param} is not valid GBNF: {error}", param) from None


def _embedded(lark: str, param: str) -> dict[str, Any]:
    """Schemas within a grammar are held to the same rules."""
    parts, last = [], 0
    try:
        for begin, end, schema in embedded(lark):
            parts += [lark[last:begin], json.dumps({**checked(schema, param), "x-guidance": SPACED})]
            last = end
    except InvalidRequest:
        raise
    except ValueError as error:
        told = f"{param}: the schema after %json is not valid JSON: {error}"
        raise InvalidRequest(told, param) from None
    return {"lark_grammar": "".join(parts) + lark[last:], "places": [param] * (len(parts) // 2)}
