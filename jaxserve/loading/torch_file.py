"""A file of `torch.save`: tensors as views into a memory map. No torch, and nothing in the file is ever run.

The file is a zip archive of uncompressed records: a pickle that says which tensor is which view of which
storage, and the storages.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxserve.errors import ModelError
from jaxserve.loading.mapped import MappedFile
from jaxserve.loading.safetensors_file import DTYPES

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""torch's classes, by the names that safetensors has for their types."""
LATER = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
"""Types that came after these classes: their storages are bytes."""
PICKLE, ORDER = "data.pkl", "byteorder"
LOCAL = struct.Struct("<4s22xHH")
"""What stands before a record: a signature, the lengths of its name and of what follows that."""
UNREADABLE = (OSError, ValueError, zipfile.BadZipFile, struct.error, NotImplementedError)


class Record(NamedTuple):
    """A storage's place in the file, in bytes."""

    at: int
    size: int


class Entry(NamedTuple):
    """A tensor as a view of a storage; offset and strides count numbers."""

    record: Record
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """`entries` by tensor name. Raises ModelError, one line, for a file that is missing, not whole, or asks
    for anything but tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = MappedFile(path)
            if self._file.data[:2] == b"\x80\x02":
                raise ModelError(
                    f"{path} is in the format that torch wrote before 1.6: load and save it once with a "
                    f"newer one, torch.save(torch.load({path.name!r}, weights_only=True), {path.name!r})"
                )
            self._records = self._read_records()
            self.entries = self._read_entries()
        except FileNotFoundError:
            raise ModelError(f"{path} is missing") from None
        except UNREADABLE as error:
            raise ModelError(f"{path} is not a whole file of torch.save: {error}") from None

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view in the tensor's own type."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if 0 in entry.shape:
            return np.empty(entry.shape, dtype)
        numbers = self._file.numbers(dtype, _reach(entry), entry.record.at + entry.offset * dtype.itemsize)
        strides = [stride * dtype.itemsize for stride in entry.strides]
        return np.ndarray(entry.shape, dtype, numbers, 0, strides)

    def _read_records(self) -> dict[str, Record]:
        """By their names, without the folder that all are in."""
        with zipfile.ZipFile(self.path) as archive:
            return {info.filename.partition("/")[2]: self._place(info) for info in archive.infolist()}

    def _place(self, info: zipfile.ZipInfo) -> Record:
        signature, *lengths = LOCAL.unpack_from(self._file.data, info.header_offset)
        at = info.header_offset + LOCAL.size + sum(lengths)
        if signature != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"record {info.filename} is no plain part of the archive")
        if at + info.file_size > len(self._file):
            raise ValueError(f"record {info.filename} ends beyond the end of the file")
        return Record(at, info.file_size)

    def _bytes(self, name: str) -> bytes:
        if name not in self._records:
            raise ValueError(f"it has no record {name}")
        at, size = self._records[name]
        return self._file.data[at : at + size]

    def _read_entries(self) -> dict[str, Entry]:
        if ORDER in self._records and (order := self._bytes(ORDER)) != b"little":
            raise ValueError(f"its numbers are {order.decode(errors='replace')}-endian")
        try:
            found = _Unpickler(self).load()
        except (ModelError, ValueError):
            raise
        except Exception as error:  # a damaged pickle makes the interpreter of it fail in any way
            raise ValueError(f"its pickle is damaged ({type(error).__name__}: {error})") from None
        if not isinstance(found, dict):
            raise ModelError(f"{self.path} holds a {type(found).__name__}, not a dictionary of tensors")
        for name, entry in found.items():
            if not isinstance(name, str) or not isinstance(entry, Entry):
                raise ModelError(f"{name!r} in {self.path} is a {type(entry).__name__}, not a tensor")
            self._check(name, entry)
        return dict(found)

    def _check(self, name: str, entry: Entry) -> None:
        numbers = (entry.offset, *entry.shape, *entry.strides)
        if len(entry.shape) != len(entry.strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"tensor {name} has shape {entry.shape} and strides {entry.strides}")
        if (entry.offset + _reach(entry)) * DTYPES[entry.dtype].itemsize > entry.record.size:
            raise ValueError(f"tensor {name} {list(entry.shape)} ends beyond its storage")


def _reach(entry: Entry) -> int:
    """How many numbers of its storage a tensor spans."""
    if 0 in entry.shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(entry.shape, entry.strides, strict=True))


class _Unpickler(pickle._Unpickler):  # Python's own: in the one written in C a number can ask for all memory
    """What names a global gets one of the few functions here, or a refusal."""

    def __init__(self, file: TorchFile):
        super().__init__(io.BytesIO(file._bytes(PICKLE)))
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        # new for each file: a pickle can set attributes of what it is given
        functions: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor": lambda storage, *view: Entry(*storage, *view),
            "torch._utils._rebuild_tensor_v2": lambda storage, *view: Entry(*storage, *view[:3]),
            "torch._utils._rebuild_tensor_v3": lambda storage, *view: Entry(storage[0], view[5], *view[:3]),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        full = f"{module}.{name}"
        if full in functions:
            return functions[full]
        if module in ("torch", "torch.storage") and name in (*STORAGES, *LATER, "UntypedStorage"):
            return STORAGES.get(name) or LATER.get(name, "U8")
        raise ModelError(
            f"{self._file.path} is refused: its pickle asks for {full}, which is no tensor's part"
        )

    def persistent_load(self, pid: Any) -> tuple[Record, str]:
        """A storage: `pid` is ("storage", type, key, device, how many numbers)."""
        _, dtype, key, _, count = pid
        record = self._file._records.get(f"data/{key}")
        if record is None:
            raise ValueError(f"the storage data/{key} is missing")
        if (size := DTYPES[dtype].itemsize * count) > record.size:
            raise ValueError(f"the storage data/{key} has {record.size} bytes, not {size}")
        return record, dtype
