"""`jaxserve bench compare`: two results of the same kind, setting by setting."""

from argparse import Namespace

from jaxserve.bench.options import needs
from jaxserve.cli.flags import Parser
from jaxserve.errors import ConfigError


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
    from pathlib import Path

    from jaxserve.bench import results
    from jaxserve.bench.report import show_comparison

    a, b = results.read(args.a), results.read(args.b)
    if a.kind != b.kind:
        raise ConfigError(f"{args.a} is of bench {a.kind}, {args.b} of bench {b.kind}: they do not compare")
    print(show_comparison(a, b))
    if args.plots:
        needs("matplotlib")
        from jaxserve.bench import plots

        Path(args.plots).mkdir(parents=True, exist_ok=True)
        for path in plots.draw([a, b], Path(args.plots)):
            print(f"wrote {path}")
    return 0
