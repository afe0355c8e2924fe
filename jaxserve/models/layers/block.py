"""A decoder's layer: attention and a feed-forward block, and the norms and residuals around them."""

import jax
from flax import nnx

from jaxserve.models.layers.attention import Attend, Attention
from jaxserve.models.layers.mlp import MLP, GatedMLP
from jaxserve.models.layers.norm import LayerNorm, RMSNorm
from jaxserve.pallas_kernels.paged_attention import Rotation

Norm = RMSNorm | LayerNorm


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). There may be none before, and one after, each part."""

    def __init__(
        self,
        attention_norm: Norm | None,
        attention: Attention,
        mlp_norm: Norm | None,
        mlp: MLP | GatedMLP,
        *,
        attention_out_norm: Norm | None = None,
        mlp_out_norm: Norm | None = None,
    ):
        self.attention_norm = attention_norm
        self.attention = attention
        self.attention_out_norm = attention_out_norm
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.mlp_out_norm = mlp_out_norm

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, attend: Attend, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x float32 [N, features] -> (the same, the layer's pool)."""
        out, pool = self.attention(_normal(self.attention_norm, x), rotation, attend, pool)
        x = x + _normal(self.attention_out_norm, out)
        return x + _normal(self.mlp_out_norm, self.mlp(_normal(self.mlp_norm, x))), pool


class ParallelBlock(nnx.Module):
    """x + attention(norm(x)) + mlp(norm(x)), with one norm or two."""

    def __init__(
        self, attention_norm: Norm, attention: Attention, mlp: MLP | GatedMLP, mlp_norm: Norm | None = None
    ):
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, attend: Attend, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x float32 [N, features] -> (the same, the layer's pool)."""
        normal = self.attention_norm(x)
        out, pool = self.attention(normal, rotation, attend, pool)
        return x + out + self.mlp(normal if self.mlp_norm is None else self.mlp_norm(x)), pool


def _normal(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
