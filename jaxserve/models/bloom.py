"""BLOOM (BigScience, 2022): ALiBi, and a norm of the embedding."""

from typing import ClassVar, Literal

from jaxserve.models.config import Config, Count
from jaxserve.models.layers.alibi import slopes
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.heads import groups
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope


class BloomConfig(Config, frozen=True, kw_only=True):
    gated: ClassVar = False
    alibi: ClassVar = True
    aliases: ClassVar = {
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "seq_length": "max_position_embeddings",
    }

    intermediate_size: Count | None = None
    max_position_embeddings: Count = 2048
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: Literal[False] = False
    tie_word_embeddings: bool = True


class Bloom(Decoder):
    Config = BloomConfig

    def __init__(self, c: BloomConfig, scope: Scope):
        model = scope / "transformer"
        super().__init__(
            c,
            embed=Embedding(model / "word_embeddings", c.vocab_size, c.hidden_size),
            embed_norm=norm(model / "word_embeddings_layernorm", c),
            layers=[self.block(model / f"h.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=norm(model / "ln_f", c),
            head=head(scope / "lm_head", c),
        )

    @staticmethod
    def block(scope: Scope, c: BloomConfig, layer: int) -> Block:
        how = {"qkv": "query_key_value", "split": groups, "out": "dense", "qkv_bias": True, "out_bias": True}
        return Block(
            norm(scope / "input_layernorm", c),
            Attention(scope / "self_attention", c, layer, alibi=slopes(c.num_attention_heads), **how),
            norm(scope / "post_attention_layernorm", c),
            MLP(scope / "mlp", c, "dense_h_to_4h", "dense_4h_to_h"),
        )


def norm(scope: Scope, c: BloomConfig) -> LayerNorm:
    return LayerNorm(scope, c.hidden_size, c.layer_norm_epsilon)
