"""bench/soak: what counts as wrong, and what as drift. That it holds is seen in tests/server."""

import asyncio
import os
from types import SimpleNamespace

import numpy as np
import pytest

aiohttp = pytest.importorskip("aiohttp")

from bench.soak.__main__ import main, watch  # noqa: E402
from bench.soak.drift import Sample, drift, growth, summed  # noqa: E402
from bench.soak.traffic import Client, Sent, traffic  # noqa: E402


def send(fake, manner, kind="stream", leaves=None):
    async def go():
        async with aiohttp.ClientSession() as http:
            client = Client(SimpleNamespace(url=f"{fake.url}/{manner}"), http)
            body = {"prompt": "a", "max_tokens": 5, "stream": kind == "stream"}
            await client.send(Sent(kind, "/v1/completions", body, leaves))
            return client.counts

    return asyncio.run(go())


@pytest.mark.parametrize("manner", ["503", "400", "error", "cut", "ends"])
def test_an_answer_that_is_not_whole_is_an_error(fake, manner):
    counts = send(fake, manner)
    assert dict(counts.ended) == {"wrong": 1}
    assert len(counts.wrong) == 1 and "max_tokens" in counts.wrong[0] and "prompt" not in counts.wrong[0]


def test_what_is_as_it_should_be(fake):
    assert dict(send(fake, "ok").ended) == {"complete": 1}
    assert dict(send(fake, "ok", leaves=2).ended) == {"left": 1}
    assert dict(send(fake, "400", "bad").ended) == {"refused, as it should be": 1}
    assert dict(send(fake, "ok", "bad").ended) == {"wrong": 1}
    assert dict(send(fake, "hangs", "whole", leaves=1).ended) == {"left": 1}


def test_traffic_is_mixed_and_the_same_for_its_seed():
    requests = traffic(7)
    first = [next(requests) for _ in range(500)]
    again = traffic(7)
    assert first == [next(again) for _ in range(500)]
    assert {each.kind for each in first} == {"stream", "whole", "bad"}
    assert {each.path for each in first} == {"/v1/completions", "/v1/chat/completions"}
    assert 5 < sum(each.leaves is not None for each in first) < 60


def test_growth_is_seen_in_noise_and_only_if_it_is_there():
    rng = np.random.default_rng(0)
    at = np.arange(60.0)
    noise = rng.normal(0, 1, 60)
    nothing = np.empty((60, 0))
    value, low, high = growth(at, 100 + noise, nothing)
    assert low < 0 < high
    value, low, high = growth(at, 100 + noise + 10 * at / 59, nothing)
    assert low > 0 and value == pytest.approx(10, abs=1.5)


def test_growth_that_the_load_explains_is_no_drift():
    rng = np.random.default_rng(0)
    at = np.arange(60.0)
    load = at + rng.normal(0, 10, 60)
    values = 5 + 0.1 * load + rng.normal(0, 0.1, 60)
    assert growth(at, values, np.empty((60, 0)))[1] > 0
    low, high = growth(at, values, load[:, None])[1:]
    assert low < 0 < high


def samples(leak=0.0, slower=0.0, minutes=10):
    """A second each: a step takes 10 ms, the engine 1000 MiB."""
    rng = np.random.default_rng(1)
    made, seconds = [], 0.0
    for at in range(60 * minutes):
        step = 0.01 * (1 + slower * at / 600 + rng.normal(0, 0.02))
        seconds += 50 * step
        engine = 1000 + leak * at / 600 + rng.normal(0, 1)
        made.append(Sample(at, 100.0, engine, 8.0, 0.0, 0.5, 50.0 * at, seconds, 800.0 * at, 400.0 * at))
    return made


def test_windows_add_up_samples():
    windows = summed(samples())
    assert len(windows) == 60
    assert windows[3]["step ms"] == pytest.approx(10, rel=0.05)
    assert windows[3]["output tokens/s"] == pytest.approx(400)
    assert windows[3]["tokens per step"] == pytest.approx(16)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, []),
        ({"leak": 100.0}, ["memory of the engine process"]),
        ({"slower": 0.3}, ["step time"]),
        ({"leak": 3.0}, []),  # sure, and too little to matter
    ],
)
def test_what_drifts_is_named(changes, names):
    assert [each.name for each in drift(samples(**changes)) if each.matters] == names


def test_a_second_in_which_the_engine_does_not_answer_is_left_out():
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "steps_total")
    names += ("step_time_seconds_sum", "iteration_tokens_total_sum", "generation_tokens_total")
    answers = iter([{"engine_restarts_total": 0.0}, dict.fromkeys(names, 1.0)])

    class Server:
        pid = os.getpid()

        def engine_pids(self):
            return [self.pid]

        async def metrics(self, probe):
            return next(answers)

    seen = []
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(watch(Server(), None, seen))
    assert len(seen) == 1 and seen[0].engine > 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--load", "0"], "--load must be above 0"),
        (["--capacity-seconds", "nan"], "--capacity-seconds must be above 0"),
        (["--minutes", "0.5"], "--minutes 0.5 are too few to tell whether it drifts"),
    ],
)
def test_what_would_say_nothing_is_refused(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.setattr("sys.argv", ["soak", "--out", str(tmp_path), *argv])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_too_few_windows_do_not_hold(tmp_path, monkeypatch, capsys):
    """As when the engine hardly answered."""

    class Idle:
        target = process = SimpleNamespace(kill=lambda: None)

        def __init__(self, *args):
            pass

        async def warm(self):
            pass

        def stop(self):
            return 0

    async def short(target, args):
        few = samples()[:40]
        return {"samples": [each._asdict() for each in few], "drift": drift(few)}, []

    monkeypatch.setattr("bench.soak.__main__.Server", Idle)
    monkeypatch.setattr("bench.soak.__main__.soak", short)
    monkeypatch.setattr("bench.soak.__main__.draw", lambda *args: None)
    monkeypatch.setattr("sys.argv", ["soak", "--out", str(tmp_path)])
    assert main()
    out = capsys.readouterr().out
    assert "too short to tell whether it drifts: 4 windows" in out and "held" not in out
