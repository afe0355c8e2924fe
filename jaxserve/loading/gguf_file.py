"""A GGUF file: metadata decoded only where it is asked for, tensors read through a memory map.

The reader of the `gguf` package makes an array of every token and merge, which takes seconds.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from jaxserve.errors import ModelError
from jaxserve.loading.dequantise import FORMATS, Format, dequantise
from jaxserve.loading.mapped import MappedFile

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_RANK = 4
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value types of fixed size, as `struct` codes."""

PAST_END = "the header goes on past the end of the file"


class Entry(NamedTuple):
    """A tensor in the file: shape as in numpy (rows first), its format, its place in the data section."""

    shape: tuple[int, ...]
    form: Format
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.form.size * self.form.layout.itemsize


class Metadata(Mapping[str, Any]):
    """Key-value pairs, each decoded when it is first read. Raises ModelError for one that cannot be."""

    def __init__(self, path: Path, data: mmap.mmap, places: dict[str, tuple[int, int]]):
        self._path = path
        self._data = data
        self._places = places
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            kind, at = self._places[key]
            try:
                self._values[key] = _Reader(self._data, at).value(kind)
            except ValueError as error:
                raise ModelError(f"{key} in {self._path} cannot be read: {error}") from None
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class GGUFFile:
    """`metadata` and `tensors` of a file. Raises ModelError, one line, for a file that is not whole."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.tensors: dict[str, Entry] = {}
        try:
            self._file = MappedFile(self.path)
            self._read_header()
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.path} is not a whole GGUF file: {error}") from None

    def dequantised(self, name: str, dtype: DTypeLike = np.float32) -> np.ndarray:
        """A tensor as `dtype`, or as a view of its own type where it is F32, F16 or BF16."""
        entry = self.tensors[name]
        raw = self._file.numbers(np.uint8, entry.bytes, self._start + entry.offset)
        return dequantise(raw, entry.form, dtype).reshape(entry.shape)

    def _read_header(self) -> None:
        data = self._file.data
        reader = _Reader(data, len(MAGIC))
        if data[: len(MAGIC)] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := reader.scalar("I")) not in VERSIONS:
            raise ValueError(f"version {version}; supported are {VERSIONS}")
        tensors, pairs = reader.scalar("Q"), reader.scalar("Q")
        places: dict[str, tuple[int, int]] = {}
        for _ in range(pairs):
            key, kind = reader.string(), reader.scalar("I")
            if key in places:
                raise ValueError(f"the key {key!r} comes twice")
            places[key] = (kind, reader.at)
            reader.skip(kind)
        self.metadata = Metadata(self.path, data, places)
        for _ in range(tensors):
            self._read_entry(reader)
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        self._start = -(-reader.at // alignment) * alignment
        for name, entry in self.tensors.items():
            if self._start + entry.offset + entry.bytes > len(data):
                raise ValueError(f"tensor {name} ends beyond the end of the file")

    def _read_entry(self, reader: "_Reader") -> None:
        name, rank = reader.string(), reader.scalar("I")
        if name in self.tensors:
            raise ValueError(f"the tensor {name!r} comes twice")
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"tensor {name} has {rank} dimensions")
        shape = tuple(reader.scalar("Q") for _ in range(rank))[::-1]
        kind, offset = reader.scalar("I"), reader.scalar("Q")
        if (form := FORMATS.get(kind)) is None:
            known = ", ".join(form.name for form in FORMATS.values())
            raise ModelError(
                f"tensor {name} in {self.path} has ggml type {_type_name(kind)}; supported: {known}"
            )
        if shape[-1] % form.size:
            raise ValueError(f"tensor {name} has rows of {shape[-1]}, which {form.name} cannot hold")
        self.tensors[name] = Entry(shape, form, offset)


class _Reader:
    """A position in the header. Raises ValueError at the end of the file, before anything is allocated."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data = data
        self.at = at

    def advance(self, size: int) -> int:
        """Step over `size` bytes; where they began."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError(PAST_END)
        return start

    def scalar(self, code: str) -> Any:
        start = self.advance(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.advance(length)
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(_code(kind))
        item, count = self.scalar("I"), self.scalar("Q")
        if item == STRING:
            return [self.string() for _ in range(count)]
        start = self.advance(count * struct.calcsize("<" + _code(item)))
        return np.frombuffer(self.data, "<" + _code(item), count, start).tolist()

    def skip(self, kind: int) -> None:
        if kind == STRING:
            self.advance(self.scalar("Q"))
        elif kind != ARRAY:
            self.advance(struct.calcsize("<" + _code(kind)))
        else:
            item, count = self.scalar("I"), self.scalar("Q")
            if item == STRING:
                self._skip_strings(count)
            else:
                self.advance(count * struct.calcsize("<" + _code(item)))

    def _skip_strings(self, count: int) -> None:
        # the longest part of a header, a vocabulary and its merges: no call for each of them
        at, data, unpack, end = self.at, self.data, struct.Struct("<Q").unpack_from, len(self.data) - 8
        for _ in range(count):
            if at > end:
                raise ValueError(PAST_END)
            at += 8 + unpack(data, at)[0]
        self.advance(at - self.at)


def _code(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of unknown type {kind}")
    return SCALARS[kind]


def _type_name(kind: int) -> str:
    from gguf.constants import GGMLQuantizationType

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"
