"""Pages of memory: given by the system before requests need them, and large where large ones are to be had.

Only Linux 6.1 and later does all of it; what a system cannot do is left undone, as it is only a matter of speed.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 23, 25
PIECE = 4 * 2**20
"""Bytes taken at a time: meanwhile no other thread can be given or give back memory."""
LARGE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")

Place = tuple[int, int]
"""(address, bytes) of memory, which may be in use."""


def take(places: Iterable[Place], stop: threading.Event) -> None:
    """Have the system give all pages of what is still empty, large ones if it can, until `stop` is set."""
    page = os.sysconf("SC_PAGE_SIZE")
    for address, size in places:
        first, end = -(-address // page) * page, (address + size) // page * page
        _advise(first, end - first, MADV_HUGEPAGE)
        for at in range(first, end, PIECE):
            if stop.is_set() or not _advise(at, min(PIECE, end - at), MADV_POPULATE_WRITE):
                return


def enlarge(places: Iterable[Place], stop: threading.Event) -> None:
    """Move what is held to large pages, neighbours of it too, until `stop` is set.

    Reading all weights, as each step does, then takes 512 times fewer translations of addresses."""
    try:
        page = int(LARGE.read_text())
    except (OSError, ValueError):
        return
    starts = {at for first, size in places for at in range(first // page * page, first + size, page)}
    for at in sorted(starts):
        if stop.is_set():
            return
        _advise(at, page, MADV_COLLAPSE)  # fails where part of it is nobody's


def _advise(address: int, size: int, advice: int) -> bool:
    return sys.platform == "linux" and _madvise()(address, size, advice) == 0


@cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
