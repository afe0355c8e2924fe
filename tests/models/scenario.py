"""The sequences of the comparison, and the batches in which our side computes them."""

from typing import NamedTuple

import numpy as np

BLOCK = 8
ROWS, SEQS, WIDTH = 48, 4, 8
"""Of the one program that there is: query rows, sequences and blocks of each."""
VOCAB, GREEDY, SHARED = 120, 40, 16


class Part(NamedTuple):
    """Some rows of a sequence, in one step."""

    name: str
    start: int
    stop: int


def prompts() -> dict[str, list[int]]:
    """By what happens to them; `shared` begins as `alone` does, with as many tokens as fill two blocks."""
    draw = np.random.default_rng(1).integers
    lengths = {"alone": 23, "chunks": 41, "shared": 28, "mixed": 8}
    made = {name: draw(0, VOCAB, length).tolist() for name, length in lengths.items()}
    made["shared"][:SHARED] = made["alone"][:SHARED]
    return made


BLOCKS = {"alone": range(1, 9), "chunks": range(9, 15), "shared": [1, 2, 15, 16], "mixed": [17]}
NUM_BLOCKS = 18
STEPS = [
    [Part("chunks", 0, 17)],
    [Part("chunks", 17, 31), Part("shared", SHARED, 28), Part("mixed", 0, 5)],
    [Part("mixed", 5, 6), Part("alone", 62, 63), Part("chunks", 31, 41)],
    [Part("mixed", 6, 7)],
    [Part("mixed", 7, 8)],
]
"""After `alone` is computed: its prompt in one step, then a token at a time. Single rows come first."""
