"""MPT (MosaicML, 2023): ALiBi, no biases at all, and bounds of queries, keys and values."""

from typing import ClassVar, Literal

import msgspec

from jaxserve.models.config import Config, Count
from jaxserve.models.layers.alibi import slopes_of_larger
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.heads import rows
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope


class MPTAttentionConfig(msgspec.Struct, frozen=True, kw_only=True):
    attn_type: Literal["multihead_attention"] = "multihead_attention"
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    alibi: Literal[True] = True
    alibi_bias_max: Literal[8] = 8
    prefix_lm: Literal[False] = False
    qk_ln: Literal[False] = False


class MPTConfig(Config, frozen=True, kw_only=True):
    gated: ClassVar = False
    alibi: ClassVar = True
    aliases: ClassVar = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
    }

    intermediate_size: Count | None = None
    max_position_embeddings: Count = 2048
    hidden_act: Literal["gelu"] = "gelu"
    layer_norm_epsilon: float = 1e-5
    expansion_ratio: Literal[4] = 4
    no_bias: Literal[True] = True
    logit_scale: None = None
    attn_config: MPTAttentionConfig = MPTAttentionConfig()
    tie_word_embeddings: bool = True


class MPT(Decoder):
    Config = MPTConfig

    def __init__(self, c: MPTConfig, scope: Scope):
        model = scope / "transformer"
        super().__init__(
            c,
            embed=Embedding(model / "wte", c.vocab_size, c.hidden_size),
            layers=[self.block(model / f"blocks.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=norm(model / "norm_f", c),
            head=head(scope / "lm_head", c),
        )

    @staticmethod
    def block(scope: Scope, c: MPTConfig, layer: int) -> Block:
        a = c.attn_config
        how = {
            "scale": a.softmax_scale,
            "clip": a.clip_qkv,
            "alibi": slopes_of_larger(c.num_attention_heads),
        }
        return Block(
            norm(scope / "norm_1", c),
            Attention(scope / "attn", c, layer, qkv="Wqkv", split=rows, out="out_proj", **how),
            norm(scope / "norm_2", c),
            MLP(scope / "ffn", c, "up_proj", "down_proj", bias=False),
        )


def norm(scope: Scope, c: MPTConfig) -> LayerNorm:
    return LayerNorm(scope, c.hidden_size, c.layer_norm_epsilon, bias=False)
