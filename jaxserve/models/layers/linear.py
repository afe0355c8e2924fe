"""Matrix products with weights: the only place that will know how a weight is stored."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.models.layers.param import weight


def contract(x: jax.Array, w: jax.Array, dims: int = 1) -> jax.Array:
    """float32 [N, *out]: the last `dims` axes of x [N, *in] against those of w [*out, *in].

    As one product of matrices: x [N, in], w [out, in], accumulated in float32. That is the form that
    reaches a CPU's matrix units in bf16; XLA would turn one with more axes by transposing w each step.
    Only the first axis of `out` and of `in` may be sharded, so that merging axes moves nothing.
    float32 products are kept exact on every device.
    """
    out, size = w.shape[: w.ndim - dims], math.prod(w.shape[w.ndim - dims :])
    exact = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    rows, columns = x.reshape(-1, size), w.reshape(-1, size)
    y = lax.dot_general(
        rows, columns, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )
    return y.reshape(-1, *out)


class Linear(nnx.Module):
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
        y = contract(x.astype(self.weight.dtype), self.weight[...], self.in_dims)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)
