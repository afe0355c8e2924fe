"""AsyncEngine with its core in a thread, and what it keeps of each replica."""

import asyncio
import importlib.util
import threading
from pathlib import Path

import pytest

from jaxserve import SamplingParams
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.replica import ThreadReplica
from jaxserve.errors import ConfigError, EngineDied, InvalidRequest

spec = importlib.util.spec_from_file_location("fake_core", Path(__file__).with_name("fake_core.py"))
fake_core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake_core)
DELTA = SamplingParams(max_tokens=400, ignore_eos=True, output_kind="delta")


class Slow(fake_core.FakeCore):
    def __init__(self, config, replica=0):
        super().__init__(config, replica)
        self.pause = 0.01


class Breaks(fake_core.FakeCore):
    def step(self):
        if self.steps == 3:
            raise ValueError("a broken step")
        return super().step()


@pytest.fixture
def make(model_dir):
    def engine(*factories, **options):
        replicas = [ThreadReplica(i, factory) for i, factory in enumerate(factories)]
        return AsyncEngine(model=str(model_dir), replicas=replicas, **options)

    return engine


def text_of(outputs):
    return "".join(output.outputs[0].text for output in outputs)


def test_generate_yields_deltas_cumulative_or_the_end(make):
    async def main():
        async with make(fake_core.FakeCore) as engine:
            kinds = {}
            for kind in ("delta", "cumulative", "final"):
                params = SamplingParams(max_tokens=5, output_kind=kind)
                kinds[kind] = [output async for output in engine.generate("Hello", params)]
            return kinds

    kinds = asyncio.run(main())
    assert text_of(kinds["delta"]) == "Hello" and len(kinds["delta"]) > 1
    assert [output.outputs[0].text for output in kinds["cumulative"]] == ["H", "He", "Hel", "Hell", "Hello"]
    assert [output.outputs[0].text for output in kinds["final"]] == ["Hello"]
    assert all(outputs[-1].finished for outputs in kinds.values())


@pytest.mark.parametrize("prompt", ["ab", [70, 71], {"prompt": "ab"}, {"prompt_token_ids": [70, 71]}])
def test_prompt_forms(make, prompt):
    async def main():
        async with make(fake_core.FakeCore) as engine:
            return [output async for output in engine.generate(prompt, SamplingParams(max_tokens=2))]

    assert len(asyncio.run(main())[-1].outputs[0].token_ids) == 2


@pytest.mark.parametrize(
    "prompt", [3, None, {"text": "a"}, {"prompt": "a", "prompt_token_ids": [1]}, "", [999]]
)
def test_wrong_prompts_are_refused(make, prompt):
    async def main():
        async with make(fake_core.FakeCore) as engine:
            async for _ in engine.generate(prompt):
                pass

    with pytest.raises(InvalidRequest):
        asyncio.run(main())


def test_nothing_is_loaded_before_the_first_generate_and_it_starts_by_itself(make):
    engine = make(fake_core.FakeCore)
    assert not engine.ready

    async def main():
        outputs = [output async for output in engine.generate("Hello", SamplingParams(max_tokens=5))]
        await engine.close()
        return outputs[-1].outputs[0].text

    assert asyncio.run(main()) == "Hello"


async def until_idle(engine):
    while (await engine.stats())["running"]:
        await asyncio.sleep(0.01)


def test_closing_the_iterator_or_cancelling_its_task_frees_the_request(make):
    async def main():
        async with make(Slow) as engine:
            stream = engine.generate("Hello", DELTA)
            await anext(stream)
            assert (await engine.stats())["running"] == 1
            await stream.aclose()
            await until_idle(engine)

            async def consume():
                async for _ in engine.generate("Hello", DELTA):
                    begun.set()

            begun = asyncio.Event()
            task = asyncio.create_task(consume())
            await begun.wait()
            task.cancel()
            await until_idle(engine)

    asyncio.run(main())


def test_abort_ends_the_iterator(make):
    async def main():
        async with make(Slow) as engine:
            stream = engine.generate("Hello", DELTA, request_id="mine")
            await anext(stream)
            with pytest.raises(InvalidRequest, match="running already"):
                await anext(engine.generate("Hello", DELTA, request_id="mine"))
            await engine.abort("mine")
            rest = [output async for output in stream]
            await engine.abort("unknown")
            await until_idle(engine)
            return rest

    assert all(not output.finished for output in asyncio.run(main()))


