"""The native attention's output for a row has the same bits however the batch around it is made up."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.paged_attention import (
    PLAIN,
    Masking,
    PoolShape,
    Rotation,
    paged_attention,
    ragged_meta,
)

pytestmark = pytest.mark.compiler

LENGTH, BLOCK = 600, 20  # several splits, the last chunk and the last block not full


@dataclasses.dataclass(frozen=True)
class Layer:
    heads: int = 6
    kv_heads: int = 2
    dim: int = 40
    dtype: type = jnp.float32
    masking: Masking = PLAIN
    sinks: bool = False
    alibi: bool = False
    rotary: bool = False


LAYERS = [
    Layer(),
    Layer(dtype=jnp.bfloat16),
    Layer(dtype=jnp.bfloat16, rotary=True),
    Layer(heads=14, masking=Masking(window=100), sinks=True),
    Layer(heads=2, dim=64, masking=Masking(soft_cap=5.0), alibi=True),
]


class Sequences:
    """Two sequences, and the output of any steps that compute them."""

    def __init__(self, layer: Layer):
        rng = np.random.default_rng(0)
        self.layer = layer

        def normal(heads):
            return jnp.asarray(rng.standard_normal((2, LENGTH, heads, layer.dim), np.float32), layer.dtype)

        self.q, self.k, self.v = normal(layer.heads), normal(layer.kv_heads), normal(layer.kv_heads)
        per_head = jnp.linspace(0.1, 0.5, layer.heads)
        options = {"sinks": per_head if layer.sinks else None, "alibi": per_head if layer.alibi else None}
        options |= {"masking": layer.masking, "scale": layer.dim**-0.5}
        angles = rng.uniform(0, 6, (LENGTH, layer.dim // 2)).astype(np.float32)
        self.rotation = Rotation(jnp.cos(angles), jnp.sin(angles)) if layer.rotary else None
        self.attend = jax.jit(partial(paged_attention, implementation="cpu", **options))

    def run(self, steps, seed: int) -> dict[tuple[int, int], bytes]:
        """Bits of each (sequence, position) after steps of pieces (sequence, start, rows), singles first."""
        rng, width = np.random.default_rng(seed), LENGTH // BLOCK
        blocks = 1 + rng.permutation(2 * width).reshape(2, width)
        number = jnp.dtype(self.layer.dtype)
        shape = PoolShape(2 * width + 1, self.layer.kv_heads, BLOCK, self.layer.dim, number, True)
        pool, bits = jnp.zeros(shape.shape, shape.storage), {}
        for pieces in steps:
            seqs, starts, lens = (np.array(x, np.int32) for x in zip(*pieces, strict=True))
            tables = jnp.asarray(blocks[seqs], jnp.int32)
            padding = 0 if max(lens) == 1 else len(lens) + 1
            meta = ragged_meta(tables, jnp.asarray(starts), jnp.asarray(lens), int(lens.sum()) + padding)
            rows = [(s, p) for s, start, n in pieces for p in range(start, start + n)]
            at = tuple(np.array([*rows, *[(0, 0)] * padding]).T)
            rotation = self.rotation and Rotation(*(part[at[1]] for part in self.rotation))
            out, pool = self.attend(self.q[at], self.k[at], self.v[at], pool, meta, rotation)
            bits |= {row: x.tobytes() for row, x in zip(rows, np.asarray(out), strict=False)}
        return bits


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_batch_does_not_change_a_row(layer):
    sequences = Sequences(layer)
    whole = sequences.run([[(0, 0, LENGTH)]], seed=1)
    chunks = sequences.run([[(0, 0, 70)], [(0, 70, 333)], [(0, 403, LENGTH - 403)]], seed=2)
    assert chunks == whole
    together = sequences.run([[(1, 0, 590), (0, 0, 580)], [(1, 590, 1), (0, 580, 20)]], seed=3)
    assert {row: bits for row, bits in together.items() if row[0] == 0} == whole
    first = [[(1, 0, LENGTH - 12), (0, 0, LENGTH - 12)]]
    decoded = sequences.run([*first, *[[(0, p, 1), (1, p, 1)] for p in range(LENGTH - 12, LENGTH)]], seed=4)
    assert {row: bits for row, bits in decoded.items() if row[0] == 0} == whole
    alone = sequences.run([*first, *[[(0, p, 1)] for p in range(LENGTH - 12, LENGTH)]], seed=5)
    assert alone == {row: bits for row, bits in decoded.items() if row in alone}


def test_a_difference_would_be_found():
    sequences = Sequences(Layer())
    whole = sequences.run([[(0, 0, 64)]], seed=1)
    sequences.v = sequences.v.at[0, 0].multiply(1 + 1e-6)
    assert sequences.run([[(0, 0, 64)]], seed=1) != whole
