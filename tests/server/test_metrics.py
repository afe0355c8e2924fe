"""`/metrics`, and what its counters prove about a real server: nothing is compiled while requests wait."""

import asyncio
import os
import random
import signal

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Server


def scrape(http: httpx.Client, replica: int = 0) -> dict[str, float]:
    """What is said of the server, and of one replica."""
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {
        sample.name.removeprefix("jaxserve:"): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("replica", str(replica)) == str(replica)
    }


def test_counters_follow_a_request(real_server):
    before = scrape(real_server.http)
    body = {"prompt": "abcdefgh", "max_tokens": 5, "ignore_eos": True}
    usage = real_server.http.post("/v1/completions", json=body).json()["usage"]
    after = scrape(real_server.http)
    assert after["prompt_tokens_total"] - before["prompt_tokens_total"] == usage["prompt_tokens"]
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 5
    assert after["ready"] == 1
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


def test_each_replica_speaks_for_itself_and_one_that_is_gone_says_nothing(launch, eventually, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    server = launch({"mesh": "1x2"}, FAKE_GATE=str(gate)).wait_ready()
    assert scrape(server.http, 0)["steps_total"] == scrape(server.http, 1)["steps_total"] == 0
    gate.unlink()
    os.kill(server.engine_pids()[1], signal.SIGKILL)
    eventually(lambda: scrape(server.http, 1)["engine_restarts_total"] == 1)
    assert scrape(server.http, 1) == {"ready": 1, "engine_restarts_total": 1}
    alive = scrape(server.http, 0)
    assert alive["engine_restarts_total"] == 0 and "generation_tokens_total" in alive
    gate.touch()
    eventually(lambda: "generation_tokens_total" in scrape(server.http, 1))


def test_a_key_is_needed_where_the_server_has_keys(launch):
    server = launch({"api_key": ["secret"]}).wait_ready()
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert server.http.get("/metrics").status_code == 200


async def _requests(url: str, count: int) -> None:
    chance = random.Random(0)
    gate = asyncio.Semaphore(24)

    async def one(client):
        body = {
            "prompt": [chance.randrange(5, 90) for _ in range(chance.randint(1, 150))],
            "max_tokens": chance.randint(1, 12),
            "temperature": chance.choice([0, 1]),
            "logprobs": chance.choice([None, 2]),
        }
        async with gate:
            response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(*(one(client) for _ in range(count)))


@pytest.mark.slow
def test_nothing_is_compiled_for_500_requests_from_ready_on_nor_at_all_in_a_second_start(
    model_dir, tmp_path, eventually
):
    command = ["-m", "jaxserve", "serve", str(model_dir), "--port", "0", "--max-num-seqs", "16"]
    found = []
    for _ in range(2):
        server = Server(command, {}, {"JAXSERVE_HOME": str(tmp_path)}).wait_ready()
        try:
            asyncio.run(_requests(server.url, 500))
            eventually(lambda: server.http.get("/ready").json()["engine"] == "warm", 240)  # noqa: B023
            found.append(scrape(server.http))
            assert server.stop() == 0
        finally:
            server.stop(signal.SIGKILL)
    first, second = found
    assert first["compiles_after_ready_total"] == second["compiles_after_ready_total"] == 0
    assert first["compile_cache_misses_total"] >= first["programs"]
    assert second["compile_cache_misses_total"] == 0
    assert second["compile_cache_hits_total"] >= second["programs"]
