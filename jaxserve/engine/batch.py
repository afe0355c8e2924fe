"""A schedule as one fixed-shape int32 buffer: the only thing a step sends to the device."""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
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
    def mixed(self) -> bool:
        """Whether a sequence can have several tokens: there is room for more than there are sequences."""
        return self.tokens > self.seqs

    @property
    def name(self) -> str:
        return f"mixed[{self.tokens}]" if self.mixed else f"decode[{self.seqs}]"


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
        return {name: packed[place] for name, place in _places(self).items()}

    def pack(self, chunks: list[Chunk], dummy_slot: int) -> np.ndarray:
        """int32 [size] for chunks in their order, single tokens first; padding points at the dummy slot."""
        packed = _empty(self, dummy_slot).copy()
        if not chunks:
            return packed
        tokens: list[int] = []
        slots: list[int | None] = []
        updates: list[tuple[int | None, int, int]] = []
        for request, start, length, new_blocks, _ in chunks:
            tokens += request.tokens(start, length) or (FROM_DEVICE,)
            slots.append(request.slot)
            if new_blocks:
                first = len(request.blocks) - len(new_blocks)
                updates += [(request.slot, i, block) for i, block in enumerate(new_blocks, first)]
        _, starts, lengths, _, samples = zip(*chunks, strict=True)
        columns: list[Sequence[Any]] = [tokens, slots, starts, lengths, samples, *zip(*updates, strict=True)]
        for place, values in zip(_places(self).values(), columns, strict=False):  # perhaps without updates
            packed[place][: len(values)] = values
        return packed

    def followers(self, chunks: list[Chunk]) -> np.ndarray:
        """int32 [tokens]: after each row the prompt's token whose logprob it is to give, -1 at others."""
        tokens = np.full(self.bucket.tokens, -1, np.int32)
        row = 0
        for request, start, length, _, _ in chunks:
            if asked := request.unscored(start, length):
                first = row + asked.start - start
                tokens[first : first + len(asked)] = request.spec.prompt[asked.start + 1 : asked.stop + 1]
            row += length
        return tokens


@cache
def _places(layout: StepLayout) -> dict[str, slice]:
    sizes = layout.sizes
    ends = accumulate(sizes.values())
    return {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}


@cache
def _empty(layout: StepLayout, dummy_slot: int) -> np.ndarray:
    """int32 [size]: a step of padding."""
    packed = np.zeros(layout.size, np.int32)
    for name in ("slots", "update_slot"):
        packed[_places(layout)[name]] = dummy_slot
    return packed


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
