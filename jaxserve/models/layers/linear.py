"""Matrix products with weights: the only place that will know how a weight is stored."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layers.param import weight
from jaxserve.pallas_kernels.matmul import Implementation, matmul


class Product(nnx.Module):
    """What multiplies by a weight, and how."""

    implementation: Implementation = "xla"

    def contract(self, x: jax.Array, w: jax.Array, dims: int = 1) -> jax.Array:
        """float32 [N, *out]: the last `dims` axes of x [N, *in] against those of w [*out, *in].

        As one product of matrices: XLA would turn one with more axes by transposing w each step. Only
        the first axis of `out` and of `in` may be sharded, so that merging axes moves nothing.
        """
        out, size = w.shape[: w.ndim - dims], math.prod(w.shape[w.ndim - dims :])
        y = matmul(x.reshape(-1, size), w.reshape(-1, size), self.implementation)
        return y.reshape(-1, *out)


class Linear(Product):
    """x [N, *in] -> float32 [N, *out], with weight [*out, *in] and an optional bias [*out]."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        axes: Sequence[str | None],
        *,
        bias: bool = False,
        dtype: jnp.dtype,
    ):
        self.in_dims = len(in_shape)
        self.weight = weight((*out_shape, *in_shape), axes, dtype)
        self.bias = weight(out_shape, axes[: len(out_shape)], dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.contract(x, self.weight[...], self.in_dims)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)
