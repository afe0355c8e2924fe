"""Sizes of the TPU kernel's work, from arithmetic; `docs/kernels.md` says which."""

ROWS = 16, 512
"""Fewest and most rows of a tile: 16-bit numbers fill registers by 16 rows."""
OUTS = 1024
DEPTH = 2048
"""Bytes of a row. A weight's tile has at most 2 MiB, of which two are held beside as much for each of the
result's and for its sums: a v5e gives a kernel 16 MiB."""


def tiling(rows: int, experts: int, depth: int, outs: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, depth and outputs of a tile. One that has rows of several experts is visited for each of them."""
    least, most = ROWS
    wanted = min(max(1 << (rows // experts).bit_length(), 128), most, 1 << (rows - 1).bit_length())
    return max(wanted, least), min(depth, DEPTH // itemsize), min(outs, OUTS)
