"""SmolLM 3 (Hugging Face, 2025): a Llama in which every fourth layer knows no positions."""

from jaxserve.models.config import Count, WindowedConfig
from jaxserve.models.layers.rope import Rope
from jaxserve.models.llama import Llama


class SmolLM3Config(WindowedConfig, frozen=True, kw_only=True):
    num_key_value_heads: Count | None = 4
    max_position_embeddings: Count = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 2e6
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    no_rope_layers: list[int] | None = None
    """0 for each layer without, 1 for each with positions."""
    no_rope_layer_interval: Count = 4

    def rope_of(self, layer: int) -> Rope | None:
        with_rope = (layer + 1) % self.no_rope_layer_interval
        if self.no_rope_layers is not None:
            with_rope = self.no_rope_layers[layer]
        return self.rope if with_rope else None

    def pattern(self, layer: int) -> bool:
        return self.rope_of(layer) is None

    def window(self, layer: int) -> int:
        return super().window(layer) if self.use_sliding_window else 0


class SmolLM3(Llama):
    Config = SmolLM3Config
