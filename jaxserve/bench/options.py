"""What the benchmarks' command lines share: options from structs, and where results go."""

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from jaxserve.cli.flags import Parser, add_option
from jaxserve.config import about
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.options import build, describe

if TYPE_CHECKING:
    from jaxserve.bench.results import Result

Struct = TypeVar("Struct", bound=msgspec.Struct)


class Reporting(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where a result goes."""

    output: Annotated[str | None, about("JSON file for the result, with every sample")] = None
    plots: Annotated[str | None, about("directory for plots (PNG)")] = None
    label: Annotated[str | None, about("name of what is measured, in the file, plots and comparisons")] = None

    def check(self) -> None:
        """Before anything is measured: can the result be written?"""
        if self.plots:
            needs("matplotlib")
        for path in (self.plots, self.output and Path(self.output).parent):
            if path:
                try:
                    Path(path).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ConfigError(f"cannot write to {path}: {error.strerror}") from None
        if self.output and Path(self.output).is_dir():
            raise ConfigError(f"cannot write to {self.output}: it is a directory")

    def finish(self, result: "Result") -> None:
        if self.output:
            from jaxserve.bench import results

            results.write(result, self.output)
        if self.plots:
            from jaxserve.bench import plots

            for path in plots.draw([result], Path(self.plots)):
                print(f"wrote {path}")


def add(parser: Parser, *structs: type[msgspec.Struct]) -> None:
    for struct in structs:
        for option in describe(struct).values():
            add_option(parser, option)


def read(args: Namespace, struct: type[Struct]) -> Struct:
    """Raises ConfigError naming the option that is wrong."""
    return build(struct, {name: value for name, value in vars(args).items() if name in describe(struct)})


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise JaxserveError(f"this needs {package}: pip install 'jaxserve[bench]'")
