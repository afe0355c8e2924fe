"""From a checkpoint's tensors to a model's parameters, placed on their devices one at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxserve.errors import ModelError


class Tensors(Protocol):
    """The part of a checkpoint that placement needs."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def tensor(self, name: str) -> np.ndarray: ...
    def source(self, name: str) -> str: ...


class Source(NamedTuple):
    """The checkpoint tensors that make one parameter, each with the shape it must have."""

    shapes: Mapping[str, tuple[int, ...]]
    build: Callable[..., np.ndarray]
    """Called with the tensors in that order."""

    @classmethod
    def one(cls, name: str, shape: tuple[int, ...]) -> "Source":
        return cls({name: shape}, lambda x: x)


IGNORED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Endings of tensors that checkpoints carry and models derive or tie."""


def check(checkpoint: Tensors, table: Mapping[str, Source]) -> None:
    """Raise ModelError for the first missing, misshapen or unexpected tensor, from headers alone."""
    found = checkpoint.shapes()
    wanted = {name: shape for source in table.values() for name, shape in source.shapes.items()}
    for name, shape in wanted.items():
        if name not in found:
            raise ModelError(f"tensor {name} {list(shape)} is missing from the checkpoint")
        if tuple(found[name]) != shape:
            raise ModelError(
                f"tensor {name} in {checkpoint.source(name)} has shape {list(found[name])}, "
                f"the config asks for {list(shape)}"
            )
    for name in found:
        if name not in wanted and not name.endswith(IGNORED):
            raise ModelError(f"tensor {name} in {checkpoint.source(name)} has no place in this architecture")


def parameters(
    checkpoint: Tensors, table: Mapping[str, Source], place: Callable[[str, np.ndarray], Any]
) -> Iterator[tuple[str, Any]]:
    """(path, placed parameter) for each row of the table: one parameter on the host at any time."""
    check(checkpoint, table)
    for path, source in table.items():
        yield path, place(path, source.build(*(checkpoint.tensor(name) for name in source.shapes)))
