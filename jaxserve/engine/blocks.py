"""The pool of KV blocks: reference counts and a free list of numbers; the device holds the data."""

from collections import OrderedDict
from collections.abc import Iterable

from jaxserve.engine.prefix_cache import PrefixCache

DUMMY = 0
"""The block that padding writes to; never handed out."""


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens, the dummy included.

    A free block that `cache` knows may be shared again. Others are reused before those, the last freed first;
    of those the first freed.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.cache = PrefixCache()
        self._free = OrderedDict.fromkeys(range(DUMMY + 1, num_blocks))
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
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
            self.cache.forget(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these blocks, which are in use or in the cache."""
        for block in blocks:
            if not self._references[block]:
                assert block in self.cache, f"block {block} is not in use"
                del self._free[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; a block without any is free again."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is not in use"
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self.cache)

    def references(self, block: int) -> int:
        return self._references[block]
