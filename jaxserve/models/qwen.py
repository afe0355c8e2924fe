"""Qwen 1.5, 2 and 2.5 (Yang et al., 2024): a Llama with biases in q, k and v; Qwen 3 (2025): with normalised
queries and keys in their place."""

from functools import partial
from typing import Any

from jaxserve.models.config import Count, WindowedConfig
from jaxserve.models.layers.attention import Attention, QKNorm
from jaxserve.models.layers.norm import RMSNorm
from jaxserve.models.layers.param import Scope
from jaxserve.models.llama import Llama


class Qwen2Config(WindowedConfig, frozen=True, kw_only=True):
    max_position_embeddings: Count = 32768
    rms_norm_eps: float = 1e-6
    use_sliding_window: bool = False
    sliding_window: Count | None = 4096
    max_window_layers: int = 28

    def pattern(self, layer: int) -> bool:
        return layer >= self.max_window_layers

    def window(self, layer: int) -> int:
        return super().window(layer) if self.use_sliding_window else 0


class Qwen2(Llama):
    Config = Qwen2Config

    @staticmethod
    def attention(scope: Scope, c: Qwen2Config, layer: int, **more: Any) -> Attention:
        return Llama.attention(scope, c, layer, qkv_bias=True, out_bias=False)


class Qwen3Config(Qwen2Config, frozen=True, kw_only=True):
    head_dim: Count | None = 128


class Qwen3(Llama):
    Config = Qwen3Config

    @staticmethod
    def attention(scope: Scope, c: Qwen3Config, layer: int, **more: Any) -> Attention:
        return Llama.attention(scope, c, layer, qk_norm=QKNorm(partial(RMSNorm, eps=c.rms_norm_eps)))
