"""Which variant of the GPU kernel runs for which static facts: what was measured on such a device
(`measured.py`), or what arithmetic says; `docs/kernels.md` has the figures."""

from typing import Literal, NamedTuple

from jax.experimental import pallas as pl

from jaxserve.pallas_kernels.paged_attention.tuning.measured import current, merged

FILLED = 264
"""Programs that fill the device: two on each of an H200's 132 multiprocessors."""
MAX_SPLITS = 16


class Variant(NamedTuple):
    """Sizes of one compiled kernel."""

    block_m: int
    """Rows of a product: query rows times the query heads of a KV head."""
    tile: int
    """Context positions per turn of the loop."""
    num_warps: int
    num_stages: int


# (kind, bytes of a number, largest head size) -> variant; the first that fits
TABLE = {
    ("rows", 2, 128): Variant(16, 64, 4, 3),
    ("rows", 2, 256): Variant(16, 32, 4, 3),
    ("rows", 4, 128): Variant(16, 32, 4, 2),
    ("rows", 4, 256): Variant(16, 16, 4, 2),
    ("tiles", 2, 128): Variant(64, 64, 4, 3),
    ("tiles", 2, 256): Variant(64, 32, 8, 2),
    ("tiles", 4, 128): Variant(32, 32, 8, 2),
    ("tiles", 4, 256): Variant(16, 16, 8, 2),
}
# The same beside KV of 8 bits, which takes registers to widen: more warps have more. The tuner leaves them
SCALED = {
    ("rows", 2, 128): Variant(16, 64, 8, 3),
    ("rows", 2, 256): Variant(16, 32, 8, 3),
    ("rows", 4, 128): Variant(16, 32, 8, 2),
    ("rows", 4, 256): Variant(16, 16, 8, 2),
    ("tiles", 2, 128): Variant(64, 64, 4, 3),
    ("tiles", 2, 256): Variant(64, 32, 8, 2),
    ("tiles", 4, 256): Variant(16, 16, 8, 2),
}


def variant(
    kind: Literal["rows", "tiles"], group: int, head_dim: int, itemsize: int, scaled: bool = False
) -> Variant:
    """For tiles of one query row or of many; `group` query heads share a KV head of `head_dim` numbers, of
    `itemsize` bytes in products and, if `scaled`, of 8 bits in the pool."""
    for (of_kind, size, largest), found in (SCALED if scaled else merged("gpu", TABLE)).items():
        if (of_kind, size) == (kind, itemsize) and head_dim <= largest:
            return found._replace(block_m=max(found.block_m, pl.next_power_of_2(group)))
    raise ValueError(
        f"no paged attention kernel for head size {head_dim} with {itemsize}-byte numbers: "
        f"the largest is {max(largest for *_, largest in TABLE)} with 2 or 4 bytes"
    )


def num_splits(programs: int, longest_context: int, tile: int) -> int:
    """Splits of the context, a power of two, that fill the device with `programs` for each."""
    wanted = min((current().filled or FILLED) // programs, longest_context // tile, MAX_SPLITS)
    return 1 << max(0, wanted.bit_length() - 1)


def addressable(count: int, block: int) -> int:
    """Of `count` blocks of `block` 8-bit numbers, those that a kernel can read: in arrays of up to 4 GiB the
    Triton backend of Pallas counts numbers in 32 bits, with a sign."""
    return 2**31 // block if 2**31 < count * block <= 2**32 else count
