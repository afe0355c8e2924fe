"""Memory that is in use is given pages, and large ones; what it holds stays."""

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


def finish(work: Iterator[None]) -> None:
    for _ in work:
        pass


def test_memory_is_taken_while_it_is_in_use(memory):
    memory[SIZE // 2] = 7
    before = resident()
    finish(pages.take([place(memory)]))
    assert resident() - before > 0.9 * SIZE
    assert memory[SIZE // 2] == 7 and np.count_nonzero(memory) == 1


def test_what_is_in_use_moves_to_large_pages(memory):
    memory[:] = np.arange(SIZE, dtype=np.uint8)
    before = large()
    finish(pages.enlarge([place(memory)]))
    if large() == before:
        pytest.skip("this system has no large pages to give")
    assert large() - before > 0.8 * SIZE
    assert (memory == np.arange(SIZE, dtype=np.uint8)).all()


def test_it_goes_by_pieces(memory):
    before = resident()
    work = pages.take([place(memory)])
    next(work), next(work)
    assert 0 < resident() - before < SIZE / 2
    memory[:] = 1
    assert sum(1 for _ in pages.enlarge([place(memory)])) >= SIZE // int(pages.LARGE.read_text())


def test_what_is_not_there_is_no_harm():
    finish(pages.take([(0, 2**30)]))
    finish(pages.enlarge([(0, 2**24), (2**46, 2**24)]))
