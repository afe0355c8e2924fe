"""StarCoder (Li et al., 2023): GPT-2 with one KV head, and matrices stored as [out, in]."""

from typing import ClassVar

import msgspec

from jaxserve.models.gpt2 import GPT2, GPT2Config
from jaxserve.models.layers.heads import Split, groups


class StarCoderConfig(GPT2Config, frozen=True, kw_only=True):
    hidden_act: str = "gelu_pytorch_tanh"
    multi_query: bool = True

    def __post_init__(self) -> None:
        if self.multi_query:
            msgspec.structs.force_setattr(self, "num_key_value_heads", 1)
        super().__post_init__()


class StarCoder(GPT2):
    Config = StarCoderConfig
    transposed: ClassVar = False
    split: ClassVar[Split] = staticmethod(groups)
