"""Results as pictures (PNG): rates over load, latencies, what happened when, how long a start took."""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from jaxserve.bench.metrics import METRICS
from jaxserve.bench.report import name_of, settings
from jaxserve.bench.results import Result, Run

LOADS = {
    "max_concurrency": "requests at once",
    "request_rate": "requests sent per second",
    "num_prompts": "requests at once",
    "batch_size": "prompts in the batch",
}
LATENCIES = ("ttft_ms", "tpot_ms", "e2el_ms")
PERCENT = np.arange(0, 101)
WINDOWS = 60
"""In a timeline over HTTP."""


def draw(results: Sequence[Result], place: Path) -> list[Path]:
    """Plots of results of one kind; the files that were written. Labels that are alike get an A or B."""
    if len({_file_name(result.label) for result in results}) < len(results):
        results = [
            msgspec.structs.replace(result, label=f"{letter} {result.label}")
            for letter, result in zip(ascii_uppercase, results, strict=False)
        ]
    drawn: list[tuple[str, Figure]] = []
    kind = results[0].kind
    if kind == "startup":
        drawn.append(("startup", _startup(results)))
    else:
        if load := _load(results):
            drawn.append(("throughput", _throughput(results, load)))
        drawn.append(("latency", _latency(results)))
    for result in results:
        name = "timeline" if len(results) == 1 else f"timeline-{result.label}"
        timeline = {"serve": _events, "startup": None}.get(kind, _steps)
        if timeline:
            drawn.append((_file_name(name), timeline(result.runs)))
    paths = []
    for name, figure in drawn:
        paths.append(place / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * panels, 3.8), layout="constrained")
    axes = list(figure.subplots(1, panels))
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def _load(results: Sequence[Result]) -> str | None:
    """What the runs were made with more or less of."""
    seen = [name for name in LOADS for result in results for run in result.runs if name in run.setting]
    varied = [name for name in seen if len({run.setting.get(name) for r in results for run in r.runs}) > 1]
    return (varied or seen or [None])[0]


def _throughput(results: Sequence[Result], load: str) -> Figure:
    """Output tokens per second, and time per token, over the load; bars: the least and most of all rounds."""
    figure, axes = _figure(2)
    for axis, metric in zip(axes, ("output_throughput", "tpot_ms"), strict=True):
        for result in results:
            points = [
                (setting[load], _medians(runs, metric))
                for setting, runs in settings(result.runs)
                if load in setting
            ]
            points = sorted((at, values) for at, values in points if values)
            xs = [at for at, _ in points]
            middle = np.array([np.median(values) for _, values in points])
            low = middle - [min(values) for _, values in points]
            high = [max(values) for _, values in points] - middle
            axis.errorbar(xs, middle, yerr=[low, high], marker="o", capsize=3, label=result.label)
        axis.set(xlabel=LOADS[load], ylabel=METRICS[metric].title, xlim=(0, None), ylim=(0, None))
    axes[0].legend()
    return figure


def _medians(runs: Sequence[Run], metric: str) -> list[float]:
    return [float(np.median(run.samples[metric])) for run in runs if run.samples.get(metric)]


def _latency(results: Sequence[Result]) -> Figure:
    """How many percent of the requests took at most so long."""
    figure, axes = _figure(len(LATENCIES))
    for axis, metric in zip(axes, LATENCIES, strict=True):
        for result in results:
            for setting, runs in settings(result.runs):
                values = [value for run in runs for value in run.samples.get(metric, [])]
                name = f"{result.label}, {name_of(setting)}" if len(results) > 1 else name_of(setting)
                if values:
                    axis.plot(PERCENT, np.percentile(values, PERCENT), label=name)
        axis.set(xlabel="percentile of requests", ylabel=METRICS[metric].title, ylim=(0, None), xlim=(0, 100))
        axis.set_xticks([0, 25, 50, 75, 90, 99])
    axes[0].legend(fontsize="small")
    return figure


def _steps(runs: Sequence[Run]) -> Figure:
    """Each step's time by its kind of program, and the padding in it, in the last round of each setting."""
    last = [mine[-1] for _, mine in settings(runs)]
    figure = Figure(figsize=(max(5.5 * len(last), 7), 6.5), layout="constrained")
    grid = figure.subplots(2, len(last), squeeze=False, sharex="col")
    for column, run in enumerate(last):
        above, below = grid[:, column]
        for kind in ("mixed", "decode"):
            mine = [step for step in run.steps if step.program.startswith(kind)]
            at = [step.start for step in mine]
            above.scatter(at, [1e3 * step.seconds for step in mine], s=8, label=kind)
            below.scatter(at, [1 - step.tokens / step.rows for step in mine], s=8, label=kind)
        above.set(title=name_of(run.setting))
        _logarithmic(above)
        below.set(xlabel="seconds since the begin", ylim=(-0.03, 1.03))
        for axis in (above, below):
            axis.grid(alpha=0.3)
    grid[0, 0].set_ylabel("time of a step, ms")
    grid[1, 0].set_ylabel("padding, part of a step")
    grid[0, 0].legend()
    return figure


def _events(runs: Sequence[Run]) -> Figure:
    """Events with tokens that came per second, and the time between two of a request, over the run."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.subplots(2, sharex=True)
    for setting, mine in settings(runs):
        run = mine[-1]
        done = [request for request in run.requests if request.times]
        at = np.concatenate([np.add(request.times, request.start) for request in done] or [[]])
        ends = np.concatenate([np.add(request.times[1:], request.start) for request in done] or [[]])
        gaps = np.concatenate([1e3 * np.diff(request.times) for request in done] or [[]])
        edges = np.linspace(0, run.duration, WINDOWS + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        axes[0].plot(middles, np.histogram(at, edges)[0] / np.diff(edges), label=name_of(setting))
        window = np.digitize(ends, edges) - 1
        medians = [np.median(gaps[window == i]) if (window == i).any() else np.nan for i in range(WINDOWS)]
        axes[1].plot(middles, medians, label=name_of(setting))
    axes[0].set(ylabel="events with tokens, per second", ylim=(0, None))
    axes[1].set(xlabel="seconds since the begin", ylabel="median time between events, ms")
    _logarithmic(axes[1])
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def _logarithmic(axis: Axes) -> None:
    """With ticks at 1, 2, 5, 10, 20, … as plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _startup(results: Sequence[Result]) -> Figure:
    """Medians of the starts as bars, each round a dot."""
    names = ("ready_s", "first_token_s", "warm_s")
    groups = [
        (
            f"{result.label}\n{name_of(setting)}" if len(results) > 1 else name_of(setting) or result.label,
            runs,
        )
        for result in results
        for setting, runs in settings(result.runs)
    ]
    figure = Figure(figsize=(max(6, 2.2 * len(groups)), 4), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(names):
        seen = [
            (at, [run.samples[name][0] for run in runs if name in run.samples])
            for at, (_, runs) in enumerate(groups)
        ]
        seen = [(at + (i - 1) * 0.27, values) for at, values in seen if values]
        axis.bar(
            [at for at, _ in seen], [np.median(values) for _, values in seen], 0.25, label=METRICS[name].title
        )
        for at, values in seen:
            axis.scatter([at] * len(values), values, s=10, color="black", zorder=3)
    axis.set_xticks(range(len(groups)), [name for name, _ in groups])
    axis.set_ylabel("seconds since the process began")
    axis.legend()
    axis.grid(alpha=0.3, axis="y")
    return figure


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in text)
