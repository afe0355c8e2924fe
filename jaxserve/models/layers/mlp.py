"""Feed-forward blocks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.layers.linear import Linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)); gate and up are one weight [2, width, embed] (Shazeer, 2020)."""

    def __init__(self, features: int, width: int, activation: str, *, bias: bool, dtype: jnp.dtype):
        self.activation = activation
        self.gate_up = Linear((features,), (2, width), (None, "mlp", "embed"), bias=bias, dtype=dtype)
        self.down = Linear((width,), (features,), ("embed", "mlp"), bias=bias, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        both = self.gate_up(x)
        return self.down(ACTIVATIONS[self.activation](both[:, 0]) * both[:, 1])
