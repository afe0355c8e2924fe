"""Tensors in a directory of Orbax, JAX's own format, with their shapes and types in a file beside it.

They are read one at a time. The file is ours: Orbax itself tells shapes only to who has imported jax.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.loading.safetensors_file import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]


class OrbaxDirectory:
    """`entries` by tensor name. Raises ModelError, one line, for a directory that is not whole."""

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._one_at_a_time = threading.Lock()
        try:
            self.entries = msgspec.json.decode(index(path).read_bytes(), type=dict[str, Entry])
        except (OSError, msgspec.DecodeError) as error:
            raise ModelError(f"{index(path)} cannot be read: {error}") from None

    def tensor(self, name: str) -> np.ndarray:
        """Reads it."""
        from orbax.checkpoint import PyTreeCheckpointer, RestoreArgs
        from orbax.checkpoint.args import PyTreeRestore

        as_array = {name: RestoreArgs(restore_type=np.ndarray)}
        wanted = PyTreeRestore({name: 0}, restore_args=as_array, partial_restore=True)
        try:
            with self._one_at_a_time:
                found: np.ndarray = PyTreeCheckpointer().restore(self.path, args=wanted)[name]
        except Exception as error:  # of any of the libraries below
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"tensor {name} in {self.path} cannot be read: {reason}") from None
        if Entry(NAMES.get(found.dtype, ""), found.shape) != self.entries[name]:
            raise ModelError(f"tensor {name} in {self.path} is not what {index(self.path)} says")
        return found


def index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index.json")


def save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a directory that OrbaxDirectory reads."""
    from orbax.checkpoint import PyTreeCheckpointer

    PyTreeCheckpointer().save(path.absolute(), dict(tensors))
    entries = {name: Entry(NAMES[value.dtype], value.shape) for name, value in tensors.items()}
    index(path).write_bytes(msgspec.json.encode(entries))