def test_the_end_of_a_request_leaves_alone_the_next_one_of_its_id(make):
    async def main():
        async with make(Slow) as engine:
            first = engine.generate("Hello", DELTA, request_id="mine")
            await anext(first)
            await engine.abort("mine")
            await until_idle(engine)
            params = SamplingParams(max_tokens=5, output_kind="delta")
            second = engine.generate("Other", params, request_id="mine")
            begun = await anext(second)
            assert [output async for output in first] == []
            return text_of([begun] + [output async for output in second])

    assert asyncio.run(asyncio.wait_for(main(), 30)) == "Other"


def test_requests_go_to_the_replica_with_the_fewest(make):
    async def main():
        async with make(Slow, Slow) as engine:
            while not all(lane.ready for lane in engine._lanes):
                await asyncio.sleep(0.01)
            streams = [engine.generate(f"prompt {i}", DELTA) for i in range(6)]
            for stream in streams:
                await anext(stream)
            loads = [len(lane.jobs) for lane in engine._lanes]
            total = (await engine.stats())["running"]
            for stream in streams:
                await stream.aclose()
            return loads, total

    assert asyncio.run(main()) == ([3, 3], 6)


def test_stats_of_a_replica_wait_neither_for_one_that_loads_nor_for_one_that_is_stuck(make):
    loading, stuck = threading.Event(), threading.Event()

    class Loads(fake_core.FakeCore):
        def __init__(self, config, replica=0):
            loading.wait()
            super().__init__(config, replica)

    class Sticks(fake_core.FakeCore):
        def step(self):
            stuck.wait()
            return super().step()

    async def main():
        engine = make(Sticks, Loads)
        assert await engine.replica_stats() == {}  # and nothing is started
        assert engine._starting is None
        starting = asyncio.create_task(engine.start())
        while not engine.ready:
            await asyncio.sleep(0.01)
        assert list(await engine.replica_stats()) == [0] and not starting.done()
        loading.set()
        await starting
        assert list(await engine.replica_stats()) == [0, 1]
        answer = asyncio.create_task(anext(engine.generate("Hello", DELTA)))
        while not engine._lanes[0].jobs:
            await asyncio.sleep(0.01)
        assert list(await engine.replica_stats()) == [1]
        assert not engine._lanes[0]._asking, "questions without an answer pile up"
        stuck.set()
        await answer
        assert list(await engine.replica_stats()) == [0, 1]
        await engine.close()

    try:
        asyncio.run(main())
    finally:
        loading.set(), stuck.set()


def test_stats_leave_out_a_replica_that_dies_meanwhile(make):
    class Dies(fake_core.FakeCore):
        def stats(self):
            raise ValueError("broken stats")

    async def main():
        async with make(fake_core.FakeCore, Dies) as engine:
            assert list(await engine.replica_stats()) == [0]

        async with make(fake_core.FakeCore, Dies) as engine:
            assert (await engine.stats())["blocks_total"] == 1

    asyncio.run(main())


def test_a_core_that_breaks_fails_its_requests_and_the_engine(make):
    async def main():
        engine = make(Breaks)
        got = []
        with pytest.raises(EngineDied, match="a broken step"):
            async for output in engine.generate("Hello", DELTA):
                got.append(output)
        with pytest.raises(EngineDied, match="a broken step"):
            await anext(engine.generate("Hello", DELTA))
        assert "a broken step" in await engine.failed() and not engine.ready
        await engine.close()
        return text_of(got)

    assert asyncio.run(main()) == "Hel"


def test_close_ends_what_runs(make):
    async def main():
        engine = make(Slow)
        stream = engine.generate("Hello", DELTA)
        await anext(stream)
        closing = asyncio.create_task(engine.close())
        with pytest.raises(EngineDied, match="closed"):
            async for _ in stream:
                pass
        await closing

    asyncio.run(main())


def test_one_engine_serves_one_event_loop_after_another(make):
    engine = make(fake_core.FakeCore)

    async def once():
        return [output async for output in engine.generate("Hello", SamplingParams(max_tokens=5))][-1]

    assert [asyncio.run(once()).outputs[0].text for _ in range(2)] == ["Hello", "Hello"]
    asyncio.run(engine.close())


def test_wrong_options_are_named():
    with pytest.raises(ConfigError, match="block_size"):
        AsyncEngine(model="x", block_size="16")
