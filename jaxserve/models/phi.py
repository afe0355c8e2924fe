"""Phi 1, 1.5 and 2 (Li et al., 2023): attention beside the MLP after one norm, a part of each head turned."""

from functools import partial
from typing import ClassVar

from jaxserve.models.config import Count, RotaryConfig
from jaxserve.models.layers.attention import Attention, QKNorm
from jaxserve.models.layers.block import ParallelBlock
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope


class PhiConfig(RotaryConfig, frozen=True, kw_only=True):
    gated: ClassVar = False

    max_position_embeddings: Count = 2048
    hidden_act: str = "gelu_new"
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5
    qk_layernorm: bool = False


class Phi(Decoder):
    Config = PhiConfig

    def __init__(self, c: PhiConfig, scope: Scope):
        model = scope / "model"
        super().__init__(
            c,
            embed=Embedding(model / "embed_tokens", c.vocab_size, c.hidden_size),
            layers=[self.block(model / f"layers.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=LayerNorm(model / "final_layernorm", c.hidden_size, c.layer_norm_eps),
            head=head(scope / "lm_head", c, bias=True),
        )

    @staticmethod
    def block(scope: Scope, c: PhiConfig, layer: int) -> ParallelBlock:
        each = QKNorm(partial(LayerNorm, eps=c.layer_norm_eps), names=("q_layernorm", "k_layernorm"))
        norms = {"qk_norm": each} if c.qk_layernorm else {}
        return ParallelBlock(
            LayerNorm(scope / "input_layernorm", c.hidden_size, c.layer_norm_eps),
            Attention(scope / "self_attn", c, layer, out="dense", qkv_bias=True, out_bias=True, **norms),
            MLP(scope / "mlp", c, "fc1", "fc2"),
        )
