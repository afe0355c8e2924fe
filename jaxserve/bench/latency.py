"""`jaxserve bench latency`: one batch of fixed size through an engine in this process, again and again."""

import itertools
from argparse import Namespace
from typing import Annotated

import msgspec

from jaxserve.bench.options import Reporting, add, read
from jaxserve.bench.workload import Workload, token_ids
from jaxserve.cli.flags import Parser, add_options, read_options
from jaxserve.config import EngineConfig, about
from jaxserve.errors import ConfigError


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    batch_size: Annotated[int, about("prompts in the batch")] = 8
    input_len: Annotated[int, about("tokens in each prompt")] = 32
    output_len: Annotated[int, about("tokens in each output")] = 128
    num_iters: Annotated[int, about("batches that are timed")] = 10
    num_iters_warmup: Annotated[int, about("batches before them")] = 2
    temperature: Annotated[float, about("of sampling")] = 0.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "input_len", "output_len", "num_iters"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_iters_warmup < 0:
            raise ConfigError(f"num_iters_warmup must not be negative, not {self.num_iters_warmup}")


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve bench latency",
        usage="jaxserve bench latency [MODEL] [OPTIONS]",
        description="Time one batch of fixed size, again and again with other prompts.",
    )
    add(parser, Options, Reporting)
    add_options(parser, EngineConfig)
    return parser


def run(args: Namespace) -> int:
    options, reporting, config = read(args, Options), read(args, Reporting), read_options(args, EngineConfig)
    reporting.check()
    from jaxserve.bench import metrics, report, results
    from jaxserve.bench.offline import Bench

    kept = msgspec.structs.asdict(options) | {"engine": msgspec.structs.asdict(config)}
    result = results.new_result("latency", reporting.label or config.model, kept)
    bench = Bench(config)
    workload = Workload(input_len=options.input_len, output_len=options.output_len)
    asks = workload.asks(config.seed, token_ids(bench.engine.vocab_size), len)
    setting = {"batch_size": options.batch_size}
    for i in range(-options.num_iters_warmup, options.num_iters):
        done = bench.run(list(itertools.islice(asks, options.batch_size)), options.temperature, setting, i)
        if i >= 0:
            done.samples["latency_ms"] = [1e3 * done.duration]
            done.summary = metrics.summarise(done.samples)
            result.runs.append(done)
    bench.close()
    print(report.show_together(result.runs))
    reporting.finish(result)
    return 0
