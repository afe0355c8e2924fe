"""The supervisor of an engine process: where it gets no process, a bad one, or one that does not end."""

import asyncio

import pytest
import uvloop

from jaxserve.config import EngineConfig
from jaxserve.engine import replica
from jaxserve.engine.messages import StatsRequest
from jaxserve.engine.replica import Died, ProcessReplica


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


READY = """
import socket, sys, time
from jaxserve.engine.messages import Status
from jaxserve.engine.process import encode_frame
sock = socket.socket(fileno=int(sys.argv[1]))
sock.sendall(encode_frame(Status(state="ready")))
"""


def lives(script, count, act=lambda process: None):
    """What a process of this script tells in `count` lives; `act` once it is ready."""

    async def main():
        process, told, enough = ProcessReplica(command=("-c", script)), [], asyncio.Event()

        def deliver(message):
            if isinstance(message, Died):
                told.append(message)
            elif message.state == "ready":
                act(process)
            if len(told) == count:
                enough.set()

        process.start(EngineConfig(), deliver)
        await asyncio.wait_for(enough.wait(), 60)
        await process.close()
        return told

    return asyncio.run(main())


def test_a_process_that_is_killed_while_it_is_stuck_gives_the_reason_and_starts_again(monkeypatch):
    monkeypatch.setattr(replica, "BACKOFF_SECONDS", 0)
    died = lives(READY + "time.sleep(600)", 4, lambda process: process.kill("it hangs"))
    assert died == [Died("it hangs", for_good=False)] * 4


def test_a_process_that_sends_what_is_no_message_is_ended_and_started_again(monkeypatch):
    monkeypatch.setattr(replica, "BACKOFF_SECONDS", 0)
    died = lives(READY + "sock.sendall(b'\\0\\0\\0\\1\\xff'); time.sleep(600)", 4)
    assert not any(each.for_good for each in died)
    assert "DecodeError" in died[0].reason or "ValidationError" in died[0].reason


def test_a_process_that_closes_its_socket_and_stays_is_ended(monkeypatch):
    monkeypatch.setattr(replica, "CLOSE_SECONDS", 0.1)
    (died,) = lives(READY + "sock.close(); time.sleep(600)", 1)
    assert died == Died("the engine process closed its socket without ending", for_good=False)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_what_is_sent_to_a_process_that_is_gone_is_dropped(new_loop):
    async def main():
        process, died = ProcessReplica(command=("-c", READY + "sock.close(); time.sleep(600)")), []

        def deliver(message):
            died.append(message) if isinstance(message, Died) else process._process.kill()
            for _ in range(3):
                process.send(StatsRequest())

        process.start(EngineConfig(), deliver)
        while not died:
            process.send(StatsRequest())
            await asyncio.sleep(0)
        await process.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(asyncio.wait_for(main(), 60))


def test_a_process_that_the_system_cannot_end_is_given_up(monkeypatch):
    monkeypatch.setattr(replica, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(replica, "_kill", lambda process: None)
    (died,) = lives(READY + "time.sleep(2)", 1, lambda process: process.kill("it hangs"))
    assert died.for_good and died.reason.startswith("it hangs; its process ")
