"""Metrics of records made by hand, and numpy's own numbers."""

import numpy as np
import pytest

from jaxserve.bench import metrics
from jaxserve.bench.client import Record
from jaxserve.bench.results import Step
from jaxserve.errors import ConfigError

FAST = Record(0.0, end=1.0, times=[0.1, 0.3, 0.9], prompt_tokens=10, output_tokens=5)
SLOW = Record(1.0, end=4.0, times=[2.0, 3.0], prompt_tokens=20, output_tokens=None)
SHORT = Record(0.5, end=0.6, times=[0.5], prompt_tokens=4, output_tokens=1)
LOST = Record(0.0, end=0.2, times=[0.1], prompt_tokens=99, output_tokens=99, error="HTTP 503")


def test_rates_count_what_succeeded_by_the_servers_count_or_else_by_events():
    samples = metrics.of_requests([FAST, SLOW, SHORT, LOST], duration=4.0)
    assert samples["output_throughput"] == [(5 + 2 + 1) / 4]
    assert samples["input_throughput"] == [34 / 4]
    assert samples["request_throughput"] == [3 / 4]
    assert "request_goodput" not in samples


def test_latencies_of_each_request():
    samples = metrics.of_requests([FAST, SLOW, SHORT, LOST], duration=4.0)
    assert samples["ttft_ms"] == [100, 2000, 500]
    assert samples["tpot_ms"] == pytest.approx([800 / 4, 1000])  # a single token has none
    assert samples["itl_ms"] == pytest.approx([200, 600, 1000])
    assert samples["e2el_ms"] == pytest.approx([1000, 4000, 600])


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({"ttft": 100}, 1),
        ({"ttft": 500}, 2),
        ({"tpot": 199}, 1),  # the one of a single token
        ({"ttft": 100, "tpot": 199}, 0),
        ({"e2el": 4000}, 3),
    ],
)
def test_goodput_counts_requests_that_met_all_objectives(limits, met):
    samples = metrics.of_requests([FAST, SLOW, SHORT, LOST], 4.0, limits)
    assert samples["request_goodput"] == [met / 4]


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).lognormal(size=501).tolist()
    wanted = {f"p{p}": np.percentile(values, p) for p in (50, 90, 95, 99)} | {"mean": np.mean(values)}
    assert metrics.spread(values) == pytest.approx(wanted)
    assert metrics.spread([]) is None


def test_a_rate_is_summarised_as_a_number_and_a_latency_never():
    summary = metrics.summarise({"output_throughput": [3.5], "ttft_ms": [7.0]})
    assert summary["output_throughput"] == 3.5
    assert summary["ttft_ms"] == {"mean": 7, "p50": 7, "p90": 7, "p95": 7, "p99": 7}


def test_errors_by_kind_the_most_frequent_first():
    records = [FAST, LOST, Record(0, error="timeout"), LOST]
    assert list(metrics.errors(records).items()) == [("HTTP 503", 2), ("timeout", 1)]


def test_steps_and_the_padding_of_all_their_rows():
    steps = [Step(0.0, 0.5, 60, 64, "mixed[64]"), Step(0.5, 0.1, 1, 4, "decode[4]")]
    assert metrics.of_steps(steps) == {"step_ms": [500, 100], "padding": [1 - 61 / 68]}


def test_objectives():
    assert metrics.parse_goodput(["ttft:500", "tpot:50.5"]) == {"ttft": 500, "tpot": 50.5}
    for wrong in ("itl:3", "ttft", "ttft:x", "ttft:-1", "ttft:nan"):
        with pytest.raises(ConfigError, match=wrong):
            metrics.parse_goodput([wrong])


def test_a_ratio_without_repeats_has_no_range():
    assert metrics.compare([[2.0]], [[3.0]]) == (2.0, 3.0, 1.5, None, None)
    assert metrics.compare([[]], [[3.0]]) is None


def test_a_range_holds_the_truth_about_as_often_as_it_says():
    """Of 100 comparisons of what is 1.5 times another, the range of 95% misses it a few times."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(100):
        a, b = rng.normal(100, 20, 60), rng.normal(150, 30, 60)
        ratio = metrics.compare([a], [b], seed=seed)
        assert ratio.low < ratio.ratio < ratio.high
        held += ratio.low <= 1.5 <= ratio.high
    assert 88 <= held <= 100


def test_rounds_that_differ_widen_the_range():
    rng = np.random.default_rng(2)
    base = rng.normal(100, 1, (4, 50))
    alike = metrics.compare(base, base)
    apart = metrics.compare(base + 20 * np.arange(4)[:, None], base)
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


def test_other_percentiles_can_be_compared():
    a, b = np.arange(101.0), 2 * np.arange(101.0)
    assert metrics.compare([a], [b], percent=99)[:3] == (99, 198, 2)


@pytest.mark.filterwarnings("error")
def test_there_is_no_ratio_to_nothing():
    assert metrics.compare([[0.0, 0.0]], [[5.0, 5.0]]) == (0, 5, None, None, None)
    some = metrics.compare([[0.0], [1.0], [1.0]], [[2.0], [2.0], [2.0]])  # some resamples of A are 0
    assert some.ratio == 2 and some.low == 2
