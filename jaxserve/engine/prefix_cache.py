"""Which block holds which tokens: full blocks, found again by the tokens in them and all before them."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

Node = int | str
"""A block in its context: the number of an entry, or the salt that a chain begins with."""


class _Entry(NamedTuple):
    node: int
    block: int


class PrefixCache:
    """Chains of full blocks. A key holds the tokens themselves, so an equal hash never passes for equal text.

    Requests with different salts share nothing. When a block is taken for something else its entry is
    forgotten; what came after it cannot be reached any more and goes as its own blocks are taken.
    """

    def __init__(self) -> None:
        self.queries = 0
        """Tokens that were looked for."""
        self.hits = 0
        """Tokens that were found."""
        self._entries: dict[tuple[Node, tuple[int, ...]], _Entry] = {}
        self._key_of: dict[int, tuple[Node, tuple[int, ...]]] = {}
        self._numbers = itertools.count()

    def __contains__(self, block: int) -> bool:
        return block in self._key_of

    def match(self, salt: str, tokens: Sequence[int], size: int) -> tuple[list[int], Node]:
        """The longest chain of blocks of `size` tokens that `tokens` begin with, and its last node."""
        blocks: list[int] = []
        node: Node = salt
        for start in range(0, len(tokens) - size + 1, size):
            entry = self._entries.get((node, tuple(tokens[start : start + size])))
            if entry is None:
                break
            node = entry.node
            blocks.append(entry.block)
        return blocks, node

    def commit(self, parent: Node, tokens: Sequence[int], block: int) -> Node:
        """Remember that `block` holds `tokens` after those of `parent`; the node of its successors' keys.

        Another block that holds the same already stays the one that is found.
        """
        key = (parent, tuple(tokens))
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(next(self._numbers), block)
            self._key_of[block] = key
        return entry.node

    def forget(self, block: int) -> None:
        """The block will hold something else."""
        if key := self._key_of.pop(block, None):
            del self._entries[key]

    def clear(self) -> None:
        self._entries.clear()
        self._key_of.clear()
