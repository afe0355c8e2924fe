"""Engines that hang or are lost: who is told, who is run again, and that it serves again."""

import asyncio
import json
import os
import signal
import threading

import pytest

from jaxserve import SamplingParams
from jaxserve.engine import async_engine
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.lane import Job, Lane
from jaxserve.engine.messages import Abort, CoreOutput, CoreRequest, Hello, Outputs, Status
from jaxserve.engine.replica import Died
from jaxserve.errors import EngineDied, InvalidRequest
from jaxserve.text.output import OutputProcessor

HELLO = Hello(max_model_len=64, max_request_tokens=64, vocab_size=288)
DELTA = SamplingParams(max_tokens=4, ignore_eos=True, output_kind="delta")
FINAL = SamplingParams(max_tokens=4, ignore_eos=True, output_kind="final")
LONG = {"prompt": "long", "max_tokens": 60, "ignore_eos": True}


class Scripted:
    """A replica whose core says what the test says."""

    def __init__(self):
        self.sent = []
        self.killed = []

    def start(self, config, deliver):
        self.say = deliver
        deliver(Status(state="loading"))

    def send(self, message):
        self.sent.append(message)

    def kill(self, reason):
        self.killed.append(reason)
        self.say(Died(reason, for_good=False))

    async def close(self):
        pass

    def ready(self, hello=HELLO):
        self.say(hello)
        self.say(Status(state="ready"))

    def tokens(self, name, *token_ids, finish_reason=None):
        """Give the last request of that name tokens."""
        sent = [message.id for message in self.sent if isinstance(message, CoreRequest)]
        id = [id for id in sent if id.startswith(f"{name}#")][-1]
        self.say(Outputs([CoreOutput(id=id, token_ids=list(token_ids), finish_reason=finish_reason)]))

    def of(self, kind):
        """The names of the requests that messages of this kind are about."""
        return [message.id.partition("#")[0] for message in self.sent if isinstance(message, kind)]


def scripted(model_dir, main, replicas=1, **options):
    """Run main(engine, replicas) on an engine whose replicas are all ready."""

    async def run():
        cores = [Scripted() for _ in range(replicas)]
        engine = AsyncEngine(model=str(model_dir), replicas=cores, **options)
        starting = asyncio.create_task(engine.start())
        while not all(hasattr(core, "say") for core in cores):
            await asyncio.sleep(0.01)
        for core in cores:
            core.ready()
        await starting
        try:
            return await asyncio.wait_for(main(engine, *cores), 30)
        finally:
            await engine.close()

    return asyncio.run(run())


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def begin(engine, name, params=FINAL):
    """A task that collects the request's outputs."""

    async def collect():
        return [output async for output in engine.generate([70, 71], params, request_id=name)]

    task = asyncio.create_task(collect())
    await settle()
    return task


def test_time_without_progress_or_a_sign_of_life_is_counted():
    def job(name):
        return Job(name, None, [1], DELTA, "", "", False, lambda item: None)

    lane = Lane(Scripted(), lambda hello: OutputProcessor(None, (), hello.max_model_len))
    lane.handle(HELLO)
    lane.handle(Status(state="ready", steps=1))
    for _ in range(10):
        lane.watch(10)
        lane.handle(Status(state="ready", steps=1))
    assert lane.stuck(60) is None  # nothing to do
    lane.add(job("a"))
    lane.watch(30)
    lane.handle(Status(state="ready", steps=1))
    lane.add(job("b"))
    assert lane.stuck(31) is None
    assert lane.stuck(30) == "the engine has work but finished no step for 30 s"
    for progress in (Status(state="ready", steps=2), Status(state="warm", steps=2), Outputs([])):
        lane.watch(30)
        lane.handle(progress)
        assert lane.stuck(30) is None
    lane.abort("a"), lane.abort("b")
    lane.watch(30)
    assert lane.stuck(31) is None
    assert lane.stuck(30) == "the engine has given no sign of life for 30 s"
    lane.handle(Died("killed", for_good=False))
    assert lane.stuck(30) is None


