"""`jaxserve serve`: the server."""

import argparse

from jaxserve.cli.flags import Parser, add_options, read_options
from jaxserve.config import ServerConfig


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve serve",
        usage="jaxserve serve [MODEL] [OPTIONS]",
        description="Serve a model over an OpenAI-compatible API. Without MODEL: the built-in default model.",
    )
    add_options(parser, ServerConfig)
    return parser


def run(args: argparse.Namespace) -> int:
    config = read_options(args, ServerConfig)
    from jaxserve.server.main import run as serve

    return serve(config)
