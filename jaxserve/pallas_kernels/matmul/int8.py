"""Weights and activations in 8 bits (W8A8): symmetric, a scale for each output and for each row.

    y = (x8 · w8ᵀ) * scale of x's row * scale of w's output          x8 = round(x / scale), |x8| <= 127

The sums are of integers: exact up to a depth of 133,144, and the same in any order.
"""

import jax
import jax.numpy as jnp
import numpy as np

MOST = 127
STEP = np.float32(1 / MOST)
"""Multiplied by, not divided by 127: XLA would do that anyway."""
LEAST = 1e-30
"""Taken for the largest number of a row of smaller ones, whose scale would have no inverse."""
BLOCK = 2**18
"""Weights that are brought to 8 bits at a time, so that they stay in a processor's cache."""


def quantise(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [out, in] and the outputs' scales, float32 [out], of a weight [out, in] of floats."""
    quantised, scales = np.empty(w.shape, np.int8), np.empty(len(w), np.float32)
    step = max(1, BLOCK // w.shape[1])
    for i in range(0, len(w), step):
        rows = w[i : i + step].astype(np.float32)
        largest = np.maximum(np.maximum(rows.max(axis=1), -rows.min(axis=1)), np.float32(LEAST))
        rows *= (MOST / largest)[:, None]
        quantised[i : i + step] = np.rint(rows, out=rows)
        scales[i : i + step] = largest * STEP
    return quantised, scales


def quantise_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [N, in] and scales float32 [N, 1] of x [N, in]. A NaN or infinity leaves its row's no number."""
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), LEAST)
    return jnp.rint(x * (MOST / largest)).astype(jnp.int8), largest * STEP
