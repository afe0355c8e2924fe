"""Gemma 2 (2024): norms before and after each part, capped logits, a window in every other layer. Gemma 3
(2025): normalised queries and keys in place of caps, frequencies of their own in the layers with a window."""

from functools import partial
from typing import Any, ClassVar, Literal

from jaxserve.models.config import Count, WindowedConfig
from jaxserve.models.gemma import Gemma, norm
from jaxserve.models.layers.attention import Attention, QKNorm
from jaxserve.models.layers.block import Block
from jaxserve.models.layers.mlp import GatedMLP
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.param import Scope
from jaxserve.models.layers.rope import Rope


class Gemma2Config(WindowedConfig, frozen=True, kw_only=True):
    aliases: ClassVar = {"hidden_activation": "hidden_act"}

    head_dim: Count | None = 256
    max_position_embeddings: Count = 8192
    hidden_act: str = "gelu_pytorch_tanh"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    use_bidirectional_attention: Literal[False] | None = None
    sliding_window: Count | None = 4096
    query_pre_attn_scalar: float = 256.0
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    def pattern(self, layer: int) -> bool:
        return layer % 2 == 0


class Gemma2(Gemma):
    Config = Gemma2Config

    def __init__(self, c: Gemma2Config, scope: Scope):
        super().__init__(c, scope, soft_cap=c.final_logit_softcapping)

    @classmethod
    def block(cls, scope: Scope, c: Gemma2Config, layer: int) -> Block:
        return Block(
            norm(scope / "input_layernorm", c),
            cls.attention(scope / "self_attn", c, layer),
            norm(scope / "pre_feedforward_layernorm", c),
            GatedMLP(scope / "mlp", c),
            attention_out_norm=norm(scope / "post_attention_layernorm", c),
            mlp_out_norm=norm(scope / "post_feedforward_layernorm", c),
        )

    @staticmethod
    def attention(scope: Scope, c: Gemma2Config, layer: int, **more: Any) -> Attention:
        bias = {"qkv_bias": c.attention_bias, "out_bias": c.attention_bias}
        caps = {"scale": c.query_pre_attn_scalar**-0.5, "soft_cap": c.attn_logit_softcapping}
        return Attention(scope, c, layer, **bias, **caps, **more)


class Gemma3Config(Gemma2Config, frozen=True, kw_only=True):
    max_position_embeddings: Count = 131072
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4
    sliding_window_pattern: Count = 6
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def pattern(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_window_pattern != 0

    @property
    def rope(self) -> Rope:
        return self._rope("full_attention", self.rope_scaling, self.rope_theta)

    def rope_of(self, layer: int) -> Rope:
        local = self.slides(layer)
        return self._rope("sliding_attention", None, self.rope_local_base_freq) if local else self.rope

    def _rope(self, kind: str, options: dict[str, Any] | None, theta: float) -> Rope:
        options = (self.rope_parameters or {}).get(kind) or options
        return Rope.of(options, self.head_dim, self.max_position_embeddings, theta)


class Gemma3(Gemma2):
    Config = Gemma3Config

    @staticmethod
    def attention(scope: Scope, c: Gemma3Config, layer: int, **more: Any) -> Attention:
        each = QKNorm(partial(RMSNorm, eps=c.rms_norm_eps, offset=1.0))
        return Gemma2.attention(scope, c, layer, qk_norm=each)
