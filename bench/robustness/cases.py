"""Bad requests: each made from a seed and a number alone, so that any of them can be sent again."""

import random
from collections.abc import Callable

from bench.robustness import bodies, wire
from bench.robustness.request import Case

MAKERS: dict[Callable[[random.Random], Case], float] = {
    bodies.one_field: 20,
    bodies.several_fields: 8,
    bodies.unknown_field: 4,
    bodies.message: 10,
    bodies.tools: 5,
    bodies.broken_json: 10,
    bodies.other_body: 4,
    bodies.same_key_twice: 2,
    bodies.huge: 1,
    wire.method_or_path: 8,
    wire.header: 8,
    wire.content_length: 4,
    wire.chunked: 4,
    wire.truncated: 4,
    wire.gone: 4,
    wire.garbage: 3,
    wire.slow_writer: 3,
    wire.slow_reader: 1,
    wire.pipelined: 2,
    wire.good: 2,
}
"""Kind of case -> how often, among the others."""


def make_case(seed: int, number: int) -> Case:
    """The case with this number: the same for the same seed, whatever was made before."""
    rng = random.Random(f"{seed}/{number}")
    (make,) = rng.choices(list(MAKERS), list(MAKERS.values()))
    return make(rng)
