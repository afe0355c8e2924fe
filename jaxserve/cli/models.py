"""`jaxserve models`: the models that are here."""

import argparse
import sys

from jaxserve.cli.flags import Parser


def parser() -> Parser:
    return Parser(prog="jaxserve models", description="List the models that were fetched.")


def run(args: argparse.Namespace) -> int:
    from jaxserve.loading import hub

    entries = hub.list_models()
    if not entries:
        print("no models yet: jaxserve pull fetches the default one", file=sys.stderr)
        return 0
    width = max(len(entry.ref) for entry in entries)
    for entry in entries:
        print(f"{entry.ref:{width}}  {entry.bytes / 1e6:9,.1f} MB  {entry.path}")
    return 0
