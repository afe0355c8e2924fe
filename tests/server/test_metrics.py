"""`/metrics` and `/load`, and what the counters prove about a server: they say what its clients saw."""

import asyncio
import os
import random
import signal
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.errors import EngineDied, InvalidRequest
from jaxserve.outputs import CompletionOutput, RequestOutput, SequenceMetrics
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.errors import ApiError
from jaxserve.server.metrics.definitions import REPLICA, SERVER, table
from jaxserve.server.metrics.outcomes import FAILURES, Outcomes

from .conftest import Server

ROOT = Path(__file__).parents[2]
LATENCIES = [
    *("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds"),
    *("request_time_per_output_token_seconds", "request_prompt_tokens", "request_generation_tokens"),
]
"""Histograms that see each sequence once."""


def families(http):
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return list(text_string_to_metric_families(response.text))


def scrape(http, replica: int = 0) -> dict[str, float]:
    """What is said of the server, and of one replica: {"name": value, "name[label,label]": value}."""
    found = {}
    for sample in (sample for family in families(http) for sample in family.samples):
        labels = dict(sample.labels)
        if labels.pop("replica", str(replica)) == str(replica):
            name = sample.name.removeprefix("jaxserve:")
            found[f"{name}[{','.join(labels.values())}]" if labels else name] = sample.value
    return found


def of(found, name):
    """The values of one name by their labels."""
    return {key.removeprefix(name): value for key, value in found.items() if key.startswith(f"{name}[")}


@pytest.fixture(scope="module")
def slow(launch):
    """A request for 500 tokens would take it 25 s, and it gives none more than half a second."""
    return launch({"request_timeout": 0.5}, FAKE_STEP_SECONDS="0.05").wait_ready()


class Since:
    """What a server counts from now on."""

    def __init__(self, http):
        self._http = http
        self._before = scrape(http)

    def now(self):
        found = scrape(self._http)
        return {name: value - self._before.get(name, 0) for name, value in found.items()}


def test_counters_follow_a_request(real_server):
    since = Since(real_server.http)
    body = {"prompt": "abcdefgh", "max_tokens": 5, "ignore_eos": True}
    usage = real_server.http.post("/v1/completions", json=body).json()["usage"]
    counted = since.now()
    assert counted["prompt_tokens_total"] == counted["request_prompt_tokens_sum"] == usage["prompt_tokens"]
    assert counted["generation_tokens_total"] == counted["request_generation_tokens_sum"] == 5
    assert counted["request_params_max_tokens_sum"] == 5 and counted["request_params_n_sum"] == 1
    assert (
        counted["request_success_total[length]"] == counted["http_responses_total[/v1/completions,200]"] == 1
    )
    after = scrape(real_server.http)
    assert after["ready"] == 1
    assert after["num_requests_running"] == after["num_requests_waiting"] == after["kv_cache_usage_perc"] == 0


def test_the_counters_are_what_the_clients_of_500_requests_saw(real_server):
    since = Since(real_server.http)
    scrapes, usages = asyncio.run(_play(real_server, 500))
    counted = since.now()
    asked, answered = (
        sum(usage[name] for usage in usages) for name in ("prompt_tokens", "completion_tokens")
    )
    assert counted["request_success_total[stop]"] + counted["request_success_total[length]"] == 500
    assert min(counted["request_success_total[stop]"], counted["request_success_total[length]"]) > 0
    assert counted["http_responses_total[/v1/completions,200]"] == 500
    assert counted["prompt_tokens_total"] == counted["request_prompt_tokens_sum"] == asked
    assert counted["generation_tokens_total"] == counted["request_generation_tokens_sum"] == answered
    for name in LATENCIES:
        assert counted[f"{name}_count"] == counted[f"{name}_bucket[+Inf]"] == 500
    assert counted["inter_token_latency_seconds_count"] == answered - 500
    steps = counted["steps_total"]
    assert steps == counted["step_time_seconds_count"] == counted["iteration_tokens_total_count"] > 0
    assert steps == sum(of(counted, "program_steps_total").values())
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert counted["prefix_cache_hits_total"] == cached
    assert counted["iteration_tokens_total_sum"] >= asked - cached + answered - 500
    # three at a time for each place: some had to wait
    assert counted["request_queue_time_seconds_sum"] > 0
    assert sum(of(counted, "request_failures_total").values()) == 0
    gauges = {family.name for family in (*REPLICA, *SERVER) if family.kind == "gauge"}
    assert len(scrapes) > 3
    for earlier, later in pairwise(scrapes):
        assert all(later[name] >= value for name, value in earlier.items() if name not in gauges)


