"""Memory that is in use is given pages, and large ones; what it holds stays."""

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.engine import pages

SIZE = 32 * 2**20


@pytest.fixture
def memory() -> np.ndarray:
    """Bytes that have no page yet."""
    return np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def place(memory: np.ndarray) -> pages.Place:
    return memory.ctypes.data, memory.nbytes


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def large() -> int:
    """Bytes of it in large pages."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(found[1]) * 1024 if found else 0


def can_collapse() -> bool:
    """Whether this system moves memory to large pages; asked without the code under test."""
    if not pages.LARGE.exists():
        return False
    memory = np.frombuffer(mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    memory[:] = 1
    size, madvise_collapse = int(pages.LARGE.read_text()), 25
    start = ctypes.c_void_p(-(-memory.ctypes.data // size) * size)
    return ctypes.CDLL(None).madvise(start, ctypes.c_size_t(size), madvise_collapse) == 0


def finish(work: Iterator[None]) -> None:
    for _ in work:
        pass


def test_memory_is_taken_while_it_is_in_use(memory):
    memory[SIZE // 2] = 7
    before = resident()
    finish(pages.take([place(memory)]))
    assert resident() - before > 0.9 * SIZE
    assert memory[SIZE // 2] == 7 and np.count_nonzero(memory) == 1


@pytest.mark.skipif(not can_collapse(), reason="this system has no large pages to give")
def test_what_is_in_use_moves_to_large_pages(memory):
    memory[:] = np.arange(SIZE, dtype=np.uint8)
    before = large()
    finish(pages.enlarge([place(memory)]))
    assert large() - before > 0.8 * SIZE
    assert (memory == np.arange(SIZE, dtype=np.uint8)).all()


def test_it_goes_by_pieces(memory):
    before = resident()
    work = pages.take([place(memory)])
    next(work), next(work)
    assert 0 < resident() - before < SIZE / 2


def test_what_is_not_there_is_no_harm():
    finish(pages.take([(0, 2**30)]))
    finish(pages.enlarge([(0, 2**24), (2**46, 2**24)]))
