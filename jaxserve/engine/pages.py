"""Memory that a pool has and the system has not given yet: taken before requests need it."""

import ctypes
import os
import threading
from collections.abc import Iterable

MADV_POPULATE_WRITE = 23
PIECE = 4 * 2**20
"""Bytes taken at a time: meanwhile no other thread can be given or give back memory."""


def take(places: Iterable[tuple[int, int]], stop: threading.Event) -> None:
    """Have the system give the pages at (address, bytes), which may be in use, until `stop` is set.

    Only Linux 5.14 and later can; elsewhere a page comes when it is touched."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")
    for address, size in places:
        first, end = -(-address // page) * page, (address + size) // page * page
        for at in range(first, end, PIECE):
            if stop.is_set() or advise(at, min(PIECE, end - at), MADV_POPULATE_WRITE) != 0:
                return
