"""From rows to what is read: JSON, and Markdown with the goals beside what was measured."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.job import ROWS

Row = dict[str, Any]
OURS = ("mosaic", "gpu", "xla")


class Results:
    """The rows of one run, in the order in which they came."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)
        rates = {row["ceiling"]: row["rate"] for row in self.of("ceilings", "ceiling")}
        self.copy: float | None = rates.get("copy")
        """GB/s."""
        self.matmul: float | None = rates.get("matmul")
        """TFLOP/s."""

    @classmethod
    def read(cls, out: Path) -> "Results":
        return cls(map(json.loads, (out / ROWS).read_text().splitlines()))

    def of(self, section: str, *fields: str, **values: Any) -> list[Row]:
        """A section's rows that have these fields, and these values."""
        return [
            row
            for row in self.rows
            if row["section"] == section and all(f in row for f in fields) and values.items() <= row.items()
        ]

    def of_ceiling(self, row: Row) -> float | None:
        """The time that its bytes at the rate of a copy, or its products, need, over the time it took."""
        if not (self.copy and self.matmul and "ms" in row):
            return None
        return 1e3 * max(row["GB"] / self.copy, row["TFLOP"] / self.matmul) / row["ms"]

    def attention(self) -> list[Row]:
        return self.of("kernels", "by", "rows") + self.of("torch_kernels", "by", "rows")

    def best_attention(self, sequences: int, rows: int, before: int) -> float | None:
        """Of ours, as a part of the ceiling."""
        work = {"sequences": sequences, "rows": rows, "before": before}
        found = [self.of_ceiling(row) for row in self.of("kernels", "ms", **work) if row["by"] in OURS]
        return max((part for part in found if part), default=None)

    def decode(self, sequences: int, context: int) -> float | None:
        rows = self.of("engine", "ms", decode=f"{sequences} x {context}")
        return self.of_ceiling(rows[0]) if rows else None

    def prefill(self) -> float | None:
        """The best: long prompts, or many."""
        found = [self.of_ceiling(row) for row in self.of("engine", "prefill", "ms")]
        return max((part for part in found if part), default=None)

    def idle(self) -> float | None:
        """What the profiler saw, or else what the engine counted."""
        seen = self.first("engine", "idle", profile="a step")
        return self.first("engine", "idle", decode="64 x 1024") if seen is None else seen

    def first(self, section: str, field: str, **values: Any) -> Any:
        return next((row[field] for row in self.of(section, field, **values)), None)


class Goal(NamedTuple):
    """For one H200 and Llama 3.1 8B in bf16. Nothing is tested against it."""

    name: str
    target: float
    at_least: bool
    format: str
    measured: Callable[[Results], float | None]

    def show(self, value: float) -> str:
        return format(value, self.format)


GOALS = [
    Goal("decode attention, 32 sequences x 4k: part of the copy bandwidth", 0.85, True, ".1%",
         lambda results: results.best_attention(32, 1, 4095)),
    Goal("decode step, 1 sequence x 1k: part of the memory roof", 0.80, True, ".1%",
         lambda results: results.decode(1, 1024)),
    Goal("decode step, 64 x 1k: part of the memory roof", 0.75, True, ".1%",
         lambda results: results.decode(64, 1024)),
    Goal("prefill: part of the matmul rate", 0.60, True, ".1%", Results.prefill),
    Goal("offline, 1k in and 1k out: output tokens/s", 11_500, True, ",.0f",
         lambda results: results.first("engine", "output_tokens_per_s", offline="1024 in, 1024 out")),
    Goal("device idle between steps, 64 x 1k", 0.05, False, ".1%", Results.idle),
    Goal("warm start to the first token, s", 20, False, ".1f",
         lambda results: results.first("restart", "seconds", event="first token")),
]  # fmt: skip


def write(out: Path) -> str:
    """gpu.json and report.md, of what there is so far; the latter's text."""
    results = Results.read(out)
    rows = [
        row | ({"of_ceiling": part} if "GB" in row and (part := results.of_ceiling(row)) else {})
        for row in results.rows
    ]
    (out / "gpu.json").write_text(json.dumps({"rows": rows, "goals": goals(results)}, indent=1) + "\n")
    text = markdown(results)
    (out / "report.md").write_text(text)
    return text


