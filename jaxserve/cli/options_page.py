"""Writes docs/configuration.md from the options: `python -m jaxserve.cli.options_page > FILE`."""

from collections.abc import Iterator

from jaxserve.aliases import FIXED, MESH, RENAMED, VALUES
from jaxserve.config import EngineConfig, ServerConfig
from jaxserve.options import Option, describe

HEAD = """\
# Options

Every option is a flag of `jaxserve serve` (`--max-model-len 2048`), a keyword of `Engine` if it is one of the
engine's (`Engine(max_model_len=2048)`), and a line of a file given as `--config FILE` (TOML, or YAML; `-` and
`_` are the same in names). A flag wins over the file. An unknown name is refused and the nearest one named.

A switch has a `--no-` form. A list is given once (`--api-key a b`, `--api-key a,b`) or several times. An
empty default is chosen for the model and the device, or means none.
"""
KNOWN = """\

## Names known from vLLM

The flags, `--config` files and `LLM(...)` take these as well:
"""
REFUSED = """\

Others have one value here. Given another, they are refused with the reason:

| name | value | because |
|---|---|---|"""


def page() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    engine = describe(EngineConfig)
    yield HEAD
    yield "## Engine\n"
    yield from _table(list(engine.values()))
    yield "\n## Server\n"
    yield from _table([option for option in describe(ServerConfig).values() if option.name not in engine])
    yield KNOWN
    yield from _rows("name", "option")
    for name, ours in RENAMED.items():
        yield f"| `{name}` | `{ours}` |"
    for name, axis in zip(MESH, ("tensor", "data"), strict=True):
        yield f"| `{name}` | `mesh`, axis {axis} |"
    for option, values in VALUES.items():
        for value, ours in values.items():
            yield f"| `{option}` {value} | `{option}` {ours} |"
    yield REFUSED
    for name, fixed in FIXED.items():
        yield f"| `{name}` | {_shown(fixed.value)} | {fixed.why} |"


def _table(options: list[Option]) -> Iterator[str]:
    yield from _rows("option", "type", "default", "what it is")
    for option in options:
        kind = " or ".join(option.choices) or ("list of " if option.many else "") + option.type.__name__
        yield f"| `{option.name}` | {kind} | {_shown(option.default)} | {option.about} |"


def _rows(*titles: str) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + "---|" * len(titles)


def _shown(value: object) -> str:
    return "" if value is None else f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