async def _play(server, count):
    """Metrics that were read while requests ran, and the requests' usage."""
    chance = random.Random(1)
    gate = asyncio.Semaphore(24)
    usages, scrapes = [], []

    async def one(client):
        body = {
            "prompt": [chance.randrange(5, 90) for _ in range(chance.randint(1, 40))],
            "max_tokens": chance.randint(1, 12),
            "temperature": 1,
            "seed": chance.randrange(100),
        }
        async with gate:
            response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        usages.append(response.json()["usage"])

    async def watch():
        while len(usages) < count:
            scrapes.append(await asyncio.to_thread(scrape, server.http))
            await asyncio.sleep(0.05)

    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        await asyncio.gather(watch(), *(one(client) for _ in range(count)))
    return scrapes, usages


def test_each_prompt_and_each_of_its_sequences_counts(real_server):
    since = Since(real_server.http)
    body = {"prompt": ["ab", "cdef"], "n": 3, "max_tokens": 4, "ignore_eos": True, "temperature": 1}
    with real_server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        response.read()
    counted = since.now()
    assert counted["request_success_total[length]"] == 6
    for name in LATENCIES:
        assert counted[f"{name}_count"] == 6
    assert counted["request_prompt_tokens_sum"] == 3 * (2 + 4)
    assert counted["request_max_num_generation_tokens_count"] == counted["request_params_n_count"] == 2
    assert counted["request_max_num_generation_tokens_sum"] == 8 and counted["request_params_n_sum"] == 6


LONG = {"prompt": "long", "max_tokens": 500, "ignore_eos": True}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_request_whose_time_is_up_counts_as_aborted(slow, streamed):
    since = Since(slow.http)
    answer = slow.http.post("/v1/completions", json=LONG | {"stream": streamed, "n": 2})
    assert "request_timeout" in answer.text
    counted = since.now()
    assert counted["request_failures_total[request_timeout]"] == counted["request_success_total[abort]"] == 2
    assert counted["e2e_request_latency_seconds_count"] == 0


def test_a_client_that_leaves_is_in_flight_until_then(launch, eventually):
    server = launch(FAKE_STEP_SECONDS="0.05").wait_ready()
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.http.get("/load").json() == {"server_load": 1}
        assert scrape(server.http)["http_requests_in_flight"] == 1
    eventually(lambda: server.http.get("/load").json() == {"server_load": 0})
    found = scrape(server.http)
    assert found["request_failures_total[client_disconnected]"] == found["request_success_total[abort]"] == 1
    assert found["time_to_first_token_seconds_count"] == 1 and found["e2e_request_latency_seconds_count"] == 0


def test_failures_of_the_engine_and_what_never_reached_it(launch):
    server = launch(FAKE_STEP_SECONDS="0.05").wait_ready()
    assert server.http.post("/v1/completions", json={"prompt": "a<|fails|>"}).status_code == 500
    for body in ({"prompt": "a", "max_tokens": 0}, {"prompt": "a", "max_tokens": 10**6}):
        assert server.http.post("/v1/completions", json=body).status_code == 400
    assert server.http.get("/v1/nothing").status_code == server.http.get("/nothing").status_code == 404
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.engine_pids()[0], signal.SIGKILL)
        assert any("engine_died" in line for line in lines)
    found = scrape(server.http)
    failures = {name: value for name, value in of(found, "request_failures_total").items() if value}
    assert failures == {"[engine_error]": 1, "[engine_died]": 1}
    assert found["request_success_total[error]"] == 2 and found["request_success_total[abort]"] == 0
    responses = of(found, "http_responses_total")
    assert responses["[/v1/completions,500]"] == 1 and responses["[/v1/completions,400]"] == 2
    assert responses["[other,404]"] == 2


