"""What was measured in the place of arithmetic: a JSON file for each kind of device, as
`python -m jaxserve.pallas_kernels.tune` writes it, found by the name of the device that is traced for."""

import contextlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax

FOLDER = Path(__file__).parent
Key = tuple[Any, ...]
"""A line of a kernel's table."""


class Tuning(NamedTuple):
    """The sizes to use on one kind of device, where they are not those of the kernels' own tables."""

    variants: dict[str, dict[Key, dict[str, int]]] = {}  # noqa: RUF012 (nothing adds to it)
    """Of each implementation: the sizes of some lines of its table."""
    filled: int | None = None
    """Programs that fill the device."""


_trial: list[Tuning] = []


def merged(kernel: str, table: dict[Key, Any]) -> dict[Key, Any]:
    """A kernel's table with the sizes that were measured."""
    found = current().variants.get(kernel, {})
    return {key: variant._replace(**found.get(key, {})) for key, variant in table.items()}


def current() -> Tuning:
    """For the device that is traced for."""
    if _trial:
        return _trial[-1]
    target = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or jax.devices()[0]
    return read(target.device_kind)


@contextlib.contextmanager
def instead(trial: Tuning) -> Iterator[None]:
    """Kernels that are traced meanwhile have these sizes."""
    _trial.append(trial)
    try:
        yield
    finally:
        _trial.pop()


@cache
def read(device_kind: str) -> Tuning:
    """What the tuner found on that kind of device."""
    for file in FOLDER.glob("*.json"):
        found = json.loads(file.read_text())
        if found["device_kind"] == device_kind:
            variants: dict[str, dict[Key, dict[str, int]]] = {}
            for line in found["lines"]:
                variants.setdefault(line["kernel"], {})[tuple(line["key"])] = line["variant"]
            return Tuning(variants, found["filled"])
    return Tuning()
