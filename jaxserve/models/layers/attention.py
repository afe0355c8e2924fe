"""Multi-head attention with grouped KV heads, and how heads are laid out over a mesh."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.layers.linear import Linear
from jaxserve.models.layers.param import padded
from jaxserve.pallas_kernels.paged_attention import Rotation

Attend = Callable[..., tuple[jax.Array, jax.Array]]
"""(q [N, heads, dim], k, v [N, kv_heads, dim], rotation, pool, scale=…) -> (out [N, heads, dim], pool)."""

EMPTY = -1


class HeadLayout(NamedTuple):
    """Which of a model's heads stands at each place of a `[kv_heads, group]` grid that shards evenly.

    KV heads are padded with zero weights until the mesh divides them; where that leaves room for copies
    of all of them, each copy serves a part of its query heads.
    """

    kv: np.ndarray
    """[kv_heads] the model's KV head at each place; EMPTY for padding."""
    q: np.ndarray
    """[kv_heads, group] the model's query head at each place; EMPTY for padding."""

    @classmethod
    def over(cls, shards: int, heads: int, kv_heads: int) -> "HeadLayout":
        """The layout for `shards` devices with the smallest pool, and in it the fewest places for heads."""
        group, places = heads // kv_heads, padded(kv_heads, shards)
        times = min(places // kv_heads, group)
        width = -(-group // times)
        kv = np.full(places, EMPTY)
        q = np.full((places, width), EMPTY)
        for head in range(kv_heads):
            members = np.arange(head * group, (head + 1) * group)
            for copy in range(times):
                kv[head * times + copy] = head
                part = members[copy * width : (copy + 1) * width]
                q[head * times + copy, : len(part)] = part
        return cls(kv, q)

    def pick(self, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """rows [heads, ...] at each place of `index` (`self.q` or `self.kv`); zeros where it is EMPTY."""
        if np.array_equal(index.ravel(), np.arange(len(rows))):
            return rows.reshape(*index.shape, *rows.shape[1:])
        out = rows[np.maximum(index, 0)]
        out[index == EMPTY] = 0
        return out

    def fuse_qkv(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """[kv_heads, group + 2, dim, ...] from q [heads, dim, ...], k and v [kv_heads, dim, ...]."""
        parts = self.pick(self.q, q), self.pick(self.kv, k)[:, None], self.pick(self.kv, v)[:, None]
        return np.concatenate(parts, axis=1)


class Attention(nnx.Module):
    """Rotary causal self-attention: qkv is one weight [kv_heads, group + 2, dim, embed]."""

    def __init__(
        self,
        features: int,
        heads: HeadLayout,
        head_dim: int,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dtype: jnp.dtype,
    ):
        self.scale = head_dim**-0.5
        places, group = heads.q.shape
        axes = ("kv_heads", None, None, "embed")
        self.qkv = Linear((features,), (places, group + 2, head_dim), axes, bias=qkv_bias, dtype=dtype)
        axes = ("embed", "kv_heads", None, None)
        self.out = Linear((places, group, head_dim), (features,), axes, bias=out_bias, dtype=dtype)

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Attend, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x [N, features] -> (float32 [N, features], pool)."""
        qkv = self.qkv(x)
        n, places, width, dim = qkv.shape
        q = qkv[:, :, :-2].reshape(n, places * (width - 2), dim)
        out, pool = attend(q, qkv[:, :, -2], qkv[:, :, -1], rotation, pool, scale=self.scale)
        return self.out(out.reshape(n, places, width - 2, dim)), pool
