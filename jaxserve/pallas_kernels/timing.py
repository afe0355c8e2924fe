"""Timing what runs on a device."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import jax

State = TypeVar("State")


def seconds_per_call(
    call: Callable[[State, int], State], state: State, calls: int = 4, repeats: int = 5
) -> float:
    """Median seconds of `state = call(state, i)`, which may donate it: `calls` dispatched at a time, numbered
    from 0, `repeats` times after a first one that does not count.
    """
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for i in range(calls):
            state = call(state, i)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:]) / calls
