"""Matrix products with weights: the only place that knows how a weight is kept."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.layers.activation import ACTIVATIONS, GATES
from jaxserve.models.layers.param import Features, Scope, parameter
from jaxserve.pallas_kernels.matmul import (
    Implementation,
    gated,
    keep,
    kept,
    matmul,
    matmul_int8,
    quantise,
)

Quantization = Literal["int8"]


class Used(nnx.Variable):
    """int32 []: how many rows of a step are not padding. They come first."""


class Product(nnx.Module):
    """What multiplies by a weight [*out, *in], which is given whole and kept as the product reads it."""

    used: Used | None = None

    def __init__(self, scope: Scope, inside: Features, out: Features):
        self.out_shape, self.in_shape = out.shape, inside.shape
        self.dtype = scope.dtype
        """Of the weight as it is given."""
        self.implementation: Implementation = "xla"
        self.result = jnp.dtype(jnp.float32)
        """Type of what `contract` gives."""
        self.weight = scope.weight("weight", out, inside)
        self.scale: nnx.Param | None = nnx.data(None)
        """float32 [*out] of a weight that is kept in 8 bits."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Outputs and depth of the product of matrices that it is."""
        return math.prod(self.out_shape), math.prod(self.in_shape)

    @property
    def _used(self) -> jax.Array | None:
        return None if self.used is None else self.used[...]

    def multiply_with(
        self,
        implementation: Implementation,
        quantization: Quantization | None = None,
        *,
        rounded: bool = False,
    ) -> None:
        """From now on; the weight is kept as that wants it. `rounded` results have the weight's type. One of
        the vocabulary is never quantised, nor are logits rounded."""
        axes = self.weight.get_metadata()["axes"]
        outs, ins = axes[: len(self.out_shape)], axes[len(self.out_shape) :]
        number = self.dtype
        if quantization and outs[0] != "vocab":
            number = jnp.dtype(jnp.int8)
            self.scale = parameter(self.out_shape, outs, jnp.dtype(jnp.float32))
        self.implementation = implementation
        if rounded and outs[0] != "vocab":
            self.result = self.dtype
        form = kept(*self.matrix, number, implementation)
        if implementation == "cpu":
            self.weight = parameter(form.shape, (outs[0], ins[0], None, None), form.dtype)
        else:
            self.weight = parameter((*self.out_shape, *self.in_shape), axes, form.dtype)

    def keep(self, given: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters that hold the weight [*out, *in]."""
        w, held = given.reshape(self.matrix), {}
        if self.scale is None:
            w = w.astype(self.dtype, copy=False)
        else:
            w, scales = quantise(w)
            held["scale"] = scales.reshape(self.out_shape)
        return held | {"weight": keep(w, self.implementation).reshape(self.weight.shape)}

    def contract(self, x: jax.Array) -> jax.Array:
        """x [N, *in] -> `result` [N, *out]; rows of padding are undefined.

        As one product of matrices: XLA would turn one with more axes by transposing w each step. Only
        the first axis of `out` and of `in` may be sharded, so that merging axes moves nothing.
        """
        outs, depth = self.matrix
        x, w, used = x.reshape(-1, depth), self.weight[...], self._used
        if self.implementation == "xla":
            w = w.reshape(outs, depth)
        if self.scale is None:
            y = matmul(x, w, outs, used, self.implementation, self.result)
        else:
            y = matmul_int8(x, w, self.scale[...].reshape(outs), used, self.implementation)
            y = y.astype(self.result)
        return y.reshape(-1, *self.out_shape)


class Linear(Product):
    """x [N, *in] -> `result` [N, *out], with weight [*out, *in] and an optional bias [*out]."""

    def __init__(self, scope: Scope, inside: Features, out: Features, *, bias: bool = False):
        super().__init__(scope, inside, out)
        self.bias = scope.weight("bias", out) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.contract(x)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class GatedLinear(Linear):
    """`gated` gives float32 [N, shards, width] of x [N, *in], with out_shape (shards, 2, width): the
    activation of the first output of each pair, times the second."""

    def gated(self, x: jax.Array, activation: str) -> jax.Array:
        """`activation` is one of ACTIVATIONS."""
        shards, _, width = self.out_shape
        if self.bias is None and shards == 1 and activation in GATES:
            outs, depth = self.matrix
            scales = None if self.scale is None else self.scale[...].reshape(outs)
            how = GATES[activation], self._used, self.implementation
            if (y := gated(x.reshape(-1, depth), self.weight[...], outs, scales, *how)) is not None:
                return y.reshape(-1, shards, width)
        both = self(x).astype(jnp.float32)
        return ACTIVATIONS[activation](both[:, :, 0]) * both[:, :, 1]
