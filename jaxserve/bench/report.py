"""Results as text for a person."""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxserve.bench.metrics import METRICS, PERCENTILES, spread
from jaxserve.bench.results import Result, Run

COLUMNS = ("mean", *(f"p{p}" for p in PERCENTILES))


def show_run(run: Run) -> str:
    """One run: its rates, then a table of what varied."""
    return "\n".join(_lines(run))


def _lines(run: Run) -> Iterator[str]:
    yield heading(run)
    for kind, count in run.counts.get("errors", {}).items():
        yield f"  {count:10,}  failed: {kind}  {run.counts['error_details'][kind]}".rstrip()
    rates = {name: value for name, value in run.summary.items() if isinstance(value, float)}
    for name, value in rates.items():
        if METRICS[name].more_is_better is not None:  # the client's own is told below
            yield f"  {_number(name, value):>10}  {METRICS[name].title}"
    rows = {name: value for name, value in run.summary.items() if isinstance(value, dict)}
    if rows:
        width = max(len(METRICS[name].title) for name in rows)
        yield f"  {'':{width}}" + "".join(f"{column:>11}" for column in COLUMNS)
        for name, values in rows.items():
            cells = "".join(f"{_number(name, values[column]):>11}" for column in COLUMNS)
            yield f"  {METRICS[name].title:{width}}{cells}"
    if "events" in run.counts:
        yield from _client(run)


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


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    rule = f"|{'-' * (widths[0] + 2)}|" + "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([_row(titles, widths), rule, *(_row(row, widths) for row in rows)])


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(cells))
    return "| " + " | ".join([first, *others]) + " |"


def show_sweep(result: Result, metrics: Sequence[str]) -> str:
    """A row for each setting, all rounds together: the median of rates, p50 and p99 of what varied."""
    groups = settings(result.runs)
    names = [name for name in metrics if any(run.samples.get(name) for run in result.runs)]
    single = [name for name in names if all(isinstance(run.summary.get(name), float) for run in result.runs)]
    titles = ["setting"]
    for name in names:
        titles += [METRICS[name].title] if name in single else [f"{METRICS[name].title}: p50", "p99"]
    rows = []
    for setting, runs in groups:
        row = [name_of(setting)]
        for name in names:
            values = spread([value for run in runs for value in run.samples.get(name, [])])
            columns = ("p50",) if name in single else ("p50", "p99")
            row += [_number(name, values[column]) if values else "" for column in columns]
        rows.append(row)
    return table(titles, rows)


def _number(metric: str, value: float) -> str:
    return f"{value:,.{METRICS[metric].digits}f}"
