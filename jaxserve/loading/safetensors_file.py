"""A safetensors file: a JSON header, and tensors as views into a memory map.

The library's own reader copies every tensor, and its numpy side knows no float8.
Layout: https://github.com/huggingface/safetensors#format
"""

import math
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.loading.mapped import MappedFile

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
LENGTH = 8
"""Bytes of the number that the file begins with: how long the header is."""


class Entry(msgspec.Struct):
    """A tensor's line in the header; offsets count from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """`entries` by tensor name. Raises ModelError, one line, for a file that is missing or not whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = MappedFile(path)
            self._start = LENGTH + int.from_bytes(self._file.data[:LENGTH], "little")
            if self._start > len(self._file):
                raise ValueError("the header ends beyond the end of the file")
            header = msgspec.json.decode(self._file.data[LENGTH : self._start], type=dict[str, msgspec.Raw])
            header.pop("__metadata__", None)
            self.entries = {name: msgspec.json.decode(raw, type=Entry) for name, raw in header.items()}
            for name, entry in self.entries.items():
                self._check(name, entry)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing") from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} is not a whole safetensors file: {error}") from None

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view in the tensor's own type."""
        entry = self.entries[name]
        start = self._start + entry.data_offsets[0]
        return self._file.numbers(DTYPES[entry.dtype], math.prod(entry.shape), start).reshape(entry.shape)

    def _check(self, name: str, entry: Entry) -> None:
        if entry.dtype not in DTYPES:
            supported = ", ".join(DTYPES)
            raise ModelError(f"tensor {name} in {self.path} has type {entry.dtype}; supported: {supported}")
        start, end = entry.data_offsets
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        if min((start, *entry.shape)) < 0 or end - start != size:
            raise ValueError(f"tensor {name} {list(entry.shape)} has {end - start} bytes, not {size}")
        if self._start + end > len(self._file):
            raise ValueError(f"tensor {name} ends beyond the end of the file")
