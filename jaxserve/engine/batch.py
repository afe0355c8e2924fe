"""A schedule as one fixed-shape int32 buffer: the only thing a step sends to the device."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.scheduler import Chunk

if TYPE_CHECKING:
    import jax

Buffer = TypeVar("Buffer", np.ndarray, "jax.Array")

TABLE_AT = 8
"""Where the block table begins in an admitted request's buffer."""
FROM_DEVICE = -1
"""Stands for a token that the last step sampled and the host has not read: the device has it."""


class Bucket(NamedTuple):
    """The shape of a step: room for so many tokens of so many sequences."""

    tokens: int
    seqs: int

    @property
    def name(self) -> str:
        return f"decode[{self.seqs}]" if self.tokens == self.seqs else f"mixed[{self.tokens}]"


class StepLayout(NamedTuple):
    """Where each field of a step lies in the packed buffer."""

    bucket: Bucket
    block_size: int

    @property
    def table_updates(self) -> int:
        """Most new blocks in one step: a sequence starts at most one block more than its tokens fill."""
        return self.bucket.seqs + self.bucket.tokens // self.block_size

    @property
    def sizes(self) -> dict[str, int]:
        tokens, seqs = self.bucket
        updates = self.table_updates
        return {
            "tokens": tokens,
            "slots": seqs,
            "starts": seqs,
            "q_lens": seqs,
            "samples": seqs,
            "update_slot": updates,
            "update_index": updates,
            "update_block": updates,
        }

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    def fields(self, packed: Buffer) -> dict[str, Buffer]:
        """Views of the buffer by name, on the host or in a traced function."""
        views, at = {}, 0
        for name, size in self.sizes.items():
            views[name] = packed[at : at + size]
            at += size
        return views

    def pack(self, chunks: list[Chunk], dummy_slot: int) -> np.ndarray:
        """int32 [size] for chunks in their order, single tokens first; padding points at the dummy slot."""
        packed = np.zeros(self.size, np.int32)
        views = self.fields(packed)
        views["slots"][:] = dummy_slot
        views["update_slot"][:] = dummy_slot
        tokens: list[int] = []
        rows: list[tuple[int | None, int, int, bool]] = []
        updates: list[tuple[int | None, int, int]] = []
        for request, start, length, new_blocks, samples in chunks:
            tokens += request.tokens(start, length) or [FROM_DEVICE]
            rows.append((request.slot, start, length, samples))
            first = len(request.blocks) - len(new_blocks)
            updates += [(request.slot, i, block) for i, block in enumerate(new_blocks, first)]
        views["tokens"][: len(tokens)] = tokens
        _fill(views, ("slots", "starts", "q_lens", "samples"), rows)
        _fill(views, ("update_slot", "update_index", "update_block"), updates)
        return packed


def _fill(views: dict[str, np.ndarray], names: tuple[str, ...], rows: list[Any]) -> None:
    """Write rows, a value for each name, from the views' beginning."""
    for name, column in zip(names, np.array(rows, np.int32).reshape(-1, len(names)).T, strict=True):
        views[name][: len(column)] = column


class AdmitLayout(NamedTuple):
    """The packed buffer that writes one request's sampling parameters and block table into its slot."""

    table_width: int

    @property
    def size(self) -> int:
        return TABLE_AT + self.table_width

    def pack(self, slot: int, spec: CoreRequest, seed: int, blocks: Sequence[int]) -> np.ndarray:
        """int32 [size]: slot, seed (two words), sample index, top_k, three floats' bits, block table."""
        packed = np.zeros(self.size, np.int32)
        packed[0] = slot
        packed[1:3] = np.array([seed & 2**64 - 1], np.uint64).view(np.int32)
        packed[3] = spec.sample_index
        packed[4] = min(max(spec.top_k, 0), 2**31 - 1)
        packed[5:TABLE_AT].view(np.float32)[:] = spec.temperature, spec.top_p, spec.min_p
        packed[TABLE_AT : TABLE_AT + len(blocks)] = blocks
        return packed
