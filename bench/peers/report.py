"""From the runs' records to ratios: tables, JSON and plots."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers.catalogue import OURS

Record = dict[str, Any]
"""round, over, peer, metric and value, and for what depends on it the number of sequences."""


class Metric(NamedTuple):
    title: str
    more_is_better: bool
    digits: int = 0


SPEED = {
    "output": Metric("output tokens/s", True, 1),
    "prefill": Metric("prefill tokens/s", True),
    "first": Metric("first token, ms", False),
    "between": Metric("per further token, ms", False),
}
WHOLE = {
    "start": Metric("start to first token, s", False, 1),
    "cold": Metric("the same with nothing compiled, s", False, 1),
    "memory": Metric("peak memory, MiB", False),
}
METRICS = SPEED | WHOLE

GOALS = {
    ("output", 1): "1.5",
    ("output", 8): "1.5",
    ("output", 32): "1.3",
    ("output", 64): "1.3, at least 1.1",
    "prefill": "1.0, at least 0.9",
    "cold": "20",
    "memory": "1.0",
}
"""Ratios to vLLM that were set out for, of a metric for some number of sequences, or for any."""
GOALS_BESIDE = "vllm"


class Spread(NamedTuple):
    low: float
    median: float
    high: float

    def show(self, digits: int) -> str:
        """Median (min-max)."""
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f}-{self.high:,.{digits}f})"


class Results:
    """The records of one or several comparisons, over the same way."""

    def __init__(self, records: Iterable[Record]):
        self.peers: list[str] = []
        self.sequences: set[int] = set()
        self.failures: dict[str, tuple[str, str]] = {}
        """Reason and round of the last one, unless a later round went better."""
        self._values: dict[tuple[str, str, int | None], dict[str, float]] = {}
        for record in records:
            peer, metric, count = record["peer"], record["metric"], record.get("sequences")
            if metric == "failed":
                self.failures[peer] = record["value"], record["round"]
                continue
            if peer in self.failures and self.failures[peer][1] != record["round"]:
                del self.failures[peer]  # it was mended
            if peer not in self.peers:
                self.peers.append(peer)
            if count is not None:
                self.sequences.add(count)
            self._values.setdefault((peer, metric, count), {})[record["round"]] = record["value"]

    def values(self, peer: str, metric: str, sequences: int | None = None) -> Spread | None:
        return spread(self._values.get((peer, metric, sequences), {}).values())

    def ratio(self, peer: str, metric: str, sequences: int | None = None) -> Spread | None:
        """How many times better jaxserve is, round by round: both sides were measured in each that counts."""
        ours = self._values.get((OURS, metric, sequences), {})
        theirs = self._values.get((peer, metric, sequences), {})
        pairs = [(ours[each], theirs[each]) for each in ours if each in theirs]
        if METRICS[metric].more_is_better:
            return spread(a / b for a, b in pairs)
        return spread(b / a for a, b in pairs)

    def rounds(self) -> int:
        return max((len(rounds) for rounds in self._values.values()), default=0)


def spread(values: Iterable[float]) -> Spread | None:
    listed = sorted(values)
    return Spread(listed[0], statistics.median(listed), listed[-1]) if listed else None


def markdown(results: Results, notes: dict[str, str]) -> str:
    """Both tables, what failed and what must be said, for a terminal and for the docs."""
    speed = [m for m in SPEED if any(results.values(OURS, m, n) for n in results.sequences)]
    pairs = [(peer, n) for n in sorted(results.sequences) for peer in results.peers]
    measured = [(peer, n) for peer, n in pairs if any(results.values(peer, m, n) for m in speed)]
    lines = _table(results, speed, measured)
    whole = [m for m in WHOLE if any(results.values(peer, m) for peer in results.peers)]
    lines += ["", *_table(results, whole, [(peer, None) for peer in results.peers])]
    lines += [""] + [f"- {peer}: {notes[peer]}" for peer in results.peers if peer in notes]
    lines += [f"- {peer} failed: {reason}" for peer, (reason, _) in results.failures.items()]
    return "\n".join(lines)


def _table(results: Results, metrics: Sequence[str], rows: Sequence[tuple[str, int | None]]) -> list[str]:
    """Each metric's values, and beside them jaxserve's ratio with the goal that was set for it."""
    counted = bool(rows) and rows[0][1] is not None
    head = ["sequences"] * counted + ["peer"]
    for metric in metrics:
        head += [METRICS[metric].title, "ratio"]
    lines = [head, ["---"] * len(head)]
    for peer, count in rows:
        line = [str(count)] * counted + [peer]
        for metric in metrics:
            values, ratio = results.values(peer, metric, count), results.ratio(peer, metric, count)
            line.append(values.show(METRICS[metric].digits) if values else "")
            line.append(_ratio(peer, metric, count, ratio) if ratio and peer != OURS else "")
        lines.append(line)
    return [f"| {' | '.join(line)} |" for line in lines]


def _ratio(peer: str, metric: str, count: int | None, ratio: Spread) -> str:
    goal = GOALS.get((metric, count), GOALS.get(metric)) if peer == GOALS_BESIDE else None
    return ratio.show(2) + (f"; goal {goal}" if goal else "")


def summary(results: Results) -> list[dict[str, Any]]:
    """The tables' cells, for programs: values and ratio as low, median and high."""
    cells = []
    for peer in results.peers:
        for metric in METRICS:
            for count in [None, *sorted(results.sequences)]:
                if values := results.values(peer, metric, count):
                    ratio = results.ratio(peer, metric, count)
                    cell = {"peer": peer, "metric": metric, "sequences": count, **values._asdict()}
                    cells.append(cell | {"ratio": ratio and ratio._asdict()})
    return cells


def draw(results: Results, path: Path) -> None:
    """PNG: both throughputs over the number of sequences, and start and memory."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, metric in zip(axes[0], ("output", "prefill"), strict=True):
        for peer in results.peers:
            counts = [n for n in sorted(results.sequences) if results.values(peer, metric, n)]
            if not counts:
                continue
            low, middle, high = zip(*(results.values(peer, metric, n) for n in counts), strict=True)
            error = [_less(middle, low), _less(high, middle)]
            axis.errorbar(counts, middle, error, label=peer, marker="o", capsize=3)
        axis.set(xscale="log", xlabel="sequences", ylabel=METRICS[metric].title, ylim=(0, None))
        axis.minorticks_off()
        axis.set_xticks(sorted(results.sequences), labels=map(str, sorted(results.sequences)))
    axes[0][0].legend()
    for axis, metric in zip(axes[1], ("start", "memory"), strict=True):
        peers = [peer for peer in results.peers if results.values(peer, metric)]
        low, middle, high = zip(*(results.values(peer, metric) for peer in peers), strict=True)
        axis.barh(peers, middle, xerr=[_less(middle, low), _less(high, middle)], capsize=3)
        axis.set(xlabel=METRICS[metric].title)
        axis.invert_yaxis()
    axes[1][0].set(xscale="log", xlim=(0.5, None))
    figure.suptitle(f"Median and range of {results.rounds()} rounds")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]
