"""From what was seen to numbers: samples of each metric, their percentiles, and how two runs compare."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxserve.bench.client import Record
from jaxserve.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)
OBJECTIVES = ("ttft", "tpot", "e2el")
RESAMPLES = 1000

Samples = dict[str, list[float]]
"""Metric -> its values: one of each request, step or iteration, or a single one of the whole run."""


class Metric(NamedTuple):
    title: str
    more_is_better: bool | None = False
    """None: neither."""
    digits: int = 1


METRICS = {
    "output_throughput": Metric("output tokens/s", True),
    "input_throughput": Metric("prompt tokens/s", True),
    "request_throughput": Metric("requests/s", True, 2),
    "request_goodput": Metric("requests/s that met the objectives", True, 2),
    "ttft_ms": Metric("time to first token, ms"),
    "tpot_ms": Metric("time per output token, ms"),
    "itl_ms": Metric("time between events, ms"),
    "e2el_ms": Metric("whole request, ms"),
    "latency_ms": Metric("whole batch, ms"),
    "step_ms": Metric("step, ms", digits=2),
    "padding": Metric("padding, part of a step", digits=3),
    "ready_s": Metric("until ready, s", digits=2),
    "first_token_s": Metric("until the first token, s", digits=2),
    "warm_s": Metric("until warm, s", digits=2),
    "client_cpu_s": Metric("processor time of the client, s", None, 2),
}


def of_requests(
    records: Sequence[Record], duration: float, goodput: Mapping[str, float] | None = None
) -> Samples:
    """Samples of a run over HTTP. Failed requests count for nothing. `goodput`: limits in ms, of OBJECTIVES.

    TPOT is the time from the first token to the last, per token after the first; ITL the time between two
    events, which may carry more than a token.
    """
    done = [record for record in records if record.error is None]
    samples: Samples = {
        "output_throughput": [sum(record.tokens for record in done) / duration],
        "input_throughput": [sum(record.prompt_tokens or 0 for record in done) / duration],
        "request_throughput": [len(done) / duration],
    }
    if goodput:
        samples["request_goodput"] = [sum(_meets(record, goodput) for record in done) / duration]
    samples |= {
        "ttft_ms": [1e3 * record.times[0] for record in done if record.times],
        "tpot_ms": [tpot for record in done if (tpot := _tpot_ms(record)) is not None],
        "itl_ms": [1e3 * gap for record in done for gap in np.diff(record.times).tolist()],
        "e2el_ms": [1e3 * record.end for record in done],
    }
    return samples


def summarise(samples: Samples) -> dict[str, Any]:
    """Single values as they are; of others the mean and percentiles."""
    return {
        name: values[0] if len(values) == 1 and name in _SINGLE else spread(values)
        for name, values in samples.items()
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """mean, p50, p90, p95, p99 (linear between samples); None without any."""
    if not values:
        return None
    points = np.percentile(values, PERCENTILES)
    names = [f"p{p}" for p in PERCENTILES]
    return {"mean": float(np.mean(values)), **dict(zip(names, map(float, points), strict=True))}


def errors(records: Iterable[Record]) -> dict[str, int]:
    """How many requests failed, by the kind of error, the most frequent first."""
    return dict(Counter(record.error for record in records if record.error is not None).most_common())


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """`ttft:500` and so on -> limits in ms. Raises ConfigError."""
    limits = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1.0
        if name not in OBJECTIVES or not limits[name] > 0:
            raise ConfigError(f"goodput takes ttft:MS, tpot:MS and e2el:MS, not {pair!r}")
    return limits


class Ratio(NamedTuple):
    """B / A of a metric's median, and between what it lies with 95% certainty, if that can be told."""

    a: float
    b: float
    ratio: float
    low: float | None = None
    high: float | None = None


def compare(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], seed: int = 0) -> Ratio | None:
    """Rounds of samples of a metric, of two results; None where one has none.

    The interval is a bootstrap's: rounds are drawn again, and samples in them, and the medians divided.
    """
    a, b = ([np.asarray(values) for values in rounds if len(values)] for rounds in (a, b))
    if not a or not b:
        return None
    of_a, of_b = float(_median(a)), float(_median(b))
    if not of_a:
        return None
    whole = Ratio(of_a, of_b, of_b / of_a)
    if min(sum(map(len, rounds)) for rounds in (a, b)) < 2:
        return whole
    rng = np.random.default_rng(seed)
    bases = [_median(_resample(rng, a)) for _ in range(RESAMPLES)]
    ratios = [_median(_resample(rng, b)) / base for base in bases if base]
    low, high = np.percentile(ratios, [2.5, 97.5]) if ratios else (None, None)
    return whole._replace(low=low and float(low), high=high and float(high))


_SINGLE = ("output_throughput", "input_throughput", "request_throughput", "request_goodput", "client_cpu_s")


def _median(rounds: Sequence[np.ndarray]) -> float:
    return float(np.median(np.concatenate(rounds)))


def _resample(rng: np.random.Generator, rounds: Sequence[np.ndarray]) -> list[np.ndarray]:
    drawn = [rounds[i] for i in rng.integers(len(rounds), size=len(rounds))]
    return [values[rng.integers(len(values), size=len(values))] for values in drawn]


def _tpot_ms(record: Record) -> float | None:
    if record.tokens < 2 or len(record.times) < 2:
        return None
    return 1e3 * (record.times[-1] - record.times[0]) / (record.tokens - 1)


def _meets(record: Record, limits: Mapping[str, float]) -> bool:
    """A request of a single token has no time per token to miss."""
    if not record.times:
        return False
    seen = {"ttft": 1e3 * record.times[0], "tpot": _tpot_ms(record) or 0.0, "e2el": 1e3 * record.end}
    return all(seen[name] <= limit for name, limit in limits.items())
