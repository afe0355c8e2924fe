"""How heads are laid out over a mesh, and the weights that make or read them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxserve.models.layers.param import Features, padded

EMPTY = -1

Split = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""How one tensor [(heads + 2 * kv_heads) * dim, ...] has queries, keys and values:
(tensor, heads, kv_heads) -> q [heads * dim, ...], k and v [kv_heads * dim, ...]."""


def rows(qkv: np.ndarray, heads: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All queries, then all keys, then all values."""
    dim = len(qkv) // (heads + 2 * kv_heads)
    q, k, v = np.split(qkv, [heads * dim, (heads + kv_heads) * dim])
    return q, k, v


def groups(qkv: np.ndarray, heads: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each KV head: the queries that share it, its key, its value."""
    grid = qkv.reshape(kv_heads, heads // kv_heads + 2, -1, *qkv.shape[1:])
    q, k, v = (part.reshape(-1, *qkv.shape[1:]) for part in (grid[:, :-2], grid[:, -2], grid[:, -1]))
    return q, k, v


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


class Heads(NamedTuple):
    """The heads of a layer's attention, as features of the weights around it."""

    layout: HeadLayout
    dim: int
    order: np.ndarray | None = None
    """[dim] the checkpoint's feature at each of ours, in queries and keys."""

    @property
    def counts(self) -> tuple[int, int]:
        """Query and KV heads of the model."""
        return int(self.layout.q.max()) + 1, int(self.layout.kv.max()) + 1

    def qkv(self, split: Split | None = None) -> Features:
        """Queries, keys and values, [kv_heads, group + 2, dim], from three tensors or one that is `split`."""
        heads, kv_heads = self.counts
        theirs = heads * self.dim, kv_heads * self.dim, kv_heads * self.dim

        def fuse(*tensors: np.ndarray) -> np.ndarray:
            q, k, v = split(*tensors, heads, kv_heads) if split else tensors
            q, k, v = (x.reshape(-1, self.dim, *x.shape[1:]) for x in (q, k, v))
            return self.layout.fuse_qkv(self._ordered(q), self._ordered(k), v)

        places, group = self.layout.q.shape
        shape = places, group + 2, self.dim
        return Features((sum(theirs),) if split else theirs, shape, ("kv_heads", None, None), fuse)

    def out(self) -> Features:
        """What attention gives: [kv_heads, group, dim]."""
        return self._placed(self.layout.q)

    def queries(self) -> Features:
        """All queries, [kv_heads, group, dim], for what is done to them as one."""
        return self._placed(self.layout.q, self._ordered)

    def keys(self) -> Features:
        """All keys, [kv_heads, dim]."""
        return self._placed(self.layout.kv, self._ordered)

    def each(self) -> Features:
        """One query or key: [dim]."""
        return Features((self.dim,), (self.dim,), (None,), lambda x: self._ordered(x[None])[0])

    def _placed(self, index: np.ndarray, ordered: Callable[..., np.ndarray] = lambda x: x) -> Features:
        def arrange(x: np.ndarray) -> np.ndarray:
            return self.layout.pick(index, ordered(x.reshape(-1, self.dim, *x.shape[1:])))

        axes = "kv_heads", *(None,) * index.ndim
        return Features(((int(index.max()) + 1) * self.dim,), (*index.shape, self.dim), axes, arrange)

    def _ordered(self, x: np.ndarray) -> np.ndarray:
        return x if self.order is None else x[:, self.order]
