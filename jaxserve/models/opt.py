"""OPT (Zhang et al., 2022): learned positions that begin at 2, ReLU."""

from typing import ClassVar, Literal

from jaxserve.errors import ModelError
from jaxserve.models.config import Config, Count
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, Positions, head
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope

EPS = 1e-5


class OPTConfig(Config, frozen=True, kw_only=True):
    gated: ClassVar = False
    aliases: ClassVar = {
        "ffn_dim": "intermediate_size",
        "activation_function": "hidden_act",
        "_remove_final_layer_norm": "remove_final_layer_norm",
    }

    max_position_embeddings: Count = 2048
    hidden_act: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: Literal[True] = True
    remove_final_layer_norm: Literal[False] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.word_embed_proj_dim not in (None, self.hidden_size):
            raise ModelError(
                f"word_embed_proj_dim {self.word_embed_proj_dim} is not supported: only hidden_size"
            )


class OPT(Decoder):
    Config = OPTConfig

    def __init__(self, c: OPTConfig, scope: Scope):
        model = scope / "model" / "decoder"
        super().__init__(
            c,
            embed=Embedding(model / "embed_tokens", c.vocab_size, c.hidden_size),
            positions=Positions(
                model / "embed_positions", c.max_position_embeddings, c.hidden_size, offset=2
            ),
            layers=[self.block(model / f"layers.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=norm(model / "final_layer_norm", c),
            head=head(scope / "lm_head", c),
        )

    @staticmethod
    def block(scope: Scope, c: OPTConfig, layer: int) -> Block:
        bias = {"qkv_bias": c.enable_bias, "out_bias": c.enable_bias}
        return Block(
            norm(scope / "self_attn_layer_norm", c),
            Attention(scope / "self_attn", c, layer, out="out_proj", **bias),
            norm(scope / "final_layer_norm", c),
            MLP(scope, c, "fc1", "fc2", bias=c.enable_bias),
        )


def norm(scope: Scope, c: OPTConfig) -> LayerNorm:
    affine = c.layer_norm_elementwise_affine
    return LayerNorm(scope, c.hidden_size, EPS, weight=affine, bias=affine)
