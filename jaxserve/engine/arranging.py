"""The memory of a CPU's weights and pools is arranged in the background, while they stay where they are."""

import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxserve.engine import pages

BUSY = 0.05
"""Seconds between pieces of memory that are taken while requests are there: at full speed steps would take
eight times as long."""


class Arranging:
    """Large pages for the weights, then all that the pools may hold, once `wait_until_warm` returns: slowly
    while `busy`, which gives the number of requests that are there, is not 0."""

    def __init__(
        self, weights: Any, pools: Any, wait_until_warm: Callable[[], object], busy: Callable[[], int]
    ):
        self._weights, self._pools = _places(weights), _places(pools)
        self._wait_until_warm = wait_until_warm
        self._busy = busy
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="memory", daemon=True).start()

    def end(self) -> None:
        """The arrays are about to move."""
        self._ended.set()

    def _run(self) -> None:
        self._wait_until_warm()
        for _ in pages.enlarge(self._weights):
            if self._ended.is_set():
                return
        for _ in pages.take(self._pools):
            if self._ended.wait(BUSY if self._busy() else 0.0):
                return


def _places(arrays: Any) -> list[pages.Place]:
    return [(array.unsafe_buffer_pointer(), array.nbytes) for array in jax.tree.leaves(arrays)]
