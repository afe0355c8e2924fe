"""The one case table for every implementation of the grouped product, and an oracle in float64."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """Rows by expert, with `pad_rows` more that are of none."""

    name: str
    sizes: tuple[int, ...]
    depth: int = 64
    outs: int = 48
    pad_rows: int = 0
    dtype: Any = jnp.float32
    out_dtype: Any = jnp.float32

    def __str__(self) -> str:
        return self.name


BF16 = jnp.bfloat16
MIXED = (3, 0, 17, 1, 0, 40)

CASES = [
    Case("one expert", (9,)),
    Case("one expert, one row", (1,)),
    Case("one row of several experts", (0, 0, 1, 0)),
    Case("a row each", (1,) * 7),
    Case("mixed", MIXED),
    Case("first empty", (0, 5, 6)),
    Case("last empty", (5, 6, 0)),
    Case("all empty", (0, 0, 0), pad_rows=5),
    Case("padded", MIXED, pad_rows=9),
    Case("all rows to the first", (50, 0, 0)),
    Case("all rows to the last", (0, 0, 50)),
    Case("many rows", (70, 200, 0, 33), pad_rows=3),
    Case("many rows each", (130, 129), depth=96, outs=130),
    Case("whole tiles", (16, 32, 16), depth=128, outs=128),
    Case("odd", MIXED, depth=70, outs=37),
    Case("depth of one, an output", MIXED, depth=1, outs=1),
    Case("deep", (2, 0, 1), depth=2500, outs=20),
    Case("deep, bf16", (2, 0, 1), depth=2500, outs=20, dtype=BF16),
    Case("wide", (2, 1), depth=40, outs=1100, dtype=BF16),
    Case("decoding", tuple(int(n) for n in np.bincount(np.arange(64) * 37 % 101, minlength=128)), dtype=BF16),
    Case("odd, bf16", MIXED, depth=70, outs=37, pad_rows=2, dtype=BF16),
    Case("many rows, bf16", (70, 200, 0, 33), depth=200, outs=150, pad_rows=3, dtype=BF16, out_dtype=BF16),
    Case("odd, f16", MIXED, depth=70, outs=37, pad_rows=2, dtype=jnp.float16, out_dtype=jnp.float16),
]


def make(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and sizes. Rows of no expert would show: NaN."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((sum(case.sizes) + case.pad_rows, case.depth), np.float32)
    x[sum(case.sizes) :] = np.nan
    w = rng.standard_normal((len(case.sizes), case.outs, case.depth), np.float32)
    return x.astype(case.dtype), w.astype(case.dtype), np.array(case.sizes, np.int32)


def oracle(x: np.ndarray, w: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """float64 `[rows of experts, out]`, an expert at a time."""
    ends = np.cumsum(sizes)
    parts = [
        x[end - size : end].astype(np.float64) @ weight.astype(np.float64).T
        for weight, end, size in zip(w, ends, sizes, strict=True)
    ]
    return np.concatenate(parts)
