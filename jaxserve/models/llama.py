"""Llama (Touvron et al., 2023) and its many descendants: RMSNorm, rotary GQA, gated MLP."""

from typing import Any

from jaxserve.models.config import RotaryConfig
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.param import Scope


class LlamaConfig(RotaryConfig, frozen=True, kw_only=True):
    rms_norm_eps: float


class Llama(Decoder):
    Config = LlamaConfig

    def __init__(self, c: LlamaConfig, scope: Scope):
        model = scope / "model"
        super().__init__(
            c,
            embed=Embedding(model / "embed_tokens", c.vocab_size, c.hidden_size),
            layers=[self.block(model / f"layers.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=RMSNorm(model / "norm", c.hidden_size, c.rms_norm_eps),
            head=head(scope / "lm_head", c),
        )

    @classmethod
    def block(cls, scope: Scope, c: LlamaConfig, layer: int) -> Block:
        return Block(
            RMSNorm(scope / "input_layernorm", c.hidden_size, c.rms_norm_eps),
            cls.attention(scope / "self_attn", c, layer),
            RMSNorm(scope / "post_attention_layernorm", c.hidden_size, c.rms_norm_eps),
            GatedMLP(scope / "mlp", c, bias=c.mlp_bias),
        )

    @staticmethod
    def attention(scope: Scope, c: LlamaConfig, layer: int, **more: Any) -> Attention:
        """`more`: what a descendant has besides, or otherwise."""
        bias = {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias}
        return Attention(scope, c, layer, **bias | more)
