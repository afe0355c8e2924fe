"""The scenarios of bench/robustness, small, against the real server and the real core."""

import asyncio

import pytest

from bench.robustness import scenarios
from bench.robustness.cases import MAKERS, make_case
from bench.robustness.server import Target


@pytest.fixture
def target(real_server) -> Target:
    return Target(real_server.url, real_server.process.pid)


def held(scenario) -> dict:
    findings = asyncio.run(asyncio.wait_for(scenario, 300))
    assert not findings.wrong, "\n".join(findings.wrong)
    return findings.figures


def test_bad_requests_beside_good_ones(target):
    figures = held(scenarios.fuzz(target, requests=600, seed=1))
    assert figures["bad"] == 600 and figures["good"] > 20


def test_a_case_is_made_again_from_its_seed_and_number():
    names = {make_case(3, number).name for number in range(300)}
    assert [make_case(3, n) for n in range(200)] == [make_case(3, n) for n in range(200)]
    assert make_case(3, 7) != make_case(4, 7)
    assert len(names) >= len(MAKERS)


def test_clients_that_disconnect_at_random_moments(target):
    figures = held(scenarios.disconnect(target, clients=150, seed=1))
    assert sum(figures["moments"].values()) == 150


def test_ten_times_more_load_than_fits_is_served_in_order(target):
    figures = held(scenarios.overload(target, slots=8, seconds=3, max_tokens=40))
    assert figures["requests"] >= 80 and figures["most waiting"] > 50


def test_a_flood_then_a_killed_engine_then_sigterm_with_50_streams_running(start_real):
    server = start_real("--max-num-seqs", "50", "--max-num-queued-reqs", "8", "--max-model-len", "256")
    target = Target(server.url, server.process.pid)
    figures = held(scenarios.flood(target, slots=50, seconds=2, max_tokens=40))
    assert figures["complete"] and figures["refused"]
    figures = held(scenarios.kill(target, streams=30, max_tokens=150))
    assert figures["complete"] < 30 and any("engine_died" in error for error in figures["errors"])
    figures = held(scenarios.drain(target, streams=50, max_tokens=150))
    assert figures["complete"] == 50
    assert server.process.wait(60) == 0