def goals(results: Results) -> list[Row]:
    return [
        {
            "goal": goal.name,
            "target": goal.target,
            "at_least": goal.at_least,
            "measured": goal.measured(results),
        }
        for goal in GOALS
    ]


def goals_table(results: Results, missing: str = "not measured") -> str:
    def line(goal: Goal) -> list[str]:
        value = goal.measured(results)
        wanted = f"{'≥' if goal.at_least else '<'} {goal.show(goal.target)}"
        if value is None:
            return [goal.name, wanted, missing, ""]
        met = value >= goal.target if goal.at_least else value < goal.target
        return [goal.name, wanted, goal.show(value), "met" if met else "not met"]

    return table(["goal, Llama 3.1 8B in bf16 on one H200", "", "measured", ""], map(line, GOALS))


def markdown(results: Results) -> str:
    run = next(iter(results.of("run", "created")), {})
    parts = [
        f"# {results.first('ceilings', 'device') or 'No device was seen'}",
        f"{run.get('created', '')}, jax {results.first('ceilings', 'jax')}"
        + (
            ". A dry run: tiny shapes on a CPU, and none of its figures mean anything."
            if run.get("dry")
            else ""
        ),
        "## Goals",
        goals_table(results),
        "## Ceilings",
        table(
            ["", "rate", ""],
            [[row["ceiling"], f"{row['rate']:,.1f}", row["unit"]] for row in results.of("ceilings", "rate")],
        ),
        "## Values",
        _values(results),
        "## Attention of one layer",
        "Milliseconds, and the part of the ceiling: the time that bytes need at the rate of a copy, or "
        "products at that of the large product, over the time it took.",
        _attention(results),
        "## A product with experts",
        _experts(results),
        "## Choosing tokens",
        _sampling(results),
        "## Engine",
        _decode(results),
        _others(results),
        "## Sections",
        _sections(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Empty without lines."""
    body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body]) if body else ""


def _values(results: Results) -> str:
    rows = [row for section in ("check", "experts", "sampling") for row in results.of(section, "verdict")]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    lines = []
    for name in names:
        mine = [row for row in rows if row["implementation"] == name]
        right, refused = ([row for row in mine if row["verdict"].startswith(v)] for v in ("ok", "refused"))
        part = max((row["max_error"] / row["limit"] for row in right), default=0.0)
        lines.append([name, f"{len(right)} of {len(mine) - len(refused)}", str(len(refused)), f"{part:.0%}"])
    wrong = [
        [row["implementation"], row["case"], row["verdict"]]
        for row in rows
        if not row["verdict"].startswith(("ok", "refused"))
    ]
    head = ["implementation", "cases that are right", "refused", "largest error, of what rounding allows"]
    tables = [table(head, lines), table(["implementation", "case", "what is wrong"], wrong)]
    return "\n\n".join(each for each in tables if each)


def _attention(results: Results) -> str:
    rows = results.attention()
    names = [
        by for by in dict.fromkeys(row["by"] for row in rows) if any("ms" in r for r in rows if r["by"] == by)
    ]
    works = sorted({(row["rows"] > 1, row["before"], row["sequences"], row["rows"]) for row in rows})
    lines = []
    for _, before, sequences, count in works:
        work = {"sequences": sequences, "rows": count, "before": before}
        mine = {row["by"]: row for row in rows if work.items() <= row.items() and "ms" in row}
        ours, others = ([r["ms"] for by, r in mine.items() if (by in OURS) == own] for own in (True, False))
        ratio = f"{min(others) / min(ours):.2f}" if ours and others else ""
        what = (
            f"{sequences} x {count:,} after {before:,}"
            if count > 1
            else f"{sequences} x {before + 1:,}, decode"
        )
        lines.append([what, *(_timed(results, mine.get(name)) for name in names), ratio])
    return table(["", *names, "best alternative / best of ours"], lines)


def _experts(results: Results) -> str:
    rows = results.of("experts", "by", "ms")
    names = list(dict.fromkeys(row["by"] for row in rows))
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        mine = {row["by"]: row for row in rows if row["tokens"] == tokens}
        lines.append([f"{tokens:,}", *(_timed(results, mine.get(name)) for name in names)])
    return table(["tokens", *names], lines)


def _sampling(results: Results) -> str:
    rows = results.of("sampling", "by", "ms")
    names = list(dict.fromkeys(row["by"] for row in rows))
    lines = []
    for count, filters in dict.fromkeys((row["rows"], row["filters"]) for row in rows):
        mine = {row["by"]: row for row in rows if (row["rows"], row["filters"]) == (count, filters)}
        lines.append([str(count), filters, *(_timed(results, mine.get(name)) for name in names)])
    return table(["rows", "filters", *names], lines)


def _timed(results: Results, row: Row | None) -> str:
    if row is None:
        return ""
    part = results.of_ceiling(row)
    return f"{row['ms']:.4g}" + (f" ({part:.0%})" if part else "")


def _decode(results: Results) -> str:
    peers = {row["decode"]: row for row in results.of("peers", "decode", "ms")}
    lines = []
    for row in results.of("engine", "ms", "sequences", "context"):
        peer = peers.get(row["decode"])
        beside = [f"{peer['ms']:.2f}", f"{peer['ms'] / row['ms']:.2f}"] if peer else ["", ""]
        numbers = [f"{row['tokens_per_s']:,.0f}", f"{row['idle']:.1%}", ", ".join(row["programs"])]
        lines.append([row["decode"], _timed(results, row), *numbers, *beside])
    head = ["sequences x context", "step, ms (of the ceiling)", "tokens/s", "idle", "programs"]
    return table([*head, "transformers, ms", "ratio"], lines)


def _others(results: Results) -> str:
    lines = [
        [f"prefill {row['prefill']}, ms", _timed(results, row), f"{row['tokens_per_s']:,.0f} tokens/s"]
        for row in results.of("engine", "prefill", "ms")
    ]
    for row in results.of("engine", "offline"):
        done = f"{row['finished']} of {row['requests']} requests in {row['seconds']:.1f} s"
        rate = f"{row['output_tokens_per_s']:,.0f} output tokens/s, device idle {row['idle']:.1%}"
        lines.append([f"offline, {row['offline']}", done, rate])
    for row in results.of("engine", "load"):
        ttft = ", ".join(f"{name} {row[f'ttft_{name}_ms']:,.0f}" for name in ("p50", "p90", "p99"))
        rate = f"{row['requests']} requests at {row['requests_per_s']:.1f}/s"
        lines.append(
            [f"load, {row['load']}", rate, f"ms to the first token: {ttft}; then {row['tpot_p50_ms']:.1f}"]
        )
    for section, start in ("engine", "cold"), ("restart", "warm"):
        for row in results.of(section, "event"):
            made = f"{row['programs']} programs, {row['compile_cache_misses']} compiled"
            lines.append([f"{start} start: {row['event']}", f"{row['seconds']:.1f} s", made])
    for row in results.of("engine", "ms_of_kernels"):
        seen = f"idle {row['idle']:.1%}, {row['kernels_per_step']:.0f} kernels"
        lines.append([f"profile, {row['decode']}", seen, ""])
        lines += [
            [f"`{name[:60]}`", f"{ms:.3f} ms", "of a step"] for name, ms in row["ms_of_kernels"].items()
        ]
    return table(["", "", ""], lines)


def _sections(results: Results) -> str:
    lines = [[row["of"], row["status"], f"{row['seconds']:.0f} s"] for row in results.of("run", "status")]
    absent = {
        (
            row.get("by") or row.get("peer") or f"{row['section']} {row.get('decode', '')}".strip(),
            row["absent"],
        )
        for row in results.rows
        if "absent" in row
    }
    notes = [f"- {name}: {why}" for name, why in sorted(absent)]
    return table(["section", "", "took"], lines) + ("\n\nAbsent:\n\n" + "\n".join(notes) if notes else "")
