"""The options structs of config.py, described (for flags and docs) and filled from plain values."""

import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

from jaxserve.errors import ConfigError

Config = TypeVar("Config", bound=msgspec.Struct)


class Option(NamedTuple):
    name: str
    type: type[bool] | type[int] | type[float] | type[str]
    """Of the value, or of each item of a list."""
    many: bool
    choices: tuple[str, ...]
    default: Any
    about: str


@cache
def describe(config: type[msgspec.Struct]) -> dict[str, Option]:
    """Every option of a config struct by name, in the order of its definition."""
    return {option.name: option for option in _options(config)}


def build(config: type[Config], options: Mapping[str, Any]) -> Config:
    """The config with these options, every type checked.

    A path stands for its text, and one string for a list of one.
    Raises `ConfigError` naming the option that is wrong.
    """
    known = describe(config)
    try:
        return msgspec.convert({name: _plain(known.get(name), v) for name, v in options.items()}, config)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        problem, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        if name in known and known[name].choices:
            problem = f"must be one of {', '.join(known[name].choices)}, not {options[name]!r}"
        raise ConfigError(f"{name}: {problem[:1].lower()}{problem[1:]}" if name else problem) from None


def _options(config: type[msgspec.Struct]) -> Iterator[Option]:
    for field in inspect.type_info(config).fields:  # type: ignore[attr-defined]
        assert isinstance(field.type, inspect.Metadata), f"{field.name} needs a description"
        about = (field.type.extra_json_schema or {})["description"]
        kind = _without_none(field.type.type)
        many = isinstance(kind, inspect.ListType)
        item = kind.item_type if isinstance(kind, inspect.ListType) else kind
        choices = tuple(map(str, item.values)) if isinstance(item, inspect.LiteralType) else ()
        yield Option(field.name, _TYPES[type(item)], many, choices, field.default, about)


_TYPES: dict[type[inspect.Type], Any] = {
    inspect.BoolType: bool,
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.StrType: str,
    inspect.LiteralType: str,
}


def _without_none(kind: inspect.Type) -> inspect.Type:
    if not isinstance(kind, inspect.UnionType):
        return kind
    (only,) = (t for t in kind.types if not isinstance(t, inspect.NoneType))
    return only


def _plain(option: Option | None, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if option is not None and option.many and isinstance(value, str):
        return [value]
    return value
