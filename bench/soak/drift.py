"""Whether a server under equal load grows: its memory, and the time of its steps."""

import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

WINDOW = 10.0
"""Seconds over which samples are added up: neighbours are then nearly independent."""
FEWEST = 5
"""Windows, after the settling, without which a slope says nothing."""
SETTLING = 0.2
"""Part of the time, at the begin, in which caches and pools may still grow."""
TOLERANCE = {"memory": 0.01, "step time": 0.05}
"""Growth over the run, as a part of the mean, below which even a sure slope does not matter."""


class Sample(NamedTuple):
    """The server at a moment: seconds since the begin, MiB of each process, and what `/metrics` says."""

    at: float
    http: float
    engine: float
    running: float
    waiting: float
    blocks: float
    """Part of the pool in use."""
    steps: float
    step_seconds: float
    tokens: float
    """Computed; this, steps and their seconds count from the server's start."""
    generated: float


class Drift(NamedTuple):
    """How much something grew in the run: in its unit, with the 95% interval."""

    name: str
    mean: float
    growth: float
    low: float
    high: float
    tolerance: float

    @property
    def matters(self) -> bool:
        return self.low > 0 and self.growth > self.tolerance * self.mean

    def show(self) -> str:
        return f"{self.growth:+.3g} ({self.low:+.3g} to {self.high:+.3g}) beside a mean of {self.mean:.4g}"


def drift(samples: list[Sample]) -> list[Drift]:
    """Of the memory of each process (MiB), and of a step's time (ms) less what its tokens explain.

    Nothing where there are too few windows to tell."""
    windows = summed(samples)
    windows = windows[int(SETTLING * len(windows)) :]
    if len(windows) < FEWEST:
        return []
    at = np.array([w["at"] for w in windows])
    step = np.array([w["step ms"] for w in windows])
    explained = np.array([[w["tokens per step"], w["running"]] for w in windows])
    nothing = np.empty((len(at), 0))
    found = [("step time", "step time", step, explained)]
    for process in ("http", "engine"):
        memory = np.array([w[process] for w in windows])
        found.append((f"memory of the {process} process", "memory", memory, nothing))
    return [
        Drift(name, float(values.mean()), *growth(at, values, given), TOLERANCE[kind])
        for name, kind, values, given in found
    ]


def growth(at: np.ndarray, values: np.ndarray, given: np.ndarray) -> tuple[float, float, float]:
    """What time added from first to last, by least squares beside `given`, and its 95% interval."""
    from scipy import stats

    span = at[-1] - at[0]
    columns = np.column_stack([np.ones_like(at), (at - at[0]) / span, given])
    solution, _, rank, _ = np.linalg.lstsq(columns, values, rcond=None)
    rest = values - columns @ solution
    free = len(at) - rank
    variance = rest @ rest / free * np.linalg.pinv(columns.T @ columns)[1, 1]
    half = float(stats.t.ppf(0.975, free) * np.sqrt(variance))
    return float(solution[1]), float(solution[1]) - half, float(solution[1]) + half


def summed(samples: list[Sample]) -> list[dict[str, float]]:
    """Windows of `WINDOW` seconds in which there were steps: means, and rates from the counters."""
    windows = []
    for _, group in itertools.groupby(samples, lambda sample: sample.at // WINDOW):
        first, *_, last = part = list(group) * 2
        steps = last.steps - first.steps
        if steps <= 0:
            continue
        mean = {name: float(np.mean([getattr(s, name) for s in part])) for name in Sample._fields}
        windows.append(
            mean
            | {
                "step ms": 1e3 * (last.step_seconds - first.step_seconds) / steps,
                "tokens per step": (last.tokens - first.tokens) / steps,
                "output tokens/s": (last.generated - first.generated) / (last.at - first.at),
            }
        )
    return windows


def draw(samples: list[Sample], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    windows = summed(samples)
    minutes = [w["at"] / 60 for w in windows]
    panels = [
        ("memory, MiB", ("http", "engine")),
        ("in a step", ("step ms", "tokens per step")),
        ("output tokens/s", ("output tokens/s",)),
        ("requests", ("running", "waiting")),
    ]
    figure, axes = pyplot.subplots(len(panels), sharex=True, figsize=(10, 10), layout="constrained")
    for axis, (label, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(minutes, [w[name] for w in windows], label=name, marker=".")
        axis.set(ylabel=label, ylim=(0, None))
        axis.legend()
    axes[-1].set_xlabel(f"minutes (means of {WINDOW:.0f} s)")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
