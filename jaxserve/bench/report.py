"""Results as text for a person."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from jaxserve.bench.metrics import METRICS, PERCENTILES, Ratio, compare, spread
from jaxserve.bench.results import Result, Run
from jaxserve.errors import ConfigError

COLUMNS = ("mean", *(f"p{p}" for p in PERCENTILES))


def show_run(run: Run) -> str:
    """One run: its rates, then a table of what varied."""
    return "\n".join(_lines(run))


def show_together(runs: Sequence[Run]) -> str:
    """Runs of one setting as one, in which what each has one value of varies too."""
    together: dict[str, list[float]] = {}
    for run in runs:
        for name, values in run.samples.items():
            together.setdefault(name, []).extend(values)
    rows = {name: spread(values) for name, values in together.items()}
    return "\n".join([f"{name_of(runs[0].setting)}: {len(runs)} times", *_table_of_spreads(rows)])


def _lines(run: Run) -> Iterator[str]:
    yield heading(run)
    for kind, count in run.counts.get("errors", {}).items():
        yield f"  {count:10,}  failed: {kind}  {run.counts['error_details'][kind]}".rstrip()
    rates = {name: value for name, value in run.summary.items() if isinstance(value, float)}
    for name, value in rates.items():
        if METRICS[name].more_is_better is not None:  # the client's own is told below
            yield f"  {_number(name, value):>10}  {METRICS[name].title}"
    rows = {name: value for name, value in run.summary.items() if isinstance(value, dict)}
    yield from _table_of_spreads(rows)
    if "events" in run.counts:
        yield from _client(run)


def _table_of_spreads(rows: dict[str, Any]) -> Iterator[str]:
    if not rows:
        return
    width = max(len(METRICS[name].title) for name in rows)
    yield f"  {'':{width}}" + "".join(f"{column:>11}" for column in COLUMNS)
    for name, values in rows.items():
        cells = "".join(f"{_number(name, values[column]):>11}" for column in COLUMNS)
        yield f"  {METRICS[name].title:{width}}{cells}"


def _client(run: Run) -> Iterator[str]:
    """How the tokens were counted, and what the client took of the machine."""
    counts, (cpu,) = run.counts, run.samples["client_cpu_s"]
    if without := counts["without_usage"]:
        yield f"  the server did not count the tokens of {without} requests: an event of them is one token"
    elif counts["events"] < counts["output_tokens"]:
        yield f"  {counts['output_tokens']} tokens came in {counts['events']} events"
    each = 1e6 * cpu / max(counts["events"], 1)
    yield f"  the client took {cpu / run.duration:.1%} of a core, {each:.0f} ms per 1,000 events"


def heading(run: Run) -> str:
    parts = [name_of(run.setting)]
    counts = run.counts
    if "completed" in counts:
        parts.append(f"{counts['completed']} requests in {run.duration:.1f} s, {counts['failed']} failed")
    return ": ".join(part for part in parts if part)


def name_of(setting: dict[str, Any]) -> str:
    """`max_concurrency 4, request_rate 2`."""
    return ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None)


def settings(runs: Sequence[Run]) -> list[tuple[dict[str, Any], list[Run]]]:
    """The runs of each setting, in the order in which they first came."""
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        mine = next((group for setting, group in groups if setting == run.setting), None)
        if mine is None:
            groups.append((run.setting, [run]))
        else:
            mine.append(run)
    return groups


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Markdown with aligned columns: the first `texts` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    rule = [f":{'-' * (w - 1)}" if i < texts else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
    aligned = [
        [f"{cell:{'<' if i < texts else '>'}{widths[i]}}" for i, cell in enumerate(row)]
        for row in [titles, *rows]
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [aligned[0], rule, *aligned[1:]])


def show_sweep(result: Result, metrics: Sequence[str]) -> str:
    """A row for each setting, all rounds together: the median of rates, p50 and p99 of what varied."""
    groups = settings(result.runs)
    names = [name for name in metrics if any(run.samples.get(name) for run in result.runs)]
    titles = ["setting"]
    for name in names:
        titles += [METRICS[name].short] if METRICS[name].single else [f"{METRICS[name].short}: p50", "p99"]
    rows = []
    for setting, runs in groups:
        row = [name_of(setting)]
        for name in names:
            values = spread([value for run in runs for value in run.samples.get(name, [])])
            columns = ("p50",) if METRICS[name].single else ("p50", "p99")
            row += [_number(name, values[column]) if values else "" for column in columns]
        rows.append(row)
    return table(titles, rows)


def show_ranges(result: Result, metrics: Sequence[str]) -> str:
    """A row for each setting: the median of its rounds, and the least and the most."""
    names = [name for name in metrics if any(run.samples.get(name) for run in result.runs)]
    rows = []
    for setting, runs in settings(result.runs):
        row = [name_of(setting) or result.label]
        for name in names:
            values = [value for run in runs for value in run.samples.get(name, [])]
            middle, *ends = (_number(name, value) for value in (median(values), min(values), max(values)))
            row.append(f"{middle} ({'-'.join(ends)})")
        rows.append(row)
    return table(["", *(METRICS[name].title for name in names)], rows)


def show_comparison(a: Result, b: Result) -> str:
    """A row for each metric of each setting that both have."""
    groups_b = settings(b.runs)
    rows = []
    for setting, runs_a in settings(a.runs):
        runs_b = next((runs for other, runs in groups_b if other == setting), [])
        for name in (name for name in METRICS if any(run.samples.get(name) for run in runs_a)):
            rounds = [[run.samples.get(name, []) for run in runs] for runs in (runs_a, runs_b)]
            varied = any(len(values) > 1 for values in rounds[0])
            for percent in (50, 99) if varied else (50,):
                if ratio := compare(*rounds, percent):
                    title = f"{METRICS[name].title}: p{percent}" if varied else METRICS[name].title
                    rows.append([name_of(setting), title, *_cells(name, ratio)])
    if not rows:
        raise ConfigError("the two results have no setting in common")
    titles = ["setting", "", "A", "B", "B / A", "95% range", "B is"]
    return f"A: {a.label}\nB: {b.label}\n\n{table(titles, rows, texts=2)}"


def _cells(metric: str, ratio: Ratio) -> list[str]:
    """What is better is said where the whole range lies on one side of 1."""
    low, high, more = ratio.low, ratio.high, METRICS[metric].more_is_better
    verdict = ""
    if low is not None and high is not None and more is not None and (low > 1 or high < 1):
        verdict = "better" if (low > 1) == more else "worse"
    shown = f"{low:.3f} to {high:.3f}" if low is not None else ""
    times = f"{ratio.ratio:.3f}" if ratio.ratio is not None else ""
    return [_number(metric, ratio.a), _number(metric, ratio.b), times, shown, verdict]


def _number(metric: str, value: float) -> str:
    return f"{value:,.{METRICS[metric].digits}f}"
