"""Rooflines, and what lies under them (PNG)."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.job import Job, reason
from bench.gpu.report import OURS, Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def run(job: Job) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        return job.emit(absent=reason(error))
    results = Results.read(Path(job.out))
    for name, width, height, draw in PLOTS:
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(results, figure)
        figure.savefig(Path(job.out) / f"{name}.png", dpi=110)
        job.emit(file=f"{name}.png")


def roofline(results: Results, figure: Any) -> None:
    """Rate over operations per byte: of attention kernels on the left, of the engine's steps on the right."""
    left, right = figure.subplots(1, 2, sharey=True)
    for by, rows in _groups(results.attention(), "by"):
        _points(left, by, rows, own=by in OURS)
    _points(right, "decode step", results.of("engine", "sequences", "ms"))
    _points(right, "prefill", results.of("engine", "prefill", "ms"))
    _points(right, "transformers, decode step", results.of("peers", "decode", "ms"), own=False)
    for axis, title in (left, "attention of one layer"), (right, "steps of the model"):
        if results.copy and results.matmul:
            _roof(axis, results.copy / 1e3, results.matmul)
        axis.set(xscale="log", yscale="log", xlabel="operations per byte", title=title)
        axis.grid(alpha=0.3)
        _legend(axis, loc="lower right")
    left.set_ylabel("TFLOP/s")


def _roof(axis: "Axes", copy: float, matmul: float) -> None:
    """`copy` in TB/s."""
    ridge, points = matmul / copy, [x for each in axis.collections for x, _ in each.get_offsets()]
    xs = [min([*points, 1]) / 2, ridge, 2 * max([*points, ridge])]
    axis.plot(xs, [min(x * copy, matmul) for x in xs], "k-", lw=1)
    for x, y, text in (
        (ridge, matmul, f"{matmul:,.1f} TFLOP/s"),
        (xs[0], xs[0] * copy, f"copy {1e3 * copy:,.0f} GB/s"),
    ):
        axis.annotate(text, (x, y), (8, -12 if x < ridge else 4), textcoords="offset points")


def _points(axis: "Axes", name: str, rows: list[Row], own: bool = True) -> None:
    timed = [row for row in rows if "ms" in row]
    if timed:
        xs = [1e3 * row["TFLOP"] / row["GB"] for row in timed]
        ys = [1e3 * row["TFLOP"] / row["ms"] for row in timed]
        axis.scatter(xs, ys, s=28, marker="o" if own else "x", label=name)


def attention(results: Results, figure: Any) -> None:
    """Decode attention's part of the ceiling over the number of sequences, a panel for each context."""
    rows = [row for row in results.attention() if row["rows"] == 1 and results.of_ceiling(row)]
    contexts = sorted({row["before"] + 1 for row in rows})
    panels = figure.subplots(1, max(1, len(contexts)), sharey=True, squeeze=False)[0]
    for axis, context in zip(panels, contexts, strict=False):  # an empty one without contexts
        for by, mine in _groups([row for row in rows if row["before"] + 1 == context], "by"):
            mine = sorted(mine, key=lambda row: row["sequences"])
            xs = [row["sequences"] for row in mine]
            axis.plot(xs, [results.of_ceiling(row) for row in mine], "o-" if by in OURS else "x--", label=by)
        _counted(axis, sorted({row["sequences"] for row in rows}))
        axis.axhline(1, color="k", lw=1)
        axis.set(title=f"contexts of {context:,}", ylim=(0, None))
        axis.set_ylabel("part of the ceiling" if context == contexts[0] else "")
        _legend(axis)


def engine(results: Results, figure: Any) -> None:
    """Time of a decode step over the number of sequences, and the least that its bytes and products take."""
    left, right = figure.subplots(1, 2)
    rows = results.of("engine", "ms", "sequences", "context")
    for n, (context, mine) in enumerate(_groups(rows, "context")):
        xs = [row["sequences"] for row in mine]
        left.plot(xs, [row["ms"] for row in mine], "o-", color=f"C{n}", label=f"contexts of {context:,}")
        right.plot(
            xs, [row["tokens_per_s"] for row in mine], "o-", color=f"C{n}", label=f"contexts of {context:,}"
        )
        if results.copy and results.matmul:
            least = [row["ms"] * results.of_ceiling(row) for row in mine]
            left.plot(xs, least, ":", color=f"C{n}", label="roof")
            right.plot(
                xs,
                [1e3 * x / ms for x, ms in zip(xs, least, strict=True)],
                ":",
                color=f"C{n}",
                label="roof",
            )
    if peers := sorted(results.of("peers", "decode", "ms"), key=lambda row: row["sequences"]):
        xs = [row["sequences"] for row in peers]
        label = f"transformers, {peers[0]['context']:,}"
        left.plot(xs, [row["ms"] for row in peers], "x--", color="C7", label=label)
        right.plot(xs, [row["tokens_per_s"] for row in peers], "x--", color="C7", label=label)
    for axis in left, right:
        _counted(axis, sorted({row["sequences"] for row in rows + peers}))
        _legend(axis)
    left.set(title="a decode step, ms", ylim=(0, None))
    right.set(title="tokens/s", yscale="log")


def _legend(axis: "Axes", **where: str) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="small", **where)


def _counted(axis: "Axes", counts: list[int]) -> None:
    axis.set(xscale="log", xlabel="sequences")
    axis.minorticks_off()
    axis.set_xticks(counts, labels=map(str, counts))
    axis.grid(alpha=0.3)


def _groups(rows: list[Row], field: str) -> Iterator[tuple[Any, list[Row]]]:
    for value in dict.fromkeys(row[field] for row in rows):
        yield value, [row for row in rows if row[field] == value]


PLOTS = [("roofline", 11, 5, roofline), ("attention", 11, 4, attention), ("engine", 11, 4.5, engine)]
