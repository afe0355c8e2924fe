"""Mistral (Jiang et al., 2023): a Llama whose layers see a window of the last tokens."""

from jaxserve.models.config import Count, WindowedConfig
from jaxserve.models.llama import Llama


class MistralConfig(WindowedConfig, frozen=True, kw_only=True):
    rms_norm_eps: float = 1e-6
    num_key_value_heads: Count | None = 8
    sliding_window: Count | None = 4096


class Mistral(Llama):
    Config = MistralConfig
