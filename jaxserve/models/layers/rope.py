"""Rotary positions (Su et al., 2021) and the scalings that stretch them past the trained context."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from jaxserve.errors import ModelError
from jaxserve.pallas_kernels.paged_attention import Rotation


class Rope(msgspec.Struct, frozen=True):
    """Rotary positions of heads of `head_dim` features, of which the first `dim` turn."""

    head_dim: int
    dim: int
    theta: float
    max_position: int
    """Positions the model was configured for."""
    kind: str = "default"
    options: Mapping[str, Any] = {}

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any] | None,
        head_dim: int,
        max_position: int,
        theta: float = 10000.0,
        partial: float = 1.0,
    ) -> "Rope":
        """As a config describes them in `rope_parameters` (or `rope_scaling`), which may have `theta` and the
        part of a head that turns, too. Raises ModelError."""
        options = dict(options or {})
        kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
        theta = options.pop("rope_theta", None) or theta
        partial = options.pop("partial_rotary_factor", None) or partial
        dim = int(head_dim * partial)
        if kind not in _SCALINGS and kind not in ("default", "dynamic"):
            known = ", ".join(sorted([*_SCALINGS, "default", "dynamic"]))
            raise ModelError(f"rope type {kind!r} is not supported; supported: {known}")
        for key in _NEEDED.get(kind, ()):
            if not isinstance(options.get(key), int | float):
                raise ModelError(f"rope type {kind!r} needs {key}, a number; it is {options.get(key)!r}")
        if dim % 2 or head_dim % 2 or not 0 < dim <= head_dim:
            raise ModelError(f"{dim} of {head_dim} features of a head cannot be turned in pairs")
        return cls(head_dim, dim, float(theta), max_position, kind, options)

    def __hash__(self) -> int:
        return hash((self.head_dim, self.dim, self.theta, self.max_position, self.kind))

    @property
    def order(self) -> np.ndarray | None:
        """[head_dim] which of the model's features is at each place: kernels turn pairs
        (i, i + head_dim // 2), by an angle of 0 where nothing turns. None: each is where it was."""
        if self.dim == self.head_dim:
            return None
        halves = np.split(np.arange(self.dim), 2), np.split(np.arange(self.dim, self.head_dim), 2)
        return np.concatenate([part[i] for i in range(2) for part in halves])

    @property
    def reach(self) -> int:
        """Positions it is good for: a scaling may stretch past those the model was configured for."""
        if self.kind not in ("linear", "dynamic", "yarn"):
            return self.max_position
        trained = self.options.get("original_max_position_embeddings") or self.max_position
        return max(self.max_position, int(trained * (self.options.get("factor") or 1.0)))

    def __call__(self, positions: jax.Array) -> Rotation:
        """The rotation at positions int32 [N]."""
        p = jnp.maximum(positions, 0).astype(jnp.float32)[:, None]
        if self.kind == "dynamic":
            frequencies, factor = _dynamic(self, p), 1.0
        else:
            scaled, factor = _SCALINGS[self.kind](self) if self.kind in _SCALINGS else (_plain(self), 1.0)
            frequencies = jnp.asarray(scaled, jnp.float32)
        angles = p * frequencies
        cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
        if still := (self.head_dim - self.dim) // 2:
            cos, sin = (jnp.pad(x, ((0, 0), (0, still)), constant_values=y) for x, y in ((cos, 1), (sin, 0)))
        return Rotation(cos, sin)


def _plain(rope: Rope) -> np.ndarray:
    """[dim // 2] radians per position. float32 powers: what the models were trained with."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return (1.0 / np.power(np.float32(rope.theta), exponents)).astype(np.float32)


def _linear(rope: Rope) -> tuple[np.ndarray, float]:
    return _plain(rope) / np.float32(rope.options["factor"]), 1.0


def _dynamic(rope: Rope, p: jax.Array) -> jax.Array:
    """NTK-aware scaling that grows with the position, so that it does not depend on how a prompt is
    cut into chunks; up to the trained context, and for every generated token, it is transformers'."""
    factor, trained = float(rope.options["factor"]), float(rope.max_position)
    length = jnp.maximum(p + 1.0, trained)
    base = rope.theta * (factor * length / trained - (factor - 1.0)) ** (rope.dim / (rope.dim - 2))
    return base ** -(jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim)


def _llama3(rope: Rope) -> tuple[np.ndarray, float]:
    """Long wavelengths divided by a factor, short ones kept, those between blended (Llama 3.1)."""
    plain, o = _plain(rope), rope.options
    low, high = float(o["low_freq_factor"]), float(o["high_freq_factor"])
    turns = float(o["original_max_position_embeddings"]) * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (keep * plain + (1 - keep) * plain / float(o["factor"])).astype(np.float32), 1.0


def _yarn(rope: Rope) -> tuple[np.ndarray, float]:
    """Interpolates slow dimensions, keeps fast ones, and sharpens attention (Peng et al., 2023)."""
    plain, o = _plain(rope), rope.options
    trained = float(o.get("original_max_position_embeddings") or rope.max_position)
    factor = float(o.get("factor") or rope.max_position / trained)

    def dimension(turns: float) -> float:
        return rope.dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(float(o.get("beta_fast") or 32))
    high = dimension(float(o.get("beta_slow") or 1))
    if o.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - low) / max(high - low, 0.001)
    keep = 1 - np.clip(ramp, 0.0, 1.0)
    scaled = keep * plain + (1 - keep) * plain / factor
    return scaled.astype(np.float32), _yarn_attention(o, factor)


def _yarn_attention(options: Mapping[str, Any], factor: float) -> float:
    if options.get("attention_factor") is not None:
        return float(options["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if options.get("mscale") and options.get("mscale_all_dim"):
        return mscale(float(options["mscale"])) / mscale(float(options["mscale_all_dim"]))
    return mscale(1.0)


def _factors(rope: Rope) -> tuple[np.ndarray, float]:
    """Each frequency divided by a factor of its own, as a GGUF stores llama3's scaling."""
    return _plain(rope) / np.asarray(rope.options["factors"], np.float32), 1.0


_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "factors": _factors}
