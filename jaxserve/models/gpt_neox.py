"""GPT-NeoX (Black et al., 2022) and Pythia: attention and MLP in parallel, a part of each head turned."""

from typing import ClassVar

from jaxserve.models.config import Count, RotaryConfig
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block, ParallelBlock
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.heads import groups
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope


class GPTNeoXConfig(RotaryConfig, frozen=True, kw_only=True):
    gated: ClassVar = False
    aliases: ClassVar = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}

    max_position_embeddings: Count = 2048
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.25
    attention_bias: bool = True
    use_parallel_residual: bool = True


class GPTNeoX(Decoder):
    Config = GPTNeoXConfig

    def __init__(self, c: GPTNeoXConfig, scope: Scope):
        model = scope / "gpt_neox"
        super().__init__(
            c,
            embed=Embedding(model / "embed_in", c.vocab_size, c.hidden_size),
            layers=[self.block(model / f"layers.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=LayerNorm(model / "final_layer_norm", c.hidden_size, c.layer_norm_eps),
            head=head(scope / "embed_out", c),
        )

    @staticmethod
    def block(scope: Scope, c: GPTNeoXConfig, layer: int) -> Block | ParallelBlock:
        bias = {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias}
        attention_norm = LayerNorm(scope / "input_layernorm", c.hidden_size, c.layer_norm_eps)
        attention = Attention(
            scope / "attention", c, layer, qkv="query_key_value", split=groups, out="dense", **bias
        )
        mlp_norm = LayerNorm(scope / "post_attention_layernorm", c.hidden_size, c.layer_norm_eps)
        mlp = MLP(scope / "mlp", c, "dense_h_to_4h", "dense_4h_to_h")
        if c.use_parallel_residual:
            return ParallelBlock(attention_norm, attention, mlp, mlp_norm)
        return Block(attention_norm, attention, mlp_norm, mlp)
