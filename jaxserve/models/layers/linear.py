"""Matrix products with weights: the only place that will know how a weight is stored."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxserve.models.layers.param import weight


def contract(x: jax.Array, w: jax.Array, dims: int = 1) -> jax.Array:
    """float32 [N, *out]: the last `dims` axes of x [N, *in] against those of w [*out, *in].

    Weights stay `[out, in]` and accumulate in float32: on a CPU that is the form that reaches the
    matrix units in bf16. float32 products are kept exact on every device.
    """
    x_dims = tuple(range(x.ndim - dims, x.ndim))
    w_dims = tuple(range(w.ndim - dims, w.ndim))
    exact = lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return lax.dot_general(
        x, w, ((x_dims, w_dims), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


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
