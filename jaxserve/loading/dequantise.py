"""ggml's number formats to floats, over many blocks at a time.

A block holds small integers in one or more groups; a number is `integer * scale + offset` of its group.
The layouts are those of ggml-common.h. `gguf.quants` gives the same bits, ten times slower.
"""

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

CHUNK = 2**17
"""Numbers handled at a time: what a core's cache holds."""

Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Integers [blocks, groups, n], scales and offsets float32 [blocks, groups, 1]."""


class Format(NamedTuple):
    """How tensors of one ggml type are stored."""

    name: str
    size: int
    """Numbers in a block."""
    layout: np.dtype
    """One block."""
    unpack: Callable[[np.ndarray], Unpacked] | None = None
    """None for numbers that are stored as they are."""


def dequantise(raw: np.ndarray, form: Format, dtype: DTypeLike = np.float32) -> np.ndarray:
    """uint8 [bytes] -> float32 numbers rounded to `dtype`, or a view of those that are stored as they are."""
    blocks = raw.view(form.layout)
    if form.unpack is None:
        return blocks
    out = np.empty((len(blocks), form.size), dtype)
    step = CHUNK // form.size
    scratch = np.empty((step, form.size), np.float32)
    for at in range(0, len(blocks), step):
        integers, scale, offset = form.unpack(blocks[at : at + step])
        part = scratch[: len(integers)].reshape(integers.shape)
        part[...] = integers
        part *= scale
        if offset is not None:
            part += offset
        out[at : at + step] = part.reshape(-1, form.size)
    return out.ravel()


def _q4_0(b: np.ndarray) -> Unpacked:
    return _signed(_nibbles(b["q"]), 8), _one(b["d"]), None


def _q4_1(b: np.ndarray) -> Unpacked:
    return _nibbles(b["q"]), _one(b["d"]), _one(b["m"])


def _q5_0(b: np.ndarray) -> Unpacked:
    return _signed(_five_bits(b), 16), _one(b["d"]), None


def _q5_1(b: np.ndarray) -> Unpacked:
    return _five_bits(b), _one(b["d"]), _one(b["m"])


def _q8_0(b: np.ndarray) -> Unpacked:
    return b["q"][:, None], _one(b["d"]), None


def _q4_k(b: np.ndarray) -> Unpacked:
    return _nibbles(b["q"].reshape(-1, 4, 32)).reshape(-1, 8, 32), *_six_bit_scales(b)


def _q5_k(b: np.ndarray) -> Unpacked:
    low, scale, offset = _q4_k(b)
    high = b["h"][:, None] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return low | high << 4, scale, offset


def _q6_k(b: np.ndarray) -> Unpacked:
    low = _nibbles(b["q"].reshape(-1, 2, 64)).reshape(-1, 16, 16)
    high = b["h"].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scale = b["d"].astype(np.float32)[:, None] * b["s"]
    return _signed(low | high.reshape(-1, 16, 16) << 4, 32), scale[..., None], None


def _nibbles(q: np.ndarray) -> np.ndarray:
    """uint8 [..., n] -> [..., 1, 2n]: all low halves, then all high ones."""
    q = np.ascontiguousarray(q)
    return np.concatenate([q & 15, q >> 4], axis=-1)[..., None, :]


def _five_bits(b: np.ndarray) -> np.ndarray:
    high: np.ndarray = np.unpackbits(b["h"], axis=-1, bitorder="little")
    numbers: np.ndarray = _nibbles(b["q"]) | high[:, None] << 4
    return numbers


def _six_bit_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and offsets of a block, which 12 bytes hold: the last four in spare bits."""
    s, m, rest = np.moveaxis(b["s"].reshape(-1, 3, 4), 1, 0)
    scale = np.concatenate([s & 63, rest & 15 | s >> 6 << 4], axis=-1)
    offset = np.concatenate([m & 63, rest >> 4 | m >> 6 << 4], axis=-1)
    d, dm = (b[key].astype(np.float32)[:, None] for key in ("d", "m"))
    return (d * scale)[..., None], -(dm * offset)[..., None]


def _signed(integers: np.ndarray, zero: int) -> np.ndarray:
    return integers.view(np.int8) - np.int8(zero)


def _one(value: np.ndarray) -> np.ndarray:
    """float16 [blocks] -> float32 [blocks, 1, 1]"""
    return value.astype(np.float32)[:, None, None]


def _layout(*fields: tuple[str, str, int]) -> np.dtype:
    return np.dtype([(name, kind, (count,)) if count > 1 else (name, kind) for name, kind, count in fields])


D, M, SCALES = ("d", "<f2", 1), ("m", "<f2", 1), ("s", "u1", 12)
FORMATS = {
    0: Format("F32", 1, np.dtype("<f4")),
    1: Format("F16", 1, np.dtype("<f2")),
    30: Format("BF16", 1, np.dtype(ml_dtypes.bfloat16)),
    2: Format("Q4_0", 32, _layout(D, ("q", "u1", 16)), _q4_0),
    3: Format("Q4_1", 32, _layout(D, M, ("q", "u1", 16)), _q4_1),
    6: Format("Q5_0", 32, _layout(D, ("h", "u1", 4), ("q", "u1", 16)), _q5_0),
    7: Format("Q5_1", 32, _layout(D, M, ("h", "u1", 4), ("q", "u1", 16)), _q5_1),
    8: Format("Q8_0", 32, _layout(D, ("q", "i1", 32)), _q8_0),
    12: Format("Q4_K", 256, _layout(D, M, SCALES, ("q", "u1", 128)), _q4_k),
    13: Format("Q5_K", 256, _layout(D, M, SCALES, ("h", "u1", 32), ("q", "u1", 128)), _q5_k),
    14: Format("Q6_K", 256, _layout(("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), D), _q6_k),
}
"""By ggml's number of the type."""
