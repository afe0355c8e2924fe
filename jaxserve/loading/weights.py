"""From a checkpoint's tensors to a model's parameters, placed on their devices few at a time."""

from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from jaxserve.errors import ModelError


class Tensors(Protocol):
    """The part of a checkpoint that placement needs."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def tensor(self, name: str, dtype: DTypeLike) -> np.ndarray: ...
    def source(self, name: str) -> str: ...


class Source(NamedTuple):
    """The checkpoint tensors that make one parameter, each with the shape it must have."""

    shapes: Mapping[str, tuple[int, ...]]
    build: Callable[..., np.ndarray]
    """Called with the tensors in that order."""

    @classmethod
    def one(cls, name: str, shape: tuple[int, ...]) -> "Source":
        return cls({name: shape}, lambda x: x)


THREADS = 2
"""One waits for the disk or the interpreter while the other computes."""
IGNORED = (
    "rotary_emb.inv_freq",
    "lm_head.weight",
    "embed_out.weight",
    # masks of GPT-2 and GPT-NeoX
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Endings of tensors that checkpoints carry and models derive or tie."""


def named(table: Mapping[str, Source], found: Container[str]) -> dict[str, Source]:
    """The table by the names of a checkpoint that was saved without the first part of them (`transformer.`),
    as those of models without a head are."""

    def name(full: str) -> str:
        rest = full.partition(".")[2]
        return rest if full not in found and rest in found else full

    return {
        path: source._replace(shapes={name(full): shape for full, shape in source.shapes.items()})
        for path, source in table.items()
    }


def check(checkpoint: Tensors, table: Mapping[str, Source]) -> None:
    """Raise ModelError for the first missing, misshapen or unexpected tensor, from headers alone."""
    found = checkpoint.shapes()
    table = named(table, found)
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
    checkpoint: Tensors,
    table: Mapping[str, Source],
    place: Callable[[str, np.ndarray], Any],
    dtype: DTypeLike = np.float32,
) -> Iterator[tuple[str, Any]]:
    """(path, placed parameter) for each row of the table, `THREADS` at a time; quantised tensors are
    read as `dtype`."""
    check(checkpoint, table)
    table = named(table, checkpoint.shapes())

    def make(path: str) -> Any:
        source = table[path]
        return place(path, source.build(*(checkpoint.tensor(name, dtype) for name in source.shapes)))

    with ThreadPoolExecutor(THREADS, "weights") as threads:
        yield from zip(table, threads.map(make, table), strict=True)
