"""A decoder's layer: attention and a feed-forward block, and the norms and residuals around them."""

import jax
from flax import nnx

from jaxserve.models.layers.attention import Attend, Attention
from jaxserve.pallas_kernels.paged_attention import Rotation


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, attention_norm: nnx.Module, attention: Attention, mlp_norm: nnx.Module, mlp: nnx.Module
    ):
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, attend: Attend, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x float32 [N, features] -> (the same, the layer's pool)."""
        out, pool = self.attention(self.attention_norm(x), rotation, attend, pool)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), pool
