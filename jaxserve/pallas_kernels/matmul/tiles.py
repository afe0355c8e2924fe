"""How cpu.cc keeps a weight [out, in]: `[out / 16, in / per_cell, 16, per_cell]`, padded with zeros.

A cell is four bytes of one output: a float32, or two 16-bit neighbours. Sixteen outputs stand side by side,
so that a product reads a tile from its begin to its end: registers and matrix units take it as it is.
"""

import math

import jax
import numpy as np

OUTS = 16
LINE = 64
DEPTH = 32
"""The depth is padded to a multiple: what matrix units multiply at a time, in 16-bit numbers."""


def shape(outs: int, depth: int, dtype: np.dtype) -> tuple[int, int, int, int]:
    """Of the tiles of a weight [outs, depth]."""
    per_cell = 4 // np.dtype(dtype).itemsize
    return -(-outs // OUTS), -(-depth // DEPTH) * DEPTH // per_cell, OUTS, per_cell


def pack(w: np.ndarray) -> np.ndarray:
    """The tiles of w [out, in]."""
    tiles, cells, _, per_cell = shape(*w.shape, w.dtype)
    short = tiles * OUTS - w.shape[0], cells * per_cell - w.shape[1]
    if any(short):
        w = np.pad(w, [(0, n) for n in short])
    rows = np.ascontiguousarray(w).view(np.uint32).reshape(tiles, OUTS, cells)
    packed = _aligned(tiles, cells, OUTS)
    packed[...] = rows.swapaxes(1, 2)
    return packed.view(w.dtype).reshape(tiles, cells, OUTS, per_cell)


def _aligned(*shape: int) -> np.ndarray:
    """Room for cells at the begin of a cache line: a runtime on the CPU takes it as it is, others copy."""
    room = np.empty(4 * math.prod(shape) + LINE, np.uint8)
    begin = -room.ctypes.data % LINE
    return room[begin : begin + 4 * math.prod(shape)].view(np.uint32).reshape(shape)


def take(tiles: jax.Array, rows: jax.Array, depth: int) -> jax.Array:
    """Rows [N] of a weight, [N, depth]; those outside of it are clipped."""
    found = tiles.at[rows // OUTS, :, rows % OUTS].get(mode="clip")
    return found.reshape(len(rows), -1)[:, :depth]
