"""A file in memory as long as it is looked at."""

import mmap
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike


class MappedFile:
    """A file's bytes in `data`. Raises OSError, and ValueError for an empty file."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.data)

    def numbers(self, dtype: DTypeLike, count: int, at: int) -> np.ndarray:
        """A read-only view [count] of the numbers from byte `at` on. When it and all views of it are gone,
        its pages are too: a model that was read would else be in memory twice."""
        view = np.frombuffer(self.data, dtype, count, at)
        weakref.finalize(view, _forget, self.data, at, view.nbytes).atexit = False
        return view


def _forget(data: mmap.mmap, at: int, size: int) -> None:
    start = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
    if start < at + size:
        data.madvise(mmap.MADV_DONTNEED, start, at + size - start)  # who looks again reads them again
