"""`jaxserve bench`: dispatch to the benchmarks, one module each in jaxserve/bench."""

import argparse
import importlib

from jaxserve.cli.flags import Parser

BENCHMARKS = {
    "serve": "an OpenAI-compatible server, here or elsewhere, under load",
    "throughput": "an engine in this process, given all requests at once",
    "latency": "one batch through an engine in this process, again and again",
    "startup": "a server's start, until its first token and until it is warm",
    "compare": "two results of the same kind",
}


def parser() -> Parser:
    width = max(map(len, BENCHMARKS)) + 2
    lines = [f"  {name:{width}}{about}" for name, about in BENCHMARKS.items()]
    parser = Parser(
        prog="jaxserve bench",
        usage="jaxserve bench BENCHMARK [OPTIONS]",
        description="Measure an engine, or any server, and compare results.",
        epilog="\n".join(["benchmarks:", *lines, "", "jaxserve bench BENCHMARK --help lists its options."]),
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> int:
    benchmark = importlib.import_module(f"jaxserve.bench.{args.benchmark}")
    return benchmark.run(benchmark.parser().parse_args(args.options))
