"""A weight: what its axes mean, and which of a checkpoint's tensors it is made of.

A layer declares each of its parameters once, by the features at its sides: shape, sharding, the tensors
that it wants and what is done with them all follow. Where an axis goes on a mesh is decided here too, once
for all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxserve.loading.weights import Source

MESH_AXES: dict[str | None, str | None] = {
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": None,
    None: None,
}
"""Logical axis of a weight -> axis of the mesh that shards it."""


class Features(NamedTuple):
    """One side of a weight: features as checkpoints have them, and as they are kept to shard evenly."""

    theirs: tuple[int, ...]
    """How many of them each of the tensors has that are joined here."""
    shape: tuple[int, ...]
    """As they are kept; what a mesh pads is zero."""
    axes: tuple[str | None, ...]
    arrange: Callable[..., np.ndarray] = lambda x: x
    """Tensors [theirs, ...] -> [*shape, ...], or less where all that is missing are zeros at the end."""

    @property
    def count(self) -> int:
        """Places that are not padding; those of copies count each."""
        return np.count_nonzero(self.arrange(*(np.ones(n, bool) for n in self.theirs)))


def plain(size: int, axis: str | None = None) -> Features:
    """Features that are kept as they are."""
    return Features((size,), (size,), (axis,))


class Scope(NamedTuple):
    """Where in a checkpoint a layer's tensors are, and how its parameters are kept."""

    dtype: jnp.dtype
    shards: int = 1
    names: tuple[str, ...] = ("",)
    """What the names of its tensors begin with; more than one where tensors are joined in one parameter."""
    transposed: bool = False
    """Its matrices are stored as [in, out]."""

    def __truediv__(self, part: str | tuple[str, ...]) -> "Scope":
        """The scope of a part, or of several parts that are joined."""
        parts = (part,) if isinstance(part, str) else part
        return self._replace(names=tuple(f"{name}{part}." for name in self.names for part in parts))

    def weight(self, kind: str, out: Features, inside: Features | None = None) -> nnx.Param:
        """A parameter [*out, *inside] from the scope's tensors of that kind (`weight`, `bias`)."""
        depth = inside.theirs if inside else ()
        shapes = [(size, *depth) for size in out.theirs]
        turned = self.transposed and inside is not None
        stored = [shape[::-1] if turned else shape for shape in shapes]
        names = [f"{name}{kind}" for name in self.names]

        def build(*tensors: np.ndarray) -> np.ndarray:
            kept = out.arrange(*(x.T if turned else x for x in tensors))
            if inside is None:
                return kept
            kept = inside.arrange(np.moveaxis(kept, -1, 0))
            sides = range(len(inside.shape))
            return np.moveaxis(kept, sides, [i - len(sides) for i in sides])

        sides = (out, inside) if inside else (out,)
        shape = [size for side in sides for size in side.shape]
        axes = [axis for side in sides for axis in side.axes]
        source = Source(dict(zip(names, stored, strict=True)), build)
        return parameter(shape, axes, self.dtype, source=source)


def parameter(
    shape: Sequence[int], axes: Sequence[str | None], dtype: jnp.dtype, **metadata: Source
) -> nnx.Param:
    """A parameter of `shape` whose axes are named by `axes`. Models are only ever built abstractly."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes), **metadata)


def take_sources(module: nnx.Module) -> dict[str, Source]:
    """Where each parameter comes from, by its path. They are taken off: layers that differ in nothing else
    are alike, and traced once."""
    table = {}
    for path, part in nnx.iter_graph(module):
        if isinstance(part, nnx.Param):
            table[".".join(map(str, path))] = part.get_metadata("source")
            part.del_metadata("source")
    return table


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    return PartitionSpec(*(MESH_AXES[axis] for axis in axes))


def padded(size: int, shards: int) -> int:
    """The next size that `shards` divides."""
    return -(-size // shards) * shards
