"""ALiBi (Press et al., 2022): instead of positions, keys count for less the further they are behind."""

import math

import numpy as np


def slopes(heads: int) -> np.ndarray:
    """float32 [heads]: a geometric series; where `heads` is no power of two that of the next smaller one, and
    then every other slope of the next larger one."""
    power = 2 ** math.floor(math.log2(heads))
    return np.concatenate([_series(power), _series(2 * power)[::2]])[:heads]


def slopes_of_larger(heads: int) -> np.ndarray:
    """float32 [heads], as MPT has it: where `heads` is no power of two, every other slope of the next larger
    one, and then of those left out."""
    found = _series(2 ** math.ceil(math.log2(heads)))
    return found if len(found) == heads else np.concatenate([found[1::2], found[::2]])[:heads]


def _series(count: int) -> np.ndarray:
    """2^(-8 i / count)."""
    return (2.0 ** (-8.0 / count * np.arange(1, count + 1))).astype(np.float32)
