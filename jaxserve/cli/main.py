"""Dispatch: one module per command, imported only when it is asked for."""

import importlib
import os
import sys
from collections.abc import Sequence

from jaxserve import __version__
from jaxserve.cli.flags import Parser
from jaxserve.errors import JaxserveError

COMMANDS = {
    "serve": "serve a model over an OpenAI-compatible API",
    "chat": "chat with a model in the terminal",
    "compile": "compile what a server would, ahead of its start",
    "plan": "say what a model takes on a device and what then fits, before anything is loaded",
    "pull": "fetch a model",
    "convert": "write a model with its tensors in Orbax, JAX's own format",
    "models": "list the models that are here",
    "bench": "measure an engine or any OpenAI-compatible server, and compare results",
    "doctor": "say what device, driver, kernels and caches there are, and what is wrong",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. A user's error is one line on stderr and code 1 (usage: 2)."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv[:1])
    command = importlib.import_module(f"jaxserve.cli.{args.command}")
    try:
        options = command.parser().parse_args(argv[1:])
        return command.run(options)
    except JaxserveError as error:
        print(f"jaxserve: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe left; nothing more can be said on stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> Parser:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{about}" for name, about in COMMANDS.items()]
    parser = Parser(
        prog="jaxserve",
        usage="jaxserve COMMAND [OPTIONS]",
        description="An inference and serving engine for large language models on JAX.",
        epilog="\n".join(["commands:", *lines, "", "jaxserve COMMAND --help lists a command's options."]),
    )
    parser.add_argument("--version", action="version", version=f"jaxserve {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser
