"""`jaxserve bench serve`: any OpenAI-compatible server under load, over HTTP."""

import asyncio
import gc
import itertools
import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import msgspec

from jaxserve.bench import client
from jaxserve.bench.options import Reporting, add, needs, read
from jaxserve.bench.workload import Workload, arrivals, estimate_tokens, words
from jaxserve.cli.flags import Parser
from jaxserve.config import about
from jaxserve.errors import ConfigError, JaxserveError

if TYPE_CHECKING:
    import aiohttp

    from jaxserve.bench.client import Record
    from jaxserve.bench.results import Run

SWEEP = ("output_throughput", "request_throughput", "request_goodput", "ttft_ms", "tpot_ms", "e2el_ms")
POLL_SECONDS = 0.25
REFUSALS = ("HTTP 401", "HTTP 403")


class Options(Workload, kw_only=True, forbid_unknown_fields=True):
    num_prompts: Annotated[
        int | None,
        about("requests in a run (4 for each at once, but 16 or more; without a limit at once 100)"),
    ] = None
    base_url: Annotated[str, about("the server")] = "http://127.0.0.1:8000"
    model: Annotated[str | None, about("which of its models; by default the first")] = None
    api_key: Annotated[str | None, about("key for it (or $OPENAI_API_KEY)")] = None
    endpoint: Annotated[client.Endpoint, about("what is asked")] = "completions"
    max_concurrency: Annotated[
        list[int] | None, about("requests at once; several: one run with each (1, without a --request-rate)")
    ] = None
    request_rate: Annotated[
        list[float] | None,
        about("requests sent per second, ended or not the others; several: one run with each"),
    ] = None
    burstiness: Annotated[float, about("of arrivals: 1: Poisson; below: bursts; above: more evenly")] = 1.0
    duration: Annotated[float | None, about("seconds in which requests are sent in a run")] = None
    rounds: Annotated[int, about("how often all is run, in turn")] = 1
    num_warmups: Annotated[int, about("requests sent ahead of each run")] = 1
    ignore_eos: Annotated[
        bool, about("send ignore_eos, which vLLM, jaxserve and llama.cpp know: outputs of full length")
    ] = False
    temperature: Annotated[float, about("of sampling")] = 0.0
    extra_body: Annotated[str | None, about("JSON object of further fields for each request")] = None
    goodput: Annotated[
        list[str] | None, about("objectives in ms, ttft:500 tpot:50 e2el:9000: requests that met all")
    ] = None
    tokenizer: Annotated[
        str | None, about("model that counts a dataset's tokens; without it 4 characters are one")
    ] = None
    timeout: Annotated[float, about("seconds that a request may take")] = 600.0
    ready_check_timeout_sec: Annotated[float, about("seconds for the server to be ready and warm")] = 600.0
    seed: Annotated[int, about("draws prompts, lengths and arrivals")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_prompts", "duration", "burstiness", "timeout", "rounds"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be above 0, not {value}")
        for name in ("max_concurrency", "request_rate"):
            for value in getattr(self, name) or ():
                if not 0 < value < float("inf"):
                    raise ConfigError(f"{name} must be above 0, not {value}")
        if not _is_url(self.base_url):
            raise ConfigError(f"base_url must be like http://host:8000, not {self.base_url}")
        if self.num_warmups < 0:
            raise ConfigError(f"num_warmups must not be negative, not {self.num_warmups}")
        if self.burstiness != 1 and not self.request_rate:
            raise ConfigError("burstiness needs a request_rate")
        if self.tokenizer and not self.dataset_path:
            raise ConfigError("tokenizer counts the tokens of a dataset_path, and there is none")
        self.fields()

    def fields(self) -> dict[str, Any]:
        """What every request carries besides its prompt and length."""
        ours = {"temperature": self.temperature} | ({"ignore_eos": True} if self.ignore_eos else {})
        try:
            extra = json.loads(self.extra_body or "{}")
        except json.JSONDecodeError as error:
            raise ConfigError(f"extra_body is not JSON: {error}") from None
        if not isinstance(extra, dict):
            raise ConfigError("extra_body must be a JSON object")
        return ours | extra

    def settings(self) -> list["Setting"]:
        concurrency = self.max_concurrency or [None if self.request_rate else 1]
        return [Setting(*pair) for pair in itertools.product(concurrency, self.request_rate or [None])]


class Setting(msgspec.Struct):
    max_concurrency: int | None
    request_rate: float | None


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve bench serve",
        usage="jaxserve bench serve [OPTIONS]",
        description="Load an OpenAI-compatible server with streamed requests and time them.",
    )
    add(parser, Options, Reporting)
    return parser


def run(args: Namespace) -> int:
    options = read(args, Options)
    reporting = read(args, Reporting)
    needs("aiohttp")
    reporting.check()
    from jaxserve.bench import metrics, report, results

    metrics.parse_goodput(options.goodput or ())
    kept = {name: value for name, value in msgspec.structs.asdict(options).items() if name != "api_key"}
    result = results.new_result("serve", reporting.label or options.base_url, kept)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_measure(options, result))
    if len(result.runs) > 1:
        print(report.show_sweep(result, SWEEP))
    reporting.finish(result)
    if not any(run.counts["completed"] for run in result.runs):
        raise JaxserveError(f"no request succeeded at {options.base_url}")
    return 0


async def _measure(options: Options, result: Any) -> None:
    from jaxserve.bench import report

    asks = options.asks_of_runs(options.seed, words, _counter(options.tokenizer))
    async with session(options.api_key, options.timeout) as http:
        base = options.base_url.rstrip("/").removesuffix("/v1")
        result.options["model"] = model = await ready(http, base, options)
        server = client.Client(http, base, options.endpoint, model, options.fields())
        for turn in range(options.rounds):
            for setting in options.settings():
                done = await _run(options, setting, turn, server, asks)
                result.runs.append(done)
                print(report.show_run(done), end="\n\n", flush=True)


async def _run(
    options: Options,
    setting: Setting,
    turn: int,
    server: client.Client,
    asks_of: Callable[[str], Iterator[client.Ask]],
) -> "Run":
    """One setting, once."""
    from jaxserve.bench import metrics, results

    name = f"{turn} {setting.max_concurrency} {setting.request_rate}"
    asks = asks_of(name)
    begin = time.perf_counter()
    for ask in itertools.islice(asks, options.num_warmups):
        await server.send(ask._replace(output_tokens=min(ask.output_tokens, 8)), begin)
    count = options.num_prompts
    if count is None and options.duration is None:
        count = max(16, 4 * setting.max_concurrency) if setting.max_concurrency else 100
    todo: Iterator[client.Ask] = asks if count is None else iter(list(itertools.islice(asks, count)))
    gc.collect()
    gc.freeze()  # what was there before is not looked at again
    cpu = time.process_time()
    begin = time.perf_counter()
    if setting.request_rate is None:
        records = await client.closed_loop(server, todo, setting.max_concurrency or 1, options.duration)
    else:
        # other random numbers than those that drew the prompts
        due = arrivals(setting.request_rate, options.burstiness, f"{options.seed} {name} arrivals")
        records = await client.open_loop(server, todo, due, setting.max_concurrency, options.duration)
    duration = time.perf_counter() - begin
    cpu = time.process_time() - cpu
    samples = metrics.of_requests(records, duration, metrics.parse_goodput(options.goodput or ()))
    samples["client_cpu_s"] = [cpu]
    return results.Run(
        setting={k: v for k, v in msgspec.structs.asdict(setting).items() if v is not None},
        round=turn,
        duration=duration,
        counts=counts(records, duration),
        summary=metrics.summarise(samples),
        samples={name: values for name, values in samples.items() if name != "itl_ms"},
        requests=records,
    )


def counts(records: "list[Record]", duration: float) -> dict[str, Any]:
    from jaxserve.bench import metrics

    done = [record for record in records if record.error is None]
    failures = {record.error: record.detail for record in records if record.error is not None}
    return {
        "completed": len(done),
        "failed": len(records) - len(done),
        "errors": metrics.errors(records),
        "error_details": failures,
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in done),
        "output_tokens": sum(record.tokens for record in done),
        "events": sum(len(record.times) for record in records),
        "without_usage": sum(record.output_tokens is None for record in done),
        "mean_concurrency": sum(record.end for record in records) / duration,
    }


def session(api_key: str | None, timeout: float) -> "aiohttp.ClientSession":
    """As many connections as are asked for; the headers of every request."""
    import os

    import aiohttp

    headers = {"content-type": "application/json", "accept": "text/event-stream"}
    if key := api_key or os.environ.get("OPENAI_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=timeout),
        auto_decompress=False,
    )


async def ready(http: "aiohttp.ClientSession", base: str, options: Options) -> str:
    """Wait until the server can be measured; the model to ask.

    Raises JaxserveError when time is up, and at once where waiting changes nothing: a key that is refused.
    """
    deadline = time.monotonic() + options.ready_check_timeout_sec
    while True:
        problem, models = await probe(http, f"{base}/v1/models")
        if problem in REFUSALS and not options.model:
            raise JaxserveError(f"{base}/v1/models answers {problem}: give another --api-key, or a --model")
        if not problem or (options.model and problem.startswith("HTTP 4")):
            # only jaxserve has this route and says more than yes: it compiles on while it serves
            problem, state = await probe(http, f"{base}/ready")
            if problem.startswith("HTTP 4") or (not problem and is_warm(state)):
                break
            problem = problem or "it is still compiling"
        if time.monotonic() > deadline:
            raise JaxserveError(f"{base} is not ready: {problem}")
        await asyncio.sleep(POLL_SECONDS)
    if options.model:
        return options.model
    names = [model["id"] for model in models.get("data", ())] if isinstance(models, dict) else []
    if not names:
        raise JaxserveError(f"{base}/v1/models lists no model: name one with --model")
    return names[0]


def is_warm(state: Any) -> bool:
    return not isinstance(state, dict) or state.get("engine", "warm") == "warm"


async def probe(http: "aiohttp.ClientSession", url: str) -> tuple[str, Any]:
    """What is wrong with an answer, and what it says."""
    import aiohttp

    try:
        async with http.get(url) as response:
            body = await response.read()
    except (aiohttp.ClientError, OSError) as error:
        return f"{type(error).__name__}: {error}", None
    if response.status != 200:
        return f"HTTP {response.status}", None
    try:
        return "", json.loads(body)
    except ValueError:
        return "", None


def _is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # the port
        return False


def _counter(model: str | None) -> Any:
    if model is None:
        return estimate_tokens
    from jaxserve.loading.hub import resolve
    from jaxserve.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(model))
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer")
    return lambda text: len(tokenizer.encode(text))