def test_a_replica_without_a_sign_of_life_is_killed_and_one_with_is_not(model_dir, monkeypatch):
    monkeypatch.setattr(async_engine, "WATCH_SECONDS", 0.01)

    async def main(engine, silent, alive):
        while not silent.killed:
            alive.say(Status(state="ready"))
            await asyncio.sleep(0)
        await settle()
        assert engine.restarts == [1, 0] and engine.ready and engine.stuck is None
        assert silent.killed == ["the engine has given no sign of life for 0 s"] and not alive.killed

    scripted(model_dir, main, replicas=2, stall_timeout=0.3)


def test_without_a_timeout_nothing_counts_as_hung(model_dir, monkeypatch):
    monkeypatch.setattr(async_engine, "WATCH_SECONDS", 0.0)

    async def main(engine, core):
        for _ in range(100):
            await asyncio.sleep(0)
        engine._lanes[0].watch(10**9)
        assert engine.stuck is None and not core.killed

    scripted(model_dir, main, stall_timeout=0.0)


def test_a_core_in_a_thread_that_hangs_is_given_up(model_dir, fake_core):
    resumed = threading.Event()

    class Hangs(fake_core.FakeCore):
        def step(self):
            resumed.wait()
            return super().step()

    async def main():
        from jaxserve.engine.replica import ThreadReplica

        engine = AsyncEngine(model=str(model_dir), replicas=[ThreadReplica(0, Hangs)], stall_timeout=2.0)
        with pytest.raises(EngineDied, match="has work but finished no step for 2 s"):
            await anext(engine.generate("Hello", FINAL))
        resumed.set()
        assert "finished no step" in await engine.failed()
        await asyncio.sleep(0.2)  # what it says now is not heard
        assert not engine.ready
        await engine.close()

    try:
        asyncio.run(main())
    finally:
        resumed.set()


def test_requests_without_output_are_run_again_and_others_fail(model_dir):
    async def main(engine, core):
        streamed, fresh, final = [
            await begin(engine, name, params)
            for name, params in (("streamed", DELTA), ("fresh", DELTA), ("final", FINAL))
        ]
        core.tokens("streamed", 72)
        core.tokens("final", 72)
        core.say(Died("killed", for_good=False))
        with pytest.raises(EngineDied, match="the engine died: killed"):
            await streamed
        with pytest.raises(EngineDied, match="restarting: killed"):
            await (await begin(engine, "new"))
        with pytest.raises(InvalidRequest, match="running already"):
            await (await begin(engine, "fresh"))
        core.sent.clear()
        core.ready()
        await settle()
        assert core.of(CoreRequest) == ["fresh", "final"]
        core.tokens("final", 73, 74, 75, 76, finish_reason="length")
        core.tokens("fresh", 75, finish_reason="length")
        assert [output.outputs[0].token_ids for output in await final] == [[73, 74, 75, 76]]
        assert [output.outputs[0].token_ids for output in await fresh] == [[75]]

    scripted(model_dir, main, retry_on_restart=True)


def test_a_request_is_run_again_once(model_dir):
    async def main(engine, core):
        request = await begin(engine, "a")
        for _ in range(2):
            core.say(Died("killed", for_good=False))
            core.ready()
            await settle()
        assert core.of(CoreRequest) == ["a", "a"]
        with pytest.raises(EngineDied, match="killed"):
            await request

    scripted(model_dir, main, retry_on_restart=True)


def test_another_replica_that_is_ready_runs_it_at_once(model_dir):
    async def main(engine, *cores):
        requests = [await begin(engine, name) for name in "ab"]
        (lost,), (kept,) = (core.of(CoreRequest) for core in cores)
        cores[0].say(Died("killed", for_good=False))
        await settle()
        assert cores[1].of(CoreRequest) == [kept, lost]
        for id in (kept, lost):
            cores[1].tokens(id, 73, finish_reason="length")
        assert [(await request)[0].outputs[0].token_ids for request in requests] == [[73], [73]]

    scripted(model_dir, main, replicas=2, retry_on_restart=True)


def test_a_waiting_request_can_be_aborted_in_both_ways(model_dir):
    async def main(engine, core):
        aborted, cancelled = await begin(engine, "aborted"), await begin(engine, "cancelled")
        core.say(Died("killed", for_good=False))
        await settle()
        core.sent.clear()
        await engine.abort("aborted")
        cancelled.cancel()
        assert await aborted == []
        core.ready()
        await settle()
        assert core.sent == [] and not engine._waiting
        again = await begin(engine, "aborted")
        assert core.of(CoreRequest) == ["aborted"]
        await engine.abort("aborted")
        assert core.of(Abort) == ["aborted"] and await again == []

    scripted(model_dir, main, retry_on_restart=True)


