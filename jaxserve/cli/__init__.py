"""The `jaxserve` command."""

from jaxserve.cli.main import main

__all__ = ["main"]
