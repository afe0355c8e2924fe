"""A weight and what its axes mean; where an axis goes on a mesh is decided here, once for all models."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

MESH_AXES: dict[str | None, str | None] = {
    "vocab": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "embed": None,
    None: None,
}
"""Logical axis of a weight -> axis of the mesh that shards it."""


def weight(shape: Sequence[int], axes: Sequence[str | None], dtype: jnp.dtype) -> nnx.Param:
    """A parameter of `shape` whose axes are named by `axes`. Models are only ever built abstractly."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.zeros(tuple(shape), dtype), axes=tuple(axes))


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    return PartitionSpec(*(MESH_AXES[axis] for axis in axes))


def padded(size: int, shards: int) -> int:
    """The next size that `shards` divides."""
    return -(-size // shards) * shards
