"""Gemma (Gemma Team, 2024): a Llama with scaled embeddings, norms with weights around zero, and GELU."""

from typing import Literal

import msgspec

from jaxserve.models.config import Count, RotaryConfig
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.param import Scope


class GemmaConfig(RotaryConfig, frozen=True, kw_only=True):
    head_dim: Count | None = 256
    max_position_embeddings: Count = 8192
    hidden_act: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    use_bidirectional_attention: Literal[False] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_act == "gelu":  # what the first configs say, and not what the models were trained with
            msgspec.structs.force_setattr(self, "hidden_act", "gelu_pytorch_tanh")


class Gemma(Decoder):
    Config = GemmaConfig

    def __init__(self, c: GemmaConfig, scope: Scope, **more: float | None):
        model = scope / "model"
        super().__init__(
            c,
            embed=Embedding(model / "embed_tokens", c.vocab_size, c.hidden_size, c.hidden_size**0.5),
            layers=[self.block(model / f"layers.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=norm(model / "norm", c),
            head=head(scope / "lm_head", c),
            **more,
        )

    @staticmethod
    def block(scope: Scope, c: GemmaConfig, layer: int) -> Block:
        bias = {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias}
        return Block(
            norm(scope / "input_layernorm", c),
            Attention(scope / "self_attn", c, layer, **bias),
            norm(scope / "post_attention_layernorm", c),
            GatedMLP(scope / "mlp", c),
        )


def norm(scope: Scope, c: GemmaConfig) -> RMSNorm:
    return RMSNorm(scope, c.hidden_size, c.rms_norm_eps, offset=1.0)
