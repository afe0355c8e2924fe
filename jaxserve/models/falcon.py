"""Falcon (Almazrouei et al., 2023): 7B with one KV head, and one norm for attention and MLP in parallel; 40B
and 180B with groups of heads and two norms; 11B with groups and one norm."""

from typing import ClassVar, Literal

import msgspec

from jaxserve.models.config import Count, RotaryConfig
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block, ParallelBlock
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.heads import groups
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope


class FalconConfig(RotaryConfig, frozen=True, kw_only=True):
    gated: ClassVar = False
    aliases: ClassVar = {
        "n_embed": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_key_value_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "activation": "hidden_act",
    }

    intermediate_size: Count | None = None
    max_position_embeddings: Count = 2048
    hidden_act: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    bias: bool = False
    alibi: Literal[False] = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    num_ln_in_parallel_attn: Literal[1, 2] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if not self.new_decoder_architecture:
            heads = 1 if self.multi_query else self.num_attention_heads
            msgspec.structs.force_setattr(self, "num_key_value_heads", heads)
        super().__post_init__()

    @property
    def norms(self) -> int:
        """Before attention and MLP in parallel."""
        return self.num_ln_in_parallel_attn or (2 if self.new_decoder_architecture else 1)


class Falcon(Decoder):
    Config = FalconConfig

    def __init__(self, c: FalconConfig, scope: Scope):
        model = scope / "transformer"
        super().__init__(
            c,
            embed=Embedding(model / "word_embeddings", c.vocab_size, c.hidden_size),
            layers=[self.block(model / f"h.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=norm(model / "ln_f", c),
            head=head(scope / "lm_head", c),
        )

    @staticmethod
    def block(scope: Scope, c: FalconConfig, layer: int) -> Block | ParallelBlock:
        how = {"qkv": "query_key_value", "split": groups, "out": "dense"}
        bias = {"qkv_bias": c.bias, "out_bias": c.bias}
        attention = Attention(scope / "self_attention", c, layer, **how, **bias)
        mlp = MLP(scope / "mlp", c, "dense_h_to_4h", "dense_4h_to_h", bias=c.bias)
        if not (c.parallel_attn or c.new_decoder_architecture):
            before, between = (norm(scope / f"{name}_layernorm", c) for name in ("input", "post_attention"))
            return Block(before, attention, between, mlp)
        if c.norms == 2:
            return ParallelBlock(norm(scope / "ln_attn", c), attention, mlp, norm(scope / "ln_mlp", c))
        return ParallelBlock(norm(scope / "input_layernorm", c), attention, mlp)


def norm(scope: Scope, c: FalconConfig) -> LayerNorm:
    return LayerNorm(scope, c.hidden_size, c.layer_norm_epsilon)
