"""OLMo 2 (OLMo Team, 2025): a Llama whose norms come after each part, and over all queries and all keys."""

from functools import partial

from jaxserve.models.config import Count, RotaryConfig
from jaxserve.models.layers.attention import QKNorm
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.param import Scope
from jaxserve.models.llama import Llama


class Olmo2Config(RotaryConfig, frozen=True, kw_only=True):
    max_position_embeddings: Count = 2048
    rms_norm_eps: float = 1e-5


class Olmo2(Llama):
    Config = Olmo2Config

    @classmethod
    def block(cls, scope: Scope, c: Olmo2Config, layer: int) -> Block:
        together = QKNorm(partial(RMSNorm, eps=c.rms_norm_eps), together=True)
        return Block(
            None,
            cls.attention(scope / "self_attn", c, layer, qk_norm=together),
            None,
            GatedMLP(scope / "mlp", c),
            attention_out_norm=RMSNorm(scope / "post_attention_layernorm", c.hidden_size, c.rms_norm_eps),
            mlp_out_norm=RMSNorm(scope / "post_feedforward_layernorm", c.hidden_size, c.rms_norm_eps),
        )
