"""How the C++ products keep a weight [out, in]: `[out / 16, in / per_cell, 16, per_cell]`, padded with zeros.

A cell is four bytes of one output: a float32, two 16-bit neighbours or four of 8 bits. Sixteen outputs stand
side by side, so that a product reads a tile from its begin to its end: registers and matrix units take it as
it is. Signed bytes are kept without their sign, 128 above what they are.
"""

import math

import jax
import numpy as np

OUTS = 16
LINE = 64
CELLS = 16
"""The depth is padded to a multiple of so many: what matrix units multiply at a time."""
SIGN = np.uint8(128)


def kept(outs: int, depth: int, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    """The tiles of a weight [outs, depth]: `[tiles, cells, OUTS, per_cell]`."""
    dtype = np.dtype(dtype)
    per_cell = 4 // dtype.itemsize
    cells = -(-depth // (per_cell * CELLS)) * CELLS
    return jax.ShapeDtypeStruct(
        (-(-outs // OUTS), cells, OUTS, per_cell), np.uint8 if dtype == np.int8 else dtype
    )


def pack(w: np.ndarray) -> np.ndarray:
    """The tiles of w [out, in]."""
    to = kept(*w.shape, w.dtype)
    tiles, cells, _, per_cell = to.shape
    short = tiles * OUTS - w.shape[0], cells * per_cell - w.shape[1]
    if w.dtype == np.int8:
        w = w.view(np.uint8) ^ SIGN
    if any(short):
        w = np.pad(w, [(0, n) for n in short])
    rows = np.ascontiguousarray(w).view(np.uint32).reshape(tiles, OUTS, cells)
    packed = _aligned(tiles, cells, OUTS)
    packed[...] = rows.swapaxes(1, 2)
    return packed.view(to.dtype).reshape(to.shape)


def _aligned(*shape: int) -> np.ndarray:
    """Room for cells at the begin of a cache line: a runtime on the CPU takes it as it is, others copy."""
    room = np.empty(4 * math.prod(shape) + LINE, np.uint8)
    begin = -room.ctypes.data % LINE
    return room[begin : begin + 4 * math.prod(shape)].view(np.uint32).reshape(shape)


def take(tiles: jax.Array, rows: jax.Array, depth: int) -> jax.Array:
    """Rows [N] of a weight, [N, depth]; those outside of it are clipped. Not for bytes."""
    found = tiles.at[rows // OUTS, :, rows % OUTS].get(mode="clip")
    return found.reshape(len(rows), -1)[:, :depth]