@pytest.mark.parametrize(
    "end, reason", [("gone", "it is broken"), ("closed", "it is closed"), ("smaller", "context of 4 tokens")]
)
def test_a_waiting_request_that_cannot_run_again_gets_the_reason(model_dir, end, reason):
    async def main(engine, core):
        request = await begin(engine, "a")
        core.say(Died("killed", for_good=False))
        await settle()
        match end:
            case "gone":
                core.say(Died("it is broken", for_good=True))
            case "closed":
                await engine.close("it is closed")
                core.ready()
            case "smaller":
                core.ready(Hello(max_model_len=4, max_request_tokens=4, vocab_size=288))
        with pytest.raises((EngineDied, InvalidRequest), match=reason):
            await request
        if end == "closed":
            with pytest.raises(EngineDied, match=reason):
                await (await begin(engine, "b"))

    scripted(model_dir, main, retry_on_restart=True)


def test_a_request_that_cannot_be_sent_leaves_nothing(model_dir, monkeypatch):
    async def main(engine, core):
        monkeypatch.setattr(core, "send", lambda message: {}["no way to say it"])
        with pytest.raises(KeyError):
            await (await begin(engine, "a"))
        assert not engine._lanes[0].jobs, "it would count as work that gets nowhere"

    scripted(model_dir, main)


@pytest.fixture(scope="module")
def fake_core():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.spec_from_file_location("fake_core", Path(__file__).with_name("fake_core.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def watched(launch, tmp_path_factory):
    """A server that waits no longer than it must, and runs requests again; two steps a second."""
    journal = tmp_path_factory.mktemp("watched") / "journal"
    journal.touch()
    options = {"stall_timeout": 5, "retry_on_restart": True}
    server = launch(options, FAKE_STEP_SECONDS="0.5", FAKE_JOURNAL=str(journal)).wait_ready()
    server.journal = journal
    yield server
    server.stop(signal.SIGKILL)


def post(server, **fields):
    """A request in a thread; its answers when joined."""
    answers = []

    def work():
        answers.append(server.http.post("/v1/completions", json=fields))

    thread = threading.Thread(target=work)
    thread.start()
    return thread, answers


def restarts(server):
    lines = server.http.get("/metrics").text.splitlines()
    (line,) = (line for line in lines if line.startswith("jaxserve:engine_restarts_total"))
    return float(line.split()[-1])


def test_a_stopped_engine_is_replaced_with_work_or_without(watched, eventually):
    fresh, answers = post(watched, prompt="again", max_tokens=5)
    with watched.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        eventually(lambda: watched.journal.read_text().count("add ") == 2)
        os.kill(watched.engine_pids()[0], signal.SIGSTOP)
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    error = json.loads(events[-2])["error"]
    assert error["code"] == "engine_died" and "no sign of life for 5 s" in error["message"]
    unhealthy = watched.http.get("/health")
    assert unhealthy.status_code == 503
    assert "no sign of life for 5 s" in unhealthy.json()["error"]["message"]
    fresh.join()
    assert answers[0].json()["choices"][0]["text"] == "again"
    assert restarts(watched) == 1
    os.kill(watched.engine_pids()[0], signal.SIGSTOP)
    answer = watched.http.post("/v1/completions", json={"prompt": "idle", "max_tokens": 4})
    assert answer.json()["choices"][0]["text"] == "idle"
    assert restarts(watched) == 2 and watched.http.get("/health").status_code == 200


def test_a_step_that_hangs_ends_with_its_process(watched, eventually):
    before = restarts(watched)
    body = LONG | {"prompt": "go<|tool|>", "stream": True}
    with watched.http.stream("POST", "/v1/completions", json=body) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert "has work but finished no step for 5 s" in json.loads(events[-2])["error"]["message"]
    eventually(lambda: watched.http.get("/ready").status_code == 200)
    assert restarts(watched) == before + 1
