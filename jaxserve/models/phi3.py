"""Phi 3 and 4 (Abdin et al., 2024): a Llama with joined projections, and a part of each head turned."""

from jaxserve.models.config import Count, WindowedConfig
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.heads import rows
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.param import Scope
from jaxserve.models.llama import Llama


class Phi3Config(WindowedConfig, frozen=True, kw_only=True):
    max_position_embeddings: Count = 4096
    rms_norm_eps: float = 1e-5


class Phi3(Llama):
    Config = Phi3Config

    @classmethod
    def block(cls, scope: Scope, c: Phi3Config, layer: int) -> Block:
        return Block(
            RMSNorm(scope / "input_layernorm", c.hidden_size, c.rms_norm_eps),
            Attention(scope / "self_attn", c, layer, qkv="qkv_proj", split=rows),
            RMSNorm(scope / "post_attention_layernorm", c.hidden_size, c.rms_norm_eps),
            GatedMLP(scope / "mlp", c, gate_up="gate_up_proj"),
        )
