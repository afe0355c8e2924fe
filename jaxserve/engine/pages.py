"""Pages of memory: given by the system before requests need them, and large where large ones are to be had.

Each function goes on by a piece when it is asked for the next: who has threads waiting for memory asks later.
Only Linux 6.1 and later does all of it; what a system cannot do is left undone.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 23, 25
PIECE = 4 * 2**20
"""Bytes taken at a time: meanwhile no other thread can be given or give back memory."""
LARGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")

Place = tuple[int, int]
"""(address, bytes) of memory, which may be in use."""


def take(places: Iterable[Place]) -> Iterator[None]:
    """Have the system give all pages of what is still empty, large ones if it can."""
    page = os.sysconf("SC_PAGE_SIZE")
    whole = [(-(-address // page) * page, (address + size) // page * page) for address, size in places]
    for first, end in whole:
        _advise(first, end - first, MADV_HUGEPAGE)
    for first, end in whole:
        for at in range(first, end, PIECE):
            yield
            if not _advise(at, min(PIECE, end - at), MADV_POPULATE_WRITE):
                return


def enlarge(places: Iterable[Place]) -> Iterator[None]:
    """Move what is held to large pages, neighbours of it too.

    Reading all weights, as each step does, then takes 512 times fewer translations of addresses."""
    try:
        page = int(LARGE.read_text())
    except (OSError, ValueError):
        return
    if page > PIECE:
        return  # that much cannot be moved while it is in use
    starts = {at for first, size in places for at in range(first // page * page, first + size, page)}
    for at in sorted(starts):
        yield
        _advise(at, page, MADV_COLLAPSE)  # fails where part of it is nobody's


def _advise(address: int, size: int, advice: int) -> bool:
    return sys.platform == "linux" and _madvise()(address, size, advice) == 0


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