ENDS = {
    "queue_full": ApiError(503, "busy", code="queue_full"),
    "request_timeout": ApiError(504, "late", code="request_timeout"),
    "invalid_request": InvalidRequest("the grammar became too complex"),
    "engine_error": ApiError(500, "failed", code="engine_error"),
    "engine_died": EngineDied("dead"),
    "internal_error": ZeroDivisionError(),
    "client_disconnected": asyncio.CancelledError(),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_what_fails_counts_for_the_sequences_that_had_not_ended(reason):
    outcomes = Outcomes()
    done = CompletionOutput(0, "", [1], finish_reason="stop", metrics=SequenceMetrics(1, 1, 1, 1, 1))
    with pytest.raises(type(ENDS[reason])), outcomes.watch(0.0, 2, SamplingParams(n=2)) as watch:
        watch.saw(0, RequestOutput("r", None, [1], [done]))
        raise ENDS[reason]
    assert {name: count for name, count in outcomes.failures.items() if count} == {reason: 3}
    assert outcomes.finished["stop"] == 1 and outcomes.finished[FAILURES[reason]] == 3


def test_a_request_that_is_refused_counts_for_nothing_but_its_response():
    outcomes = Outcomes()
    with pytest.raises(InvalidRequest), outcomes.watch(0.0, 1, SamplingParams()):
        raise InvalidRequest("too long", "prompt")
    assert not any(outcomes.failures.values()) and not any(outcomes.finished.values())


def test_a_stream_whose_grammar_fails_counts_as_an_error(real_server):
    since = Since(real_server.http)
    body = {"prompt": "a", "guided_regex": "(a{1,1000}){1,1000}", "min_tokens": 400, "max_tokens": 400}
    answer = real_server.http.post("/v1/completions", json=body | {"stream": True})
    assert answer.status_code == 200 and "too complex" in answer.text
    counted = since.now()
    assert counted["request_failures_total[invalid_request]"] == counted["request_success_total[error]"] == 1
    assert real_server.http.post("/v1/completions", json=body | {"guided_regex": "("}).status_code == 400
    assert since.now()["request_success_total[error]"] == 1


def test_each_replica_speaks_for_itself_and_one_that_is_gone_says_nothing(launch, eventually, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    server = launch({"mesh": "1x2"}, FAKE_GATE=str(gate)).wait_ready()
    assert scrape(server.http, 0)["steps_total"] == scrape(server.http, 1)["steps_total"] == 0
    gate.unlink()
    os.kill(server.engine_pids()[1], signal.SIGKILL)
    eventually(lambda: scrape(server.http, 1)["engine_restarts_total"] == 1)
    own = {family.sample for family in REPLICA}
    assert own.isdisjoint(scrape(server.http, 1))
    alive = scrape(server.http, 0)
    assert alive["engine_restarts_total"] == 0 and "generation_tokens_total" in alive
    gate.touch()
    eventually(lambda: "generation_tokens_total" in scrape(server.http, 1))


def test_a_replica_that_is_stuck_does_not_keep_the_others_from_answering(launch):
    server = launch({"mesh": "1x2"}).wait_ready()
    stuck = server.engine_pids()[1]
    os.kill(stuck, signal.SIGSTOP)
    try:
        assert "steps_total" in scrape(server.http, 0) and "steps_total" not in scrape(server.http, 1)
    finally:
        os.kill(stuck, signal.SIGCONT)


def test_a_key_is_needed_where_the_server_has_keys_unless_metrics_are_open(launch):
    server = launch({"api_key": ["secret"]}).wait_ready()
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/load").status_code == 401
    assert scrape(server.http)["http_responses_total[/metrics,401]"] == 1
    opened = launch({"api_key": ["secret"], "open_metrics": True}).wait_ready()
    assert httpx.get(f"{opened.url}/metrics").status_code == 200
    assert (
        httpx.get(f"{opened.url}/load").status_code == httpx.get(f"{opened.url}/v1/models").status_code == 401
    )


LATENCY_SAMPLES = ("bucket", "sum", "count")
DASHBOARDS = {
    # examples/observability/prometheus_grafana/grafana.json of the vLLM repository
    *(f"vllm:e2e_request_latency_seconds_{part}" for part in LATENCY_SAMPLES),
    *(f"vllm:inter_token_latency_seconds_{part}" for part in LATENCY_SAMPLES),
    *(f"vllm:time_to_first_token_seconds_{part}" for part in LATENCY_SAMPLES),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket"),
    *("vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum"),
    *("vllm:request_decode_time_seconds_sum", "vllm:request_max_num_generation_tokens_sum"),
    # besides, its dashboards/grafana/performance_statistics.json and query_statistics.json
    "vllm:iteration_tokens_total_count",
    # and its first page, before names were changed
    *("vllm:gpu_cache_usage_perc", "vllm:time_per_output_token_seconds_bucket"),
}
"""Every sample that vLLM's dashboards ask for."""


def test_vllms_dashboards_find_what_they_ask_for(launch):
    server = launch({"metrics_compat": "vllm", "served_model_name": ["tiny", "alias"]}).wait_ready()
    server.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3, "ignore_eos": True})
    samples = [sample for family in families(server.http) for sample in family.samples]
    theirs = [sample for sample in samples if sample.name.startswith("vllm:")]
    assert {sample.name for sample in theirs} >= DASHBOARDS
    assert all(sample.labels["model_name"] == "tiny" and sample.labels["engine"] == "0" for sample in theirs)
    [ended] = [s for s in theirs if s.name == "vllm:request_success_total" and s.value]
    assert ended.labels["finished_reason"] == "length" and ended.value == 1
    values = {(s.name.partition(":")[2], s.labels.get("le")): s.value for s in samples if s not in theirs}
    for sample in theirs:
        if sample.name.removeprefix("vllm:").startswith("e2e_request"):
            assert values[sample.name.removeprefix("vllm:"), sample.labels.get("le")] == sample.value


def test_without_the_option_there_is_nothing_of_vllms(real_server):
    assert not [family.name for family in families(real_server.http) if family.name.startswith("vllm:")]


def test_the_page_of_metrics_has_the_names_that_there_are(real_server):
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert table() in text, (
        "run: python -m jaxserve.server.metrics.definitions, and put it into docs/metrics.md"
    )
    shown = {family.name for family in families(real_server.http)}
    assert shown == {f"jaxserve:{family.name}" for family in (*REPLICA, *SERVER)}


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
