"""`jaxserve bench compare`: two results of the same kind, setting by setting."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.bench.options import Reporting
from jaxserve.bench.workload import INPUT_LEN, OUTPUT_LEN, Workload
from jaxserve.cli.flags import Parser
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.bench.results import Result

WORK = (*Workload.__struct_fields__, "ignore_eos", "burstiness", "tokenizer")
"""Options that say what was asked: with others, times say nothing about the engine."""
REPEATS = {"seed", "engine.seed", "rounds", "num_iters", "timeout", "ready_check_timeout_sec"}
"""Options with which the same is measured more or less often."""


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve bench compare",
        usage="jaxserve bench compare A.json B.json [OPTIONS]",
        description="Show what B is to A: ratios, with the range that 95% of resampled ones lie in.\n"
        "Several rounds in each file (--rounds) make that range include how much runs differ.",
    )
    parser.add_argument("a", metavar="A.json", help="written by --output")
    parser.add_argument("b", metavar="B.json", help="the same kind of benchmark")
    parser.add_argument("--plots", metavar="DIR", help="directory for plots of both (PNG)")
    return parser


def run(args: Namespace) -> int:
    from jaxserve.bench import results
    from jaxserve.bench.report import show_comparison

    a, b = results.read(args.a), results.read(args.b)
    Reporting(plots=args.plots).check()
    if a.kind != b.kind:
        raise ConfigError(f"{args.a} is of bench {a.kind}, {args.b} of bench {b.kind}: they do not compare")
    differ = differences(a, b)
    if unlike := [told for name, told in differ.items() if name in WORK]:
        raise ConfigError(f"they did not do the same work: {', '.join(unlike)}")
    table = show_comparison(a, b)
    for told in differ.values():
        print(f"differs: {told}")
    print(table)
    if args.plots:
        from jaxserve.bench import plots

        for path in plots.draw([a, b], Path(args.plots)):
            print(f"wrote {path}")
    return 0


def differences(a: "Result", b: "Result") -> dict[str, str]:
    """Option -> `option A or B` of those that differ, but not those that each run's setting tells."""
    told = {name for result in (a, b) for run in result.runs for name in run.setting} | REPEATS
    first, second = (_options(result.options) for result in (a, b))
    return {
        name: f"{name} {first.get(name)} or {second.get(name)}"
        for name in {**first, **second}
        if first.get(name) != second.get(name) and name not in told
    }


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """As they worked: lengths that were not given are the usual ones, a file is known by its name."""
    engine = {f"engine.{name}": value for name, value in options.get("engine", {}).items()}
    found = {name: value for name, value in options.items() if name != "engine"} | engine
    if path := found.get("dataset_path"):
        found["dataset_path"] = Path(path).name
    elif found.get("dataset_name") == "random":
        found["input_len"] = found.get("input_len") or INPUT_LEN
        found["output_len"] = found.get("output_len") or OUTPUT_LEN
    return found
