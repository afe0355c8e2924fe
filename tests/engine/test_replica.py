"""The supervisor of an engine process, where the system gives it no process."""

import asyncio

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine import replica
from jaxserve.engine.replica import ProcessReplica


def test_a_process_that_cannot_be_started_is_tried_again_then_given_up(monkeypatch):
    async def refuse(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    monkeypatch.setattr(replica, "BACKOFF_SECONDS", 0)

    async def main():
        told = []
        process = ProcessReplica()
        process.start(EngineConfig(), told.append)
        await asyncio.wait_for(process._supervisor, 30)
        return told

    told = asyncio.run(main())
    assert [died.for_good for died in told] == [False, False, True]
    assert all("Resource temporarily unavailable" in died.reason for died in told)


@pytest.mark.parametrize("ready", [False, True])
def test_close_before_or_after_start_ends(ready):
    async def main():
        process = ProcessReplica(command=("-c", "import time; time.sleep(600)"))
        if ready:
            process.start(EngineConfig(), lambda message: None)
            while process.pid is None:
                await asyncio.sleep(0.01)
        await process.close()
        return process._process

    ended = asyncio.run(asyncio.wait_for(main(), 30))
    assert not ready or ended.returncode is not None
