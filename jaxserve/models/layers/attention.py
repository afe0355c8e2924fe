"""Causal multi-head attention with grouped KV heads."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.config import Config
from jaxserve.models.layers.heads import Heads, Split
from jaxserve.models.layers.linear import Linear
from jaxserve.models.layers.param import Features, Scope, plain
from jaxserve.pallas_kernels.paged_attention import Masking, Rotation

Attend = Callable[..., tuple[jax.Array, jax.Array]]
"""(q [N, heads, dim], k, v [N, kv_heads, dim], rotation, pool, scale=…, masking=…, alibi=…) ->
(out [N, heads, dim], pool)."""


class QKNorm(NamedTuple):
    """Queries and keys are normalised before they are turned."""

    make: Callable[[Scope, Features], nnx.Module]
    together: bool = False
    """All heads as one; otherwise each for itself, with the same weights."""
    names: tuple[str, str] = ("q_norm", "k_norm")


class Attention(nnx.Module):
    """qkv is one weight [kv_heads, group + 2, dim, embed], so that a shard is a slice of it."""

    def __init__(
        self,
        scope: Scope,
        c: Config,
        layer: int,
        *,
        qkv: tuple[str, str, str] | str = ("q_proj", "k_proj", "v_proj"),
        split: Split | None = None,
        out: str = "o_proj",
        qkv_bias: bool = False,
        out_bias: bool = False,
        scale: float | None = None,
        soft_cap: float | None = None,
        qk_norm: QKNorm | None = None,
        clip: float | None = None,
        alibi: np.ndarray | None = None,
    ):
        """`split` says how a checkpoint's one tensor `qkv` has the three. `alibi` is a slope for each head;
        `clip` bounds queries, keys and values. Rotation and window are what the config has for the layer."""
        rope, masking = c.rope_of(layer), Masking(c.window(layer), soft_cap or 0.0)
        heads = Heads(c.heads(scope.shards), c.head_dim, rope.order if rope else None)
        embed = plain(c.hidden_size, "embed")
        self.rope, self.masking, self.clip = rope, masking, clip
        self.scale = c.head_dim**-0.5 if scale is None else scale
        self.qkv = Linear(scope / qkv, embed, heads.qkv(split), bias=qkv_bias)
        self.out = Linear(scope / out, heads.out(), embed, bias=out_bias)
        q_norm = k_norm = None
        if qk_norm:
            sides = (heads.queries(), heads.keys()) if qk_norm.together else [heads.each()] * 2
            q_norm, k_norm = map(qk_norm.make, [scope / name for name in qk_norm.names], sides)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.alibi = None
        if alibi is not None:
            self.alibi = tuple(heads.layout.pick(heads.layout.q, alibi).ravel().tolist())

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, attend: Attend, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """x [N, features] -> (float32 [N, features], pool)."""
        qkv = self.qkv(x)
        if self.clip is not None:
            qkv = jnp.clip(qkv, -self.clip, self.clip)
        n, places, width, dim = qkv.shape
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.reshape(n, places * (width - 2), dim)
        how = {"scale": self.scale, "masking": self.masking}
        alibi = None if self.alibi is None else jnp.array(self.alibi, jnp.float32)
        out, pool = attend(q, k, v, rotation, pool, alibi=alibi, **how)
        return self.out(out.reshape(n, places, width - 2, dim)), pool
