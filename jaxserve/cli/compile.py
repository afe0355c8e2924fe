"""`jaxserve compile`: what a server would compile, ahead of its start."""

import argparse
import time
from typing import TYPE_CHECKING

from jaxserve.cli.flags import Parser, add_options, read_options
from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.engine.ahead import Made


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve compile",
        usage="jaxserve compile [MODEL] [OPTIONS]",
        description="Compile what a server with the same options would, so that its start finds all of it.\n"
        "No weight is read. Without MODEL: the built-in default model.",
    )
    parser.add_argument(
        "--native-only", action="store_true", help="only the C++ kernels for the CPU; takes no model"
    )
    add_options(parser, ServerConfig)
    return parser


def run(args: argparse.Namespace) -> int:
    model = args.positional_model or getattr(args, "model", None)
    if args.native_only and model:
        raise ConfigError(f"--native-only takes no model, but {model} is given")
    config = read_options(args, ServerConfig)
    from jaxserve.engine import ahead

    began = time.perf_counter()
    print(_line("C++ kernels", ahead.compile_kernels(config)), flush=True)
    if not args.native_only:
        print(_line("programs", ahead.compile_programs(config)))
    print(f"{time.perf_counter() - began:.1f} s")
    return 0


def _line(what: str, made: "Made") -> str:
    size = f"{made.bytes / 2**20:.1f} MiB at {made.place}"
    return f"{what}: {made.compiled} compiled, {made.here} were here; {size}"
