"""Token embedding, and the same table as the output head where a model ties them."""

import jax
import jax.numpy as jnp

from jaxserve.models.layers.linear import Product
from jaxserve.pallas_kernels.matmul import take


class Embedding(Product):
    """ids int32 [N] -> float32 [N, features]; `attend` gives logits float32 [N, vocab]."""

    def __init__(self, vocab: int, features: int, dtype: jnp.dtype):
        super().__init__((vocab,), (features,), ("vocab", "embed"), dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        _, features = self.matrix
        return take(self.weight[...], ids, features, self.implementation).astype(jnp.float32)

    def attend(self, x: jax.Array) -> jax.Array:
        return self.contract(x)
