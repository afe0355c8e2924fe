"""StarCoder 2 (Lozhkov et al., 2024): rotary GQA in a window, LayerNorm, biases and a plain MLP."""

from typing import ClassVar

from jaxserve.models.config import Count, WindowedConfig
from jaxserve.models.layers.attention import Attention
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.embedding import Embedding, head
from jaxserve.models.layers.mlp import MLP
from jaxserve.models.layers.norm import LayerNorm
from jaxserve.models.layers.param import Scope


class StarCoder2Config(WindowedConfig, frozen=True, kw_only=True):
    gated: ClassVar = False

    num_key_value_heads: Count | None = 2
    max_position_embeddings: Count = 4096
    hidden_act: str = "gelu_pytorch_tanh"
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    tie_word_embeddings: bool = True


class StarCoder2(Decoder):
    Config = StarCoder2Config

    def __init__(self, c: StarCoder2Config, scope: Scope):
        model = scope / "model"
        super().__init__(
            c,
            embed=Embedding(model / "embed_tokens", c.vocab_size, c.hidden_size),
            layers=[self.block(model / f"layers.{i}", c, i) for i in range(c.num_hidden_layers)],
            norm=LayerNorm(model / "norm", c.hidden_size, c.norm_epsilon),
            head=head(scope / "lm_head", c),
        )

    @staticmethod
    def block(scope: Scope, c: StarCoder2Config, layer: int) -> Block:
        return Block(
            LayerNorm(scope / "input_layernorm", c.hidden_size, c.norm_epsilon),
            Attention(scope / "self_attn", c, layer, qkv_bias=c.use_bias, out_bias=c.use_bias),
            LayerNorm(scope / "post_attention_layernorm", c.hidden_size, c.norm_epsilon),
            MLP(scope / "mlp", c, "c_fc", "c_proj", bias=c.use_bias),
        )
