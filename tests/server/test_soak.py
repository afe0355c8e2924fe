"""bench/soak, small, against the real server."""

import asyncio
from argparse import Namespace

import pytest

pytest.importorskip("aiohttp")

from bench.robustness.server import Target
from bench.soak.__main__ import soak


def test_mixed_traffic_leaves_nothing_wrong_or_behind(real_server):
    target = Target(real_server.url, real_server.process.pid)
    args = Namespace(seed=1, scale=0.1, load=0.5, capacity_seconds=2.0, minutes=0.1)
    figures, wrong = asyncio.run(asyncio.wait_for(soak(target, args), 300))
    assert not wrong, "\n".join(wrong[:10])
    assert {"complete", "left", "refused, as it should be"} == set(figures["requests"])
    assert figures["samples"][-1]["generated"] > figures["samples"][0]["generated"] > 0
