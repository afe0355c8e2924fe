"""GPT-2 (Radford et al., 2019): learned positions, and matrices stored as [in, out]."""

from typing import ClassVar, Literal

from jaxserve.models.config import Config, Count
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, Positions, head
from jaxserve.models.layers.heads import Split, rows
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope


class GPT2Config(Config, frozen=True, kw_only=True):
    gated: ClassVar = False
    aliases: ClassVar = {
        "n_embd": "hidden_size",
        "n_inner": "intermediate_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "activation_function": "hidden_act",
    }

    intermediate_size: Count | None = None
    max_position_embeddings: Count = 1024
    hidden_act: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True


class GPT2(Decoder):
    Config = GPT2Config
    transposed: ClassVar = True
    split: ClassVar[Split] = staticmethod(rows)

    def __init__(self, c: GPT2Config, scope: Scope):
        model = scope / "transformer"
        layers = model._replace(transposed=self.transposed)
        super().__init__(
            c,
            embed=Embedding(model / "wte", c.vocab_size, c.hidden_size),
            positions=Positions(model / "wpe", c.max_position_embeddings, c.hidden_size),
            layers=[self.block(layers / f"h.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=LayerNorm(model / "ln_f", c.hidden_size, c.layer_norm_epsilon),
            head=head(scope / "lm_head", c),
        )

    @classmethod
    def block(cls, scope: Scope, c: GPT2Config, layer: int) -> Block:
        scale = c.head_dim**-0.5 if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        how = {"qkv": "c_attn", "split": cls.split, "out": "c_proj", "qkv_bias": True, "out_bias": True}
        return Block(
            LayerNorm(scope / "ln_1", c.hidden_size, c.layer_norm_epsilon),
            Attention(scope / "attn", c, layer, scale=scale, **how),
            LayerNorm(scope / "ln_2", c.hidden_size, c.layer_norm_epsilon),
            MLP(scope / "mlp", c, "c_fc", "c_proj"),
        )
