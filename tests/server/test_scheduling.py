"""Over HTTP: whose requests go first, how many may wait, and how long."""

import asyncio
import json

import httpx
import pytest

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.core import EngineCore
from jaxserve.engine.replica import ThreadReplica
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.app import build_app
from jaxserve.server.endpoint import Caller
from jaxserve.server.errors import ApiError
from jaxserve.server.openai.generation import Generation
from jaxserve.server.state import ServerState

from .fake_core import FakeCore

SMALL = {"dtype": "float32", "max_num_seqs": 2, "max_num_batched_tokens": 64, "num_blocks": 64}


def serve(use, core, **options):
    """The result of `use(client)`, a client of an application around `core` in this process."""

    async def run():
        config = ServerConfig(**options)
        async with AsyncEngine(config, replicas=[ThreadReplica(0, core)]) as engine:
            app = build_app(config, ServerState(config, engine))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await use(client)

    return asyncio.run(run())


def completion(client, headers=None, **fields):
    body = {"prompt": "Hello", "max_tokens": 8, "ignore_eos": True, "temperature": 0} | fields
    return client.post("/v1/completions", json=body, headers=headers or {})


def test_a_request_has_its_keys_tenant_and_its_priority(model_dir):
    seen = []

    class Recorder(FakeCore):
        def add(self, request):
            seen.append((request.tenant, request.priority))
            super().add(request)

    async def use(client):
        for key, priority in (("one", -3), ("two", 0), ("one", 7)):
            answer = await completion(client, {"x-api-key": key}, priority=priority)
            assert answer.status_code == 200, answer.text
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "priority": 2}
        await client.post("/v1/chat/completions", json=chat, headers={"x-api-key": "two"})

    options = {"model": str(model_dir), "api_key": ["one", "two"], "scheduling_policy": "priority"}
    serve(use, Recorder, **options)
    tenants, priorities = zip(*seen, strict=True)
    assert priorities == (-3, 0, 7, 2)
    assert tenants[0] == tenants[2] != tenants[1] == tenants[3] and all(tenants)


def test_priority_without_the_policy_names_the_flag(model_dir):
    async def use(client):
        return [(await completion(client, priority=p)) for p in (0, 1, 2**31, 1.5)]

    fine, refused, large, real = serve(use, FakeCore, model=str(model_dir))
    assert fine.status_code == 200
    for answer in (refused, large, real):
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "priority"
    assert "--scheduling-policy priority" in refused.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_a_503_and_harms_nobody(model_dir, stream):
    async def use(client):
        first = asyncio.gather(*(completion(client, max_tokens=400, stream=stream) for _ in range(20)))
        answers = await first
        again = await completion(client)
        return answers, again

    answers, again = serve(use, EngineCore, model=str(model_dir), max_num_queued_reqs=3, **SMALL)
    refused = [answer for answer in answers if answer.status_code != 200]
    # two run at once and three wait; a slow machine may have ended some before the last came
    assert 5 <= len(answers) - len(refused) < 20 and again.status_code == 200
    for answer in refused:
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"


def test_a_request_of_many_sequences_is_let_in_whole_or_not_at_all(model_dir):
    async def use(client):
        alone = [await completion(client, n=8, temperature=1), await completion(client, prompt=["Hello"] * 8)]
        first = asyncio.create_task(completion(client, max_tokens=400, n=6, temperature=1))
        while b"waiting 4" not in (await client.get("/metrics")).content.replace(b'{replica="0"}', b""):
            await asyncio.sleep(0.01)
        return [*alone, await completion(client, n=2, temperature=1), await first]

    answers = serve(use, EngineCore, model=str(model_dir), max_num_queued_reqs=0, **SMALL)
    assert [answer.status_code for answer in answers] == [200, 200, 503, 200]
    assert [len(answer.json().get("choices", ())) for answer in answers] == [8, 8, 0, 6]


class SlowCore(FakeCore):
    def __init__(self, config, replica=0):
        super().__init__(config, replica)
        self.pause = 0.05


def test_a_request_that_takes_too_long_is_a_504(model_dir, tmp_path, monkeypatch):
    journal = tmp_path / "journal"
    monkeypatch.setenv("FAKE_JOURNAL", str(journal))

    async def use(client):
        whole = await completion(client, max_tokens=300)
        stream = await completion(client, max_tokens=300, stream=True)
        return whole, stream, await completion(client, max_tokens=2)

    whole, stream, short = serve(use, SlowCore, model=str(model_dir), request_timeout=2)
    assert whole.status_code == 504 and short.status_code == 200
    error = whole.json()["error"]
    assert error["code"] == "request_timeout" and " 2 s " in error["message"]
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
    assert len(events) > 2 and events[-1]["error"]["code"] == "request_timeout"
    begun_and_ended = [line.split()[0] for line in journal.read_text().splitlines()]
    assert begun_and_ended.count("add") == begun_and_ended.count("end") == 3


def test_time_runs_out_for_a_client_that_does_not_take_what_is_there(model_dir):

    async def run():
        config = ServerConfig(model=str(model_dir), request_timeout=0.3)
        async with AsyncEngine(config, replicas=[ThreadReplica(0, FakeCore)]) as engine:
            state = ServerState(config, engine)
            params = SamplingParams(max_tokens=400, ignore_eos=True, output_kind="delta")
            caller = Caller("id", "", asyncio.get_running_loop().time())
            generation = Generation(state, [[70, 71]], "", caller, params, {})
            await generation.run(lambda i, output: None, taken=asyncio.Event().wait)

    with pytest.raises(ApiError, match=r"longer than the 0\.3 s"):
        asyncio.run(run())
