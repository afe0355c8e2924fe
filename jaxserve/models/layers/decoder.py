"""What all decoders share: tokens in, layer upon layer, logits out."""

from collections.abc import Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxserve.models.config import Config
from jaxserve.models.layers.attention import Attend
from jaxserve.models.layers.block import Block, ParallelBlock
from jaxserve.models.layers.embedding import Embedding, Positions
from jaxserve.models.layers.linear import Linear
from jaxserve.models.layers.repeat import apply


class Decoder(nnx.Module):
    """Token ids and positions in, final hidden states out; `logits` for the rows that need them.

    A family's constructor, `Family(config, scope)`, gives the parts.
    """

    Config: ClassVar[type[Config]]

    def __init__(
        self,
        config: Config,
        *,
        embed: Embedding,
        layers: Iterable[Block | ParallelBlock],
        norm: nnx.Module,
        head: Linear | None,
        positions: Positions | None = None,
        embed_norm: nnx.Module | None = None,
        soft_cap: float | None = None,
    ):
        """Without a `head` the embedding is the head too. `soft_cap` bounds the logits."""
        self.config, self.soft_cap = config, soft_cap
        self.embed = embed
        self.positions = positions
        self.embed_norm = embed_norm
        self.layers = nnx.List(layers)
        self.norm = norm
        self.head = head

    def __call__(
        self, ids: jax.Array, positions: jax.Array, attend: Attend, pools: list[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """ids and positions int32 [N] -> (float32 [N, hidden], the layers' pools)."""
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        ropes = [layer.attention.rope for layer in self.layers]
        rotations = {rope: rope(positions) for rope in dict.fromkeys(ropes) if rope is not None}
        new = []
        for layer, rope, pool in zip(self.layers, ropes, pools, strict=True):
            x, pool = apply(layer, x, rotations.get(rope), attend, pool)
            new.append(pool)
        return x, new

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 [R, vocab] of hidden states [R, hidden]."""
        x = self.norm(x)
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        logits = logits[:, : self.config.vocab_size]
        return self.soft_cap * jnp.tanh(logits / self.soft_cap) if self.soft_cap else logits
