"""A model's shape, from the keys of its `config.json`."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec

from jaxserve.errors import ModelError
from jaxserve.models.layers.activation import ACTIVATIONS
from jaxserve.models.layers.heads import HeadLayout
from jaxserve.models.layers.rope import Rope

SLIDING = "sliding_attention"
Count = Annotated[int, msgspec.Meta(gt=0)]


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What engines and layers read of any model. A family adds its keys, with transformers' names and the
    defaults that its class has there: a config.json may leave those out."""

    gated: ClassVar[bool] = True
    """Whether the MLP has a gate."""
    alibi: ClassVar[bool] = False
    """Whether layers have ALiBi."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """What a family's config calls keys of ours. They count for more than ours, where it has both."""

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    """Left out: as many as there are heads."""
    head_dim: Count | None = None
    """Left out: the part of hidden_size that each head has."""
    max_position_embeddings: Count
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Raises ModelError naming the key that is missing or wrong."""
        known = {ours: config[theirs] for theirs, ours in cls.aliases.items() if theirs in config}
        try:
            return msgspec.convert({**config, **known}, cls)
        except msgspec.ValidationError as error:
            said = str(error)
            for theirs, ours in cls.aliases.items():
                if ours not in config:
                    said = re.sub(rf"\b{ours}`", f"{theirs}`", said)
            raise ModelError(f"the model's config cannot be used: {said}") from None

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        self._complete(num_key_value_heads=heads, head_dim=self.hidden_size // heads)
        self._complete(intermediate_size=4 * self.hidden_size)
        if not self.head_dim:
            raise ModelError(f"{heads} heads cannot share hidden_size {self.hidden_size}")
        if self.hidden_act not in ACTIVATIONS:
            raise ModelError(f"activation {self.hidden_act!r} is not supported: {', '.join(ACTIVATIONS)}")
        if heads % self.num_key_value_heads:
            raise ModelError(f"{self.num_key_value_heads} key-value heads cannot be shared by {heads} heads")

    def _complete(self, **values: Any) -> None:
        """Set those that were left out."""
        for key, value in values.items():
            if getattr(self, key) is None:
                msgspec.structs.force_setattr(self, key, value)

    @property
    def longest(self) -> int:
        """Most tokens that a sequence can have."""
        return self.max_position_embeddings

    def rope_of(self, layer: int) -> Rope | None:
        """What turns a layer's queries and keys."""
        return None

    def window(self, layer: int) -> int:
        """How many of the last tokens a layer sees; 0: all."""
        return 0

    def heads(self, shards: int) -> HeadLayout:
        return HeadLayout.over(shards, self.num_attention_heads, self.num_key_value_heads)


class RotaryConfig(Config, frozen=True, kw_only=True):
    """Of models whose positions are rotations."""

    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    """Has all of `rope_scaling`, and may have `rope_theta` and `partial_rotary_factor` too."""
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.rope

    @property
    def rope(self) -> Rope:
        options, positions = self.rope_parameters or self.rope_scaling, self.max_position_embeddings
        return Rope.of(options, self.head_dim, positions, self.rope_theta, self.partial_rotary_factor)

    def rope_of(self, layer: int) -> Rope | None:
        return self.rope

    @property
    def longest(self) -> int:
        return self.rope.reach


class WindowedConfig(RotaryConfig, frozen=True, kw_only=True):
    """Of those in which some layers see a window of the last tokens."""

    sliding_window: Count | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    """Left out: as the family's `pattern` says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            found, layers = len(self.layer_types), self.num_hidden_layers
            raise ModelError(f"layer_types has {found} entries, and there are {layers} layers")

    def pattern(self, layer: int) -> bool:
        """Whether a layer is one of those with a window."""
        return True

    def slides(self, layer: int) -> bool:
        """Whether a layer is one of those with a window, as the config or the family says."""
        return self.pattern(layer) if self.layer_types is None else self.layer_types[layer] == SLIDING

    def window(self, layer: int) -> int:
        return self.sliding_window or 0 if self.slides(layer) else 0
