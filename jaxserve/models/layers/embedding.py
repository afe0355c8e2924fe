"""Embeddings of tokens, and of positions that are learned."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import Config
from jaxserve.models.layers.linear import Linear, Product
from jaxserve.models.layers.param import Features, Scope, padded, plain
from jaxserve.pallas_kernels.matmul import take


class Embedding(Product):
    """ids int32 [N] -> float32 [N, features], times `scale`; `attend` gives logits float32 [N, vocab]: the
    same table is the output head where a model ties them."""

    def __init__(self, scope: Scope, vocab: int, features: int, scale: float = 1.0):
        super().__init__(scope, plain(features, "embed"), words(vocab, scope.shards))
        self.by = scale

    def __call__(self, ids: jax.Array) -> jax.Array:
        _, features = self.matrix
        x = take(self.weight[...], ids, features, self.implementation).astype(jnp.float32)
        return x if self.by == 1.0 else x * self.by

    def attend(self, x: jax.Array) -> jax.Array:
        return self.contract(x)


class Positions(nnx.Module):
    """Learned positions: int32 [N] -> float32 [N, features]. The table begins `offset` rows earlier."""

    def __init__(self, scope: Scope, positions: int, features: int, offset: int = 0):
        self.offset = offset
        self.weight = scope.weight("weight", plain(positions + offset), plain(features, "embed"))

    def __call__(self, positions: jax.Array) -> jax.Array:
        return self.weight[...][jnp.maximum(positions, 0) + self.offset].astype(jnp.float32)


def head(scope: Scope, c: Config, *, bias: bool = False) -> Linear | None:
    """[N, features] -> logits float32 [N, vocab], by a table of its own; None where the model ties them."""
    if c.tie_word_embeddings:
        return None
    return Linear(scope, plain(c.hidden_size, "embed"), words(c.vocab_size, scope.shards), bias=bias)


def words(vocab: int, shards: int) -> Features:
    """The vocabulary, padded until the mesh divides it."""
    return Features((vocab,), (padded(vocab, shards),), ("vocab",))
