"""Feed-forward blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.config import Config
from jaxserve.models.layers.activation import ACTIVATIONS
from jaxserve.models.layers.linear import GatedLinear, Linear
from jaxserve.models.layers.param import Features, Scope, padded, plain


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020).

    gate and up are one weight [shards, 2, width // shards, embed], so that a shard is a slice of it; a
    checkpoint may have them as one tensor too, `gate_up`, the gate first.
    """

    def __init__(
        self,
        scope: Scope,
        c: Config,
        *,
        bias: bool = False,
        gate_up: str | tuple[str, str] = ("gate_proj", "up_proj"),
        down: str = "down_proj",
    ):
        self.activation = c.hidden_act
        embed, width, shards = plain(c.hidden_size, "embed"), c.intermediate_size, scope.shards
        both = gated(width, shards, joined=isinstance(gate_up, str))
        self.gate_up = GatedLinear(scope / gate_up, embed, both, bias=bias)
        self.down = Linear(scope / down, wide(width, shards), embed, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.gate_up.gated(x, self.activation))


class MLP(nnx.Module):
    """down(act(up(x)))."""

    def __init__(self, scope: Scope, c: Config, up: str, down: str, *, bias: bool = True):
        self.activation = c.hidden_act
        embed, inner = plain(c.hidden_size, "embed"), wide(c.intermediate_size, scope.shards)
        self.up = Linear(scope / up, embed, inner, bias=bias)
        self.down = Linear(scope / down, inner, embed, bias=bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x).astype(jnp.float32)))


def wide(width: int, shards: int) -> Features:
    """The inner features of an MLP: [shards, width // shards]."""
    shape = shards, padded(width, shards) // shards
    return Features((width,), shape, ("mlp", None), lambda x: split(shards, x))


def gated(width: int, shards: int, joined: bool) -> Features:
    """Those of gate and up, [shards, 2, width // shards], `joined` in one tensor or each in its own."""
    shape = shards, 2, padded(width, shards) // shards

    def fuse(*tensors: np.ndarray) -> np.ndarray:
        gate, up = np.split(tensors[0], 2) if joined else tensors
        return np.stack([split(shards, gate), split(shards, up)], axis=1)

    return Features((2 * width,) if joined else (width, width), shape, ("mlp", None, None), fuse)


def split(shards: int, x: np.ndarray) -> np.ndarray:
    """[shards, width // shards, ...] from [width, ...], padded with zeros to fit."""
    short = -len(x) % shards
    x = np.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)) if short else x
    return x.reshape(shards, -1, *x.shape[1:])
