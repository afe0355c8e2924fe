"""A GGUF file: metadata decoded only where it is asked for, tensors as memory-mapped views.

The `gguf` package dequantises; its reader makes an array of every token and merge, which takes seconds.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxserve.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value types of fixed size, as `struct` codes."""

PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16)}
QUANTISED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
"""ggml tensor types by number."""


class Entry(NamedTuple):
    """A tensor in the file: shape as in numpy (rows first), ggml type, offset in the data section."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Metadata(Mapping[str, Any]):
    """Key-value pairs, each decoded when it is first read."""

    def __init__(self, data: mmap.mmap, places: dict[str, tuple[int, int]]):
        self._data = data
        self._places = places
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, at = self._places[key]
            self._values[key] = _Reader(self._data, at).value(kind)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class GGUFFile:
    """Raises ModelError, one line, for a file that is no GGUF, is cut short or has an unknown type."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header()
        except (OSError, ValueError, struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
            raise ModelError(f"{self.path} is not a whole GGUF file: {error}") from None

    def dequantised(self, name: str) -> np.ndarray:
        """A tensor as float32, or as a view of its own type where it is F32, F16 or BF16."""
        entry = self.tensors[name]
        raw = self._raw(name)
        if entry.kind in PLAIN:
            return raw.view(PLAIN[entry.kind]).reshape(entry.shape)
        from gguf.quants import dequantize

        return dequantize(raw, _quantisation(entry.kind)).reshape(entry.shape)

    def _raw(self, name: str) -> np.ndarray:
        entry = self.tensors[name]
        rows, width = int(np.prod(entry.shape[:-1], dtype=int)), self._row_bytes(entry)
        start = self._start + entry.offset
        return np.frombuffer(self._data, np.uint8, rows * width, start).reshape(rows, width)

    @staticmethod
    def _row_bytes(entry: Entry) -> int:
        if entry.kind in PLAIN:
            return entry.shape[-1] * PLAIN[entry.kind].itemsize
        from gguf.constants import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[_quantisation(entry.kind)]
        if entry.shape[-1] % block:
            raise ValueError(f"a row of {entry.shape[-1]} numbers is not made of blocks of {block}")
        return entry.shape[-1] // block * size

    def _read_header(self) -> None:
        reader = _Reader(self._data, 0)
        if self._data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        reader.at = 4
        if (version := reader.scalar("I")) not in VERSIONS:
            raise ValueError(f"version {version}, supported are {VERSIONS}")
        tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
        places: dict[str, tuple[int, int]] = {}
        for _ in range(pairs):
            key, kind = reader.string(), reader.scalar("I")
            places[key] = (kind, reader.at)
            reader.skip(kind)
        self.metadata = Metadata(self._data, places)
        self.tensors: dict[str, Entry] = {}
        for _ in range(tensors):
            name, rank = reader.string(), reader.scalar("I")
            shape = tuple(reader.scalar("Q") for _ in range(rank))[::-1]
            self.tensors[name] = Entry(shape, reader.scalar("I"), reader.scalar("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self._start = -(-reader.at // alignment) * alignment
        for name, entry in self.tensors.items():
            self._check(name, entry)

    def _check(self, name: str, entry: Entry) -> None:
        if entry.kind not in PLAIN and entry.kind not in QUANTISED:
            supported = ", ".join(["F32", "F16", "BF16", *QUANTISED.values()])
            raise ModelError(
                f"tensor {name} in {self.path} has ggml type {_type_name(entry.kind)}; supported: {supported}"
            )
        size = int(np.prod(entry.shape[:-1], dtype=int)) * self._row_bytes(entry)
        if self._start + entry.offset + size > len(self._data):
            raise ValueError(f"tensor {name} ends beyond the end of the file")


class _Reader:
    """A position in the header."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data = data
        self.at = at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise ValueError("a string ends beyond the end of the file")
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            values = np.frombuffer(self.data, "<" + SCALARS[item], count, self.at)
            self.at += values.nbytes
            return values.tolist()
        return [self.value(item) for _ in range(count)]

    def skip(self, kind: int) -> None:
        if kind == STRING:
            self.at += 8 + self.peek_length()
        elif kind != ARRAY:
            self.at += struct.calcsize("<" + SCALARS[kind])
        else:
            self._skip_array()
        if self.at > len(self.data):
            raise ValueError("the metadata ends beyond the end of the file")

    def peek_length(self) -> int:
        length: int = struct.unpack_from("<Q", self.data, self.at)[0]
        return length

    def _skip_array(self) -> None:
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            self.at += count * struct.calcsize("<" + SCALARS[item])
        elif item == STRING:
            # the longest part of a header: 49,152 tokens and as many merges
            at, data, unpack = self.at, self.data, struct.Struct("<Q").unpack_from
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
            self.at = at
        else:
            for _ in range(count):
                self.skip(item)


def _quantisation(kind: int) -> Any:
    from gguf.constants import GGMLQuantizationType

    return GGMLQuantizationType(kind)


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return str(GGMLQuantizationType(kind).name)
    except ValueError:
        return f"number {kind}"
