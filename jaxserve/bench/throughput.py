"""`jaxserve bench throughput`: an engine in this process, given all requests at once."""

import itertools
from argparse import Namespace
from typing import Annotated

import msgspec

from jaxserve.bench.options import Reporting, add, read
from jaxserve.bench.workload import Workload, read_dataset, token_ids
from jaxserve.cli.flags import Parser, add_options, read_options
from jaxserve.config import EngineConfig, about
from jaxserve.errors import ConfigError

SWEEP = ("output_throughput", "input_throughput", "ttft_ms", "tpot_ms", "step_ms", "padding")


class Options(Workload, kw_only=True, forbid_unknown_fields=True):
    num_prompts: Annotated[list[int] | None, about("requests at once; several: one run with each (64)")] = (
        None
    )
    rounds: Annotated[int, about("how often all is run, in turn")] = 1
    temperature: Annotated[float, about("of sampling")] = 0.0

    @property
    def counts(self) -> list[int]:
        return self.num_prompts or [64]

    def __post_init__(self) -> None:
        super().__post_init__()
        for value in (self.rounds, *self.counts):
            if value < 1:
                raise ConfigError(f"num_prompts and rounds must be at least 1, not {value}")


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve bench throughput",
        usage="jaxserve bench throughput [MODEL] [OPTIONS]",
        description="Give an engine in this process all requests at once. Outputs have their full length.",
    )
    add(parser, Options, Reporting)
    add_options(parser, EngineConfig)
    return parser


def run(args: Namespace) -> int:
    options, reporting, config = read(args, Options), read(args, Reporting), read_options(args, EngineConfig)
    reporting.check()
    if options.dataset_path:
        read_dataset(options.dataset_path)  # what is wrong with it is told before a model is loaded
    from jaxserve.bench import report, results
    from jaxserve.bench.offline import Bench

    kept = msgspec.structs.asdict(options) | {"engine": msgspec.structs.asdict(config)}
    result = results.new_result("throughput", reporting.label or config.model, kept)
    bench = Bench(config)
    engine = bench.engine
    if options.dataset_path and engine.tokenizer is None:
        bench.close()
        raise ConfigError(f"{config.model} has no tokenizer for the texts of dataset_path: give --tokenizer")
    asks = options.asks_of_runs(
        config.seed, token_ids(engine.vocab_size), lambda text: len(engine.tokenizer.encode(text))
    )
    for turn, count in itertools.product(range(options.rounds), options.counts):
        asked = list(itertools.islice(asks(f"{turn} {count}"), count))
        done = bench.run(asked, options.temperature, {"num_prompts": count}, turn)
        result.runs.append(done)
        print(report.show_run(done), end="\n\n", flush=True)
    bench.close()
    if len(result.runs) > 1:
        print(report.show_sweep(result, SWEEP))
    reporting.finish(result)
    return 0
