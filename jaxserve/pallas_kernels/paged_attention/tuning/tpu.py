"""Sizes of the TPU kernel's work and of its blocks; `docs/kernels.md` says where they come from."""

from typing import NamedTuple

BLOCK_SIZE = 128
TABLE_BYTES = 3 * 2**18
"""Most that block tables take of a chip's scalar memory, which is 1 MiB."""
CONTEXT = 512
"""Most context tokens in one turn of the loop."""
BUFFER = 2**21
"""Most bytes of keys and values in one turn; two turns' are held."""
PAGES = 16
"""Most blocks in one turn: each is a copy of its own, whose address takes a scalar register."""
ROWS = {"decode": 32, "mixed": 256}
"""Rows of a product: query rows times the query heads of a KV head."""
QUERIES = 32
"""Most query rows in one program."""


class Sizes(NamedTuple):
    """Of one program of the kernel."""

    pages: int
    """Blocks of context in a turn of the loop."""
    queries: int
    """Query rows, of as many sequences as they belong to."""


def sizes(rows: int, seqs: int, group: int, token_bytes: int, block_size: int, table_width: int) -> Sizes:
    """For a step of so many rows: `group` query heads share a KV head, and a turn of the loop holds
    `token_bytes` of each token of the context. A program attends all its rows to the contexts of each of
    their sequences, so it has few where every row is a sequence."""
    tokens = min(CONTEXT, BUFFER // token_bytes)
    pages = max(1, min(tokens // block_size, PAGES, table_width))
    queries = max(1, ROWS["decode" if rows == seqs else "mixed"] // group)
    return Sizes(pages, min(_power_of_two(queries), QUERIES, rows))


def default_block_size(seqs: int, length: int) -> int:
    """The smallest block size, from BLOCK_SIZE on, with which the tables of so many sequences fit."""
    size = BLOCK_SIZE
    while size < length and table_bytes(seqs, -(-length // size)) > TABLE_BYTES:
        size *= 2
    return size


def table_bytes(seqs: int, table_width: int) -> int:
    """Of scalar memory."""
    return 4 * seqs * -(-table_width // 128) * 128


def _power_of_two(x: int) -> int:
    """The largest that is not above x."""
    return 1 << x.bit_length() - 1
