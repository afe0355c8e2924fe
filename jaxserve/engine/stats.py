"""Counters and gauges of several replicas as one."""

from collections.abc import Iterable
from typing import Any

SAME = "block_size"
"""No sum: it is the same for all."""


def add_up(replicas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Numbers are added up; a flag is set when it is for every replica."""
    total: dict[str, Any] = {}
    for stats in replicas:
        for name, value in stats.items():
            if name not in total or name == SAME:
                total[name] = value
            elif isinstance(value, bool):
                total[name] = total[name] and value
            else:
                total[name] += value
    return total
