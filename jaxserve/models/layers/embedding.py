"""Token embedding, and the same table as the output head where a model ties them."""

import jax
import jax.numpy as jnp

from jaxserve.models.layers.linear import Product
from jaxserve.models.layers.param import weight


class Embedding(Product):
    """ids int32 [N] -> float32 [N, features]; `attend` gives logits float32 [N, vocab]."""

    def __init__(self, vocab: int, features: int, dtype: jnp.dtype):
        self.weight = weight((vocab, features), ("vocab", "embed"), dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.weight[...].at[ids].get(mode="clip").astype(jnp.float32)

    def attend(self, x: jax.Array) -> jax.Array:
        return self.contract(x, self.weight[...])
