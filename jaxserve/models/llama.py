"""Llama (Touvron et al., 2023) and its many descendants: RMSNorm, rotary GQA, gated MLP."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from flax import nnx

from jaxserve.errors import ModelError
from jaxserve.loading.weights import Source
from jaxserve.models.layers.activation import ACTIVATIONS
from jaxserve.models.layers.attention import Attend, Attention, HeadLayout
from jaxserve.models.layers.embedding import Embedding
from jaxserve.models.layers.linear import Linear
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.param import padded
from jaxserve.models.layers.repeat import apply
from jaxserve.models.layers.rope import Rope
from jaxserve.pallas_kernels.paged_attention import Rotation

Count = Annotated[int, msgspec.Meta(gt=0)]


class Shape(msgspec.Struct):
    """What the other keys of a config are completed from."""

    hidden_size: Count
    num_attention_heads: Count
    max_position_embeddings: Count

NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


class LlamaConfig(msgspec.Struct, frozen=True):
    """The shape of a model, from the keys of its `config.json`."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count
    max_position_embeddings: Count
    rms_norm_eps: float
    rope: Rope
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Raises ModelError naming the key that is missing or wrong."""
        known = dict(config)
        try:
            shape = msgspec.convert(config, Shape)
            heads = shape.num_attention_heads
            known["num_key_value_heads"] = known.get("num_key_value_heads") or heads
            known["head_dim"] = known.get("head_dim") or shape.hidden_size // heads
            known["rope"] = Rope.from_config(config, known["head_dim"])
            found = msgspec.convert(known, cls)
        except msgspec.ValidationError as error:
            raise ModelError(f"the model's config cannot be used: {error}") from None
        if found.hidden_act not in ACTIVATIONS:
            raise ModelError(f"activation {found.hidden_act!r} is not supported: {', '.join(ACTIVATIONS)}")
        if heads % found.num_key_value_heads:
            raise ModelError(f"{found.num_key_value_heads} key-value heads cannot be shared by {heads} heads")
        return found

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can have."""
        return self.rope.reach

    def heads(self, shards: int) -> HeadLayout:
        return HeadLayout.over(shards, self.num_attention_heads, self.num_key_value_heads)


class LlamaLayer(nnx.Module):
    def __init__(self, c: LlamaConfig, shards: int, dtype: jnp.dtype):
        bias = c.attention_bias
        heads, width = c.heads(shards), padded(c.intermediate_size, shards)
        self.attention_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.attention = Attention(
            c.hidden_size, heads, c.head_dim, qkv_bias=bias, out_bias=bias, dtype=dtype
        )
        self.mlp_norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype)
        self.mlp = GatedMLP(c.hidden_size, width, c.hidden_act, shards, bias=c.mlp_bias, dtype=dtype)

    def __call__(
        self, x: jax.Array, rotation: Rotation, attend: Attend, pool: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        out, pool = self.attention(self.attention_norm(x), rotation, attend, pool)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), pool


class Llama(nnx.Module):
    """Token ids and positions in, final hidden states out; `logits` for the rows that need them."""

    Config = LlamaConfig

    def __init__(self, config: LlamaConfig, shards: int, dtype: jnp.dtype):
        self.config = config
        hidden, vocab = config.hidden_size, padded(config.vocab_size, shards)
        self.embed = Embedding(vocab, hidden, dtype)
        self.layers = nnx.List([LlamaLayer(config, shards, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype)
        tied = config.tie_word_embeddings
        self.head = None if tied else Linear((hidden,), (vocab,), ("vocab", "embed"), dtype=dtype)

    def __call__(
        self, ids: jax.Array, positions: jax.Array, attend: Attend, pools: list[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """ids and positions int32 [N] -> (float32 [N, hidden], the layers' pools)."""
        x = self.embed(ids)
        rotation = self.config.rope(positions)
        new = []
        for layer, pool in zip(self.layers, pools, strict=True):
            x, pool = apply(layer, x, rotation, attend, pool)
            new.append(pool)
        return x, new

    def logits(self, x: jax.Array) -> jax.Array:
        """float32 [R, vocab] of hidden states [R, hidden]."""
        x = self.norm(x)
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        return logits[:, : self.config.vocab_size]

    @staticmethod
    def tensors(c: LlamaConfig, shards: int) -> dict[str, Source]:
        """Where each parameter comes from in a checkpoint. What a mesh pads is filled with zeros."""
        heads = c.heads(shards)
        table = {
            "embed.weight": Source.one("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),
            "norm.weight": Source.one("model.norm.weight", (c.hidden_size,)),
        }
        if not c.tie_word_embeddings:
            table["head.weight"] = Source.one("lm_head.weight", (c.vocab_size, c.hidden_size))
        for i in range(c.num_hidden_layers):
            ours, theirs = f"layers.{i}.", f"model.layers.{i}."
            for name, their in NORMS.items():
                table[f"{ours}{name}.weight"] = Source.one(f"{theirs}{their}.weight", (c.hidden_size,))
            table |= _attention(c, heads, f"{ours}attention.", f"{theirs}self_attn.")
            table |= _mlp(c, shards, f"{ours}mlp.", f"{theirs}mlp.")
        return table


def _attention(c: LlamaConfig, heads: HeadLayout, ours: str, theirs: str) -> dict[str, Source]:
    h, kv, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    counts = {"q_proj": h, "k_proj": kv, "v_proj": kv}

    def fused(kind: str, tail: tuple[int, ...]) -> Source:
        shapes = {f"{theirs}{name}.{kind}": (n * dim, *tail) for name, n in counts.items()}
        return Source(shapes, lambda *qkv: heads.fuse_qkv(*(x.reshape(-1, dim, *tail) for x in qkv)))

    def spread(out: np.ndarray) -> np.ndarray:
        grid = heads.pick(heads.q, out.reshape(c.hidden_size, h, dim).swapaxes(0, 1))
        return grid.transpose(2, 0, 1, 3)

    table = {
        f"{ours}qkv.weight": fused("weight", (c.hidden_size,)),
        f"{ours}out.weight": Source({f"{theirs}o_proj.weight": (c.hidden_size, h * dim)}, spread),
    }
    if c.attention_bias:
        table[f"{ours}qkv.bias"] = fused("bias", ())
        table[f"{ours}out.bias"] = Source.one(f"{theirs}o_proj.bias", (c.hidden_size,))
    return table


def _mlp(c: LlamaConfig, shards: int, ours: str, theirs: str) -> dict[str, Source]:
    wide, narrow = c.intermediate_size, c.hidden_size

    def fused(kind: str, tail: tuple[int, ...]) -> Source:
        shapes = {f"{theirs}{name}.{kind}": (wide, *tail) for name in ("gate_proj", "up_proj")}
        return Source(shapes, partial(GatedMLP.fuse, shards))

    def down(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(GatedMLP.split(shards, x.T), -1, 0)

    table = {
        f"{ours}gate_up.weight": fused("weight", (narrow,)),
        f"{ours}down.weight": Source({f"{theirs}down_proj.weight": (narrow, wide)}, down),
    }
    if c.mlp_bias:
        table[f"{ours}gate_up.bias"] = fused("bias", ())
        table[f"{ours}down.bias"] = Source.one(f"{theirs}down_proj.bias", (narrow,))
    return table
