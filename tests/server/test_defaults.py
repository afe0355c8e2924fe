"""Over HTTP a request that leaves its sampling open is sampled as the model's makers recommend."""

import asyncio
import json

import httpx
import pytest

from jaxserve import SamplingParams
from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.replica import ThreadReplica
from jaxserve.server.app import build_app
from jaxserve.server.state import ServerState

from .fake_core import FakeCore

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
COMPLETION = {"prompt": "Hello", "max_tokens": 1}
RECOMMENDED = {"temperature": 0.25, "top_k": 20}


@pytest.fixture
def sampled(model_dir, tmp_path):
    """sampled(use): what `use(engine, client)` asked the core for, as (temperature, top_p, top_k, min_p)."""
    (tmp_path / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    seen = []

    class Recorder(FakeCore):
        def add(self, request):
            seen.append((request.temperature, request.top_p, request.top_k, request.min_p))
            super().add(request)

    async def run(use):
        config = ServerConfig(model=str(model_dir), generation_config=str(tmp_path))
        async with AsyncEngine(config, replicas=[ThreadReplica(0, Recorder)]) as engine:
            app = build_app(config, ServerState(config, engine))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                await use(engine, client)
        return seen

    return lambda use: asyncio.run(run(use))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.25, 1.0, 20, 0.0)),
        ({"temperature": None, "top_k": None, "min_p": 0.5}, (0.25, 1.0, 20, 0.5)),
        ({"temperature": 1}, (1.0, 1.0, 20, 0.0)),
        ({"temperature": 0, "top_k": 0, "top_p": 0.5}, (0.0, 0.5, 0, 0.0)),
    ],
)
def test_what_is_left_out_and_what_is_given(sampled, fields, expected):
    async def use(engine, client):
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
            response = await client.post(path, json=body | fields)
            assert response.status_code == 200, response.text

    assert sampled(use) == [expected] * 2


def test_async_engine_without_parameters_and_with(sampled):
    async def use(engine, client):
        for params in (None, engine.default_params(top_p=0.5), SamplingParams()):
            async for _ in engine.generate("Hello", params):
                pass

    assert sampled(use) == [(0.25, 1.0, 20, 0.0), (0.25, 0.5, 20, 0.0), (1.0, 1.0, 0, 0.0)]


def test_a_server_says_which_are_in_force_and_why_it_cannot_start(launch, tmp_path):
    server = launch({"generation_config": str(tmp_path)})
    assert server.process.wait(60) == 1
    server.stop()
    assert "jaxserve: generation_config must be auto, none," in server.err and "Traceback" not in server.err
    (tmp_path / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    server = launch({"generation_config": str(tmp_path)}).wait_ready()
    server.stop()
    assert "sampling defaults: temperature 0.25, top_k 20 (" in server.err
