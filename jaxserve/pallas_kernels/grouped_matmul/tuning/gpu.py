"""Sizes of the GPU kernel's work, from arithmetic; `docs/kernels.md` has the figures."""

import math
from typing import NamedTuple

from jaxserve.pallas_kernels.paged_attention.tuning.gpu import FILLED

MAX_SPLITS = 16
TURNS = 4
"""Fewest turns of the loop that are worth a split of the depth."""
CACHED = 2**23
"""Bytes of a weight that programs which run at a time read: a small part of an H200's 50 MiB of cache."""


class Variant(NamedTuple):
    """Sizes of one compiled kernel."""

    rows: int
    outs: int
    depth: int
    """Of one turn of the loop."""
    num_warps: int
    num_stages: int


# (most rows of an expert on average, bytes of a number) -> variant; the first that fits
TABLE = {
    (16, 2): Variant(16, 64, 64, 4, 6),
    (64, 2): Variant(64, 128, 64, 4, 3),
    (math.inf, 2): Variant(128, 128, 64, 8, 3),
    (16, 4): Variant(16, 64, 32, 4, 3),
    (math.inf, 4): Variant(64, 64, 32, 8, 2),
}


def variant(rows: float, itemsize: int) -> Variant:
    """For so many rows of an expert on average."""
    return next(found for (most, size), found in TABLE.items() if rows <= most and size == itemsize)


def num_splits(programs: int, turns: int) -> int:
    """Splits of the depth, a power of two, that fill the device with `programs` for each."""
    wanted = min(FILLED // programs, turns // TURNS, MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def together(tiles: int, nbytes: int) -> int:
    """How many tiles of outputs, each of so many bytes of weight, take their rows side by side."""
    return min(tiles, max(1, CACHED // nbytes))
