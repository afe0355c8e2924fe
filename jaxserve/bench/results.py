"""What a benchmark leaves: a JSON file with its options, where it ran, and every sample."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from jaxserve import __version__
from jaxserve.bench.client import Record
from jaxserve.errors import ConfigError

Kind = Literal["serve", "throughput", "latency", "startup"]
FORMAT = 1
PACKAGES = ("jax", "jaxlib", "numpy", "aiohttp")


class Step(msgspec.Struct, array_like=True):
    """One step of the engine: when it began, counted from the begin of the run, and how long it took (s)."""

    start: float
    seconds: float
    tokens: int
    rows: int
    """Tokens that its program has room for."""
    program: str


class Run(msgspec.Struct, kw_only=True):
    """One measurement. Runs of the same `setting` differ in their `round`."""

    setting: dict[str, Any]
    round: int = 0
    duration: float
    """Seconds."""
    counts: dict[str, Any] = {}
    summary: dict[str, Any]
    """Metric -> a number, or its mean and percentiles."""
    samples: dict[str, list[float]]
    """What the summary was made of; of `itl_ms` the requests' times are."""
    requests: list[Record] = []
    steps: list[Step] = []


class _Head(msgspec.Struct):
    """What every format begins with."""

    format: int


class Result(msgspec.Struct, kw_only=True):
    format: int = FORMAT
    kind: Kind
    label: str
    created: str
    options: dict[str, Any]
    environment: dict[str, Any]
    runs: list[Run]


def new_result(kind: Kind, label: str, options: dict[str, Any]) -> Result:
    """A result without runs, of this moment and machine."""
    return Result(
        kind=kind,
        label=label,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        options=options,
        environment=environment(),
        runs=[],
    )


def environment() -> dict[str, Any]:
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    found = {
        "jaxserve": __version__,
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    return found | ({"git_commit": commit} if (commit := _commit()) else {})


def read(path: str) -> Result:
    """Raises ConfigError for a file that is no result of this format."""
    try:
        data = Path(path).read_bytes()
        found = msgspec.json.decode(data, type=_Head).format
        if found != FORMAT:
            raise ConfigError(f"{path} has the format {found}; this jaxserve reads {FORMAT}")
        return msgspec.json.decode(data, type=Result)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is no result of jaxserve bench: {error}") from None


def write(result: Result, path: str) -> None:
    try:
        Path(path).write_bytes(msgspec.json.encode(result))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _commit() -> str | None:
    """Of the checkout that this package runs from, with + where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        done = subprocess.run(
            [*git, "describe", "--always", "--abbrev=12", "--dirty=+"], capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None
