"""Sizes of the Mosaic GPU kernels by head size: what was measured on such a device (`measured.py`), or what
arithmetic says; `docs/kernels.md` has the figures that came out.

The arithmetic, for Hopper's 227 KiB of shared memory on a multiprocessor: at 4.3 TB/s and about a microsecond
from asking to having, 33 KiB must be on their way to each of 132, better twice that.

- rows (decode): a turn of 64 positions takes 256 bytes of shared memory a number of the head, keys and
  values, for each stage. Up to 128 numbers, 96 KiB of stages leave room for two programs on a multiprocessor.
- tiles (prefill): two warpgroups with 64 rows each, whose queries take 256 bytes a number. A turn of 128
  positions halves the waiting at barriers, but its logits take 64 registers of a thread beside the output's
  half a register a number: above a head size of 128 a turn has 64.
"""

from typing import Literal, NamedTuple

from jaxserve.pallas_kernels.paged_attention.tuning.measured import merged

ROWS = 64
"""Of a warpgroup that computes: the fewest that a product has."""
WARPGROUPS = 2
"""That compute in a program of the tiles."""
LARGEST_GROUP = 48
"""Query heads of a KV head: more, of the largest size, leave too little shared memory for the context."""


class Variant(NamedTuple):
    """Sizes of one compiled kernel."""

    tile: int
    """Context positions per turn of the loop."""
    stages: int
    """Turns whose keys and values are in shared memory, or on their way."""


TABLE = {
    ("rows", 64): Variant(64, 6),
    ("rows", 128): Variant(64, 3),
    ("rows", 192): Variant(64, 2),
    ("rows", 256): Variant(64, 2),
    ("tiles", 64): Variant(128, 4),
    ("tiles", 128): Variant(128, 2),
    ("tiles", 192): Variant(64, 3),
    ("tiles", 256): Variant(64, 2),
}
HEAD_DIMS = sorted({dim for _, dim in TABLE})


def per_tile(group: int) -> int:
    """Query rows of a sequence in a tile, each with `group` heads."""
    return WARPGROUPS * (ROWS // group)


def variant(kind: Literal["rows", "tiles"], head_dim: int) -> Variant:
    """For sequences of one query row or of several."""
    return merged("mosaic", TABLE)[kind, head_dim]
