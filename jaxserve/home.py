"""Where jaxserve keeps what it fetched and built."""

import os
from pathlib import Path


def home() -> Path:
    """`$JAXSERVE_HOME`, or a directory in the user's cache."""
    chosen = os.environ.get("JAXSERVE_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "jaxserve"
