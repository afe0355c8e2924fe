"""From what was seen to numbers: samples of each metric, their percentiles, and how two runs compare."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxserve.bench.client import Record
from jaxserve.bench.results import Step
from jaxserve.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)
OBJECTIVES = ("ttft", "tpot", "e2el")
RESAMPLES, AT_ONCE = 1000, 50

Samples = dict[str, list[float]]
"""Metric -> its values: one of each request, step or iteration, or a single one of the whole run."""


class Metric(NamedTuple):
    title: str
    short: str
    digits: int = 1
    more_is_better: bool | None = False
    """None: neither."""
    single: bool = False
    """A run has one value of it."""


def _rate(name: str, short: str = "", digits: int = 1) -> Metric:
    return Metric(name, short or name, digits, more_is_better=True, single=True)


METRICS = {
    "output_throughput": _rate("output tokens/s"),
    "input_throughput": _rate("prompt tokens/s"),
    "request_throughput": _rate("requests/s", digits=2),
    "request_goodput": _rate("requests/s that met the objectives", "goodput, requests/s", 2),
    "ttft_ms": Metric("time to first token, ms", "TTFT, ms"),
    "tpot_ms": Metric("time per output token, ms", "TPOT, ms"),
    "itl_ms": Metric("time between events, ms", "ITL, ms"),
    "e2el_ms": Metric("whole request, ms", "request, ms"),
    "latency_ms": Metric("whole batch, ms", "batch, ms"),
    "step_ms": Metric("step, ms", "step, ms", 2),
    "padding": Metric("padding, part of a step", "padding", 3, single=True),
    "ready_s": Metric("until ready, s", "ready, s", 2, single=True),
    "first_token_s": Metric("until the first token, s", "first token, s", 2, single=True),
    "warm_s": Metric("until warm, s", "warm, s", 2, single=True),
    "client_cpu_s": Metric("processor time of the client, s", "client, s", 2, None, single=True),
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


def of_steps(steps: Sequence[Step]) -> Samples:
    """Times of steps, and which part of all their rows held no token."""
    rows = sum(step.rows for step in steps)
    return {
        "step_ms": [1e3 * step.seconds for step in steps],
        "padding": [1 - sum(step.tokens for step in steps) / rows],
    }


def summarise(samples: Samples) -> dict[str, Any]:
    """Single values as they are; of others the mean and percentiles."""
    return {name: values[0] if METRICS[name].single else spread(values) for name, values in samples.items()}


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
    """What B is to A in a percentile, and the range of 95% of what resampling makes of it, if it can.

    There is no ratio to an A of 0."""

    a: float
    b: float
    ratio: float | None
    low: float | None = None
    high: float | None = None


def compare(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], percent: float = 50, seed: int = 0
) -> Ratio | None:
    """Rounds of samples of a metric, of two results; None where one has none.

    The range is a bootstrap's: rounds are drawn again, and samples in them, and the percentiles divided.
    """
    first, second = ([np.asarray(values) for values in rounds if len(values)] for rounds in (a, b))
    if not first or not second:
        return None
    base, other = _percentile(first, percent), _percentile(second, percent)
    if base == 0:
        return Ratio(base, other, None)
    whole = Ratio(base, other, other / base)
    if min(sum(map(len, rounds)) for rounds in (first, second)) < 2:
        return whole
    rng = np.random.default_rng(seed)
    bases, others = (
        np.concatenate([_resampled(rng, rounds, percent) for _ in range(RESAMPLES // AT_ONCE)])
        for rounds in (first, second)
    )
    some = bases > 0
    low, high = np.percentile(others[some] / bases[some], [2.5, 97.5])
    return whole._replace(low=float(low), high=float(high))


def _percentile(rounds: Sequence[np.ndarray], percent: float) -> float:
    return float(np.percentile(np.concatenate(rounds), percent))


def _resampled(rng: np.random.Generator, rounds: Sequence[np.ndarray], percent: float) -> np.ndarray:
    """Percentiles [AT_ONCE] of samples drawn again, from rounds that are drawn again themselves."""
    values = np.concatenate(rounds)
    sizes = np.array([len(samples) for samples in rounds])
    begins = np.cumsum(sizes) - sizes
    drawn = rng.integers(len(rounds), size=(AT_ONCE, len(rounds), 1))
    part = rng.random((AT_ONCE, len(rounds), max(1, len(values) // len(rounds))))
    at = begins[drawn] + (part * sizes[drawn]).astype(int)
    return np.percentile(values[at.reshape(AT_ONCE, -1)], percent, axis=1)


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
