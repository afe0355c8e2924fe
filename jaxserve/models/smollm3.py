"""SmolLM 3 (Hugging Face, 2025): a Llama in which every fourth layer knows no positions."""

from jaxserve.errors import ModelError
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
    """For each layer 0 if it knows no positions, 1 if it does."""
    no_rope_layer_interval: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = range(1, self.num_hidden_layers + 1)
        self._complete(no_rope_layers=[int(i % self.no_rope_layer_interval != 0) for i in layers])
        if len(self.no_rope_layers) != self.num_hidden_layers:
            found, layers = len(self.no_rope_layers), self.num_hidden_layers
            raise ModelError(f"no_rope_layers has {found} entries, and there are {layers} layers")

    def rope_of(self, layer: int) -> Rope | None:
        return self.rope if self.no_rope_layers[layer] else None

    def pattern(self, layer: int) -> bool:
        return self.rope_of(layer) is None

    def window(self, layer: int) -> int:
        return super().window(layer) if self.use_sliding_window else 0


class SmolLM3(Llama):
    Config = SmolLM3Config
