"""Command-line flags made from the options of config.py, and vLLM's names for them."""

import argparse
import json
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

from jaxserve import aliases
from jaxserve.cli.config_file import read_config
from jaxserve.options import Config, Option, build, describe

SHORT = {
    "tensor_parallel_size": ["-tp"],
    "data_parallel_size": ["-dp"],
    "max_concurrency": ["--concurrency"],
    "dataset_path": ["--dataset"],
}


class Parser(argparse.ArgumentParser):
    """Errors are one line; `--max_model_len` is `--max-model-len`; nothing is abbreviated."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = [_dashed(arg) for arg in (sys.argv[1:] if args is None else args)]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {unknown[0]}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jaxserve: {message} (see {self.prog} --help)\n")


def add_options(parser: Parser, config: type[Config]) -> None:
    """A flag for every option of `config`, `--config FILE`, the model as a positional, and vLLM's names."""
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", default=None, help=SUPPRESS)
    options = describe(config)
    group = parser.add_argument_group("engine and server" if "port" in options else "engine")
    group.add_argument("--config", metavar="FILE", help="TOML or YAML file of options; flags win over it")
    for option in options.values():
        add_option(group, option)
    known = parser.add_argument_group("names known from vLLM")
    for name, ours in aliases.RENAMED.items():
        _add(known, name, options[ours], f"same as {_flag(ours)}")
    for name, axis in zip(aliases.MESH, ("tensor", "data"), strict=True):
        _add(known, name, Option(name, int, False, (), 1, ""), f"{axis} axis of --mesh")
    for name, fixed in aliases.FIXED.items():
        kind = str if fixed.value is None else type(fixed.value)
        _add(known, name, Option(name, kind, False, (), None, ""), SUPPRESS)


def read_options(args: argparse.Namespace, config: type[Config]) -> Config:
    """The config that a parsed command line asks for. Raises `ConfigError`."""
    names = {*describe(config), *aliases.RENAMED, *aliases.MESH, *aliases.FIXED}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.positional_model is not None:
        if "model" in given:
            raise aliases.repeated("MODEL", "--model")
        given["model"] = args.positional_model
    from_file = read_config(args.config) if args.config else {}
    if any(name in given for name in aliases.MESH):  # two names of one option: what is not given stays
        given = {name: from_file[name] for name in aliases.MESH if name in from_file} | given
    return build(config, {**aliases.translate(from_file, config), **aliases.translate(given, config)})


def given_flags(args: argparse.Namespace, config: type[Config]) -> list[str]:
    """The engine's flags that stand on the command line."""
    names = [*describe(config), *aliases.RENAMED, *aliases.MESH, *aliases.FIXED]
    return [_flag(name) for name in names if hasattr(args, name)]


def add_option(group: Any, option: Option) -> None:
    """A flag for one option; without it the parsed arguments lack its name."""
    _add(group, option.name, option, f"{option.about}{_default(option)}")


def _add(group: Any, name: str, option: Option, about: str) -> None:
    flags = [_flag(name), *SHORT.get(name, [])]
    about = about if about == SUPPRESS else about.replace("%", "%%")
    shown: dict[str, Any] = {"dest": name, "default": SUPPRESS, "help": about}
    if option.type is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **shown)
    elif option.many:
        name = option.name.upper()
        items = partial(_items, option.type)
        group.add_argument(*flags, action=_Extend, nargs="+", type=items, metavar=name, **shown)
    elif option.choices:
        extra = aliases.VALUES.get(option.name, {})
        metavar = "{" + ",".join(option.choices) + "}"
        group.add_argument(*flags, choices=[*option.choices, *extra], metavar=metavar, **shown)
    else:
        metavar = {int: "N", float: "X", str: "TEXT"}[option.type]
        group.add_argument(*flags, type=option.type, metavar=metavar, **shown)


class _Extend(argparse.Action):
    """Collects the items of a flag given once with several, or several times."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        items = [item for value in values for item in value]
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), *items])


_PLURAL = {str: "strings", int: "whole numbers", float: "numbers"}


def _items(kind: type, text: str) -> list[Any]:
    """`a,b` or, as vLLM has it, a JSON list."""
    if not text.startswith("["):
        try:
            return [kind(item) for item in text.split(",") if item]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text} must hold {_PLURAL[kind]} only") from None
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text} is not a JSON list: {error}") from None
    accepted = (int, float) if kind is float else kind
    if not all(isinstance(item, accepted) and not isinstance(item, bool) for item in items):
        raise argparse.ArgumentTypeError(f"{text} must hold {_PLURAL[kind]} only")
    return [kind(item) for item in items]


def _default(option: Option) -> str:
    return "" if option.default is None else f" (default: {option.default})"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value
