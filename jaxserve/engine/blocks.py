"""The pool of KV blocks: reference counts and a free list of numbers; the device holds the data."""

from collections import deque
from collections.abc import Iterable

DUMMY = 0
"""The block that padding writes to; never handed out."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, the dummy included; the first freed is reused first."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(DUMMY + 1, num_blocks))
        self._references = [0] * num_blocks

    @property
    def capacity(self) -> int:
        """Blocks that can be in use at once."""
        return self.num_blocks - 1

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.capacity - self.free

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing taken) when too few are free."""
        if count > len(self._free):
            return None
        blocks = [self._free.popleft() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these blocks in use."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is not in use"
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; a block without any is free again."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is not in use"
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def references(self, block: int) -> int:
        return self._references[block]
