"""An open-loop mix of traffic for many minutes: does the server drift, leak or fail?

    python -m bench.soak [--minutes 10] [--load 0.8] [--out DIR] [-- SERVE OPTIONS]

Starts `jaxserve serve`, measures what it can take (closed-loop, 64 clients), and sends that mix at `--load`
of it: chats and completions, streamed and not, a few shared beginnings, long-tailed lengths, all kinds of
sampling parameters, clients that leave, and bad requests, which must get a 400. Once a second it notes the
memory of each process, queue, blocks and steps. At the end it says whether memory, or the time of a step at
equal load, grew (slope and its 95% interval, the first fifth left out); exit status 1 if so, if any
request failed, or if there was too little to tell. Writes soak.json and soak.png.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import httpx
import numpy as np

from bench.processes import private_memory
from bench.robustness.server import Server, Target, busy
from jaxserve.bench.workload import arrivals, words

CLIENTS = 64
"""That measure the capacity."""
WINDOW = 10.0
"""Seconds over which samples are added up: neighbours are then nearly independent."""
FEWEST = 5
"""Windows, after the settling, without which a slope says nothing."""
SETTLING = 0.2
"""Part of the time, at the begin, in which caches and pools may still grow."""
SHORTEST = 2
"""Minutes that have enough windows, with some to spare for those without a step."""
TOLERANCE = {"memory": 0.01, "step time": 0.05}
"""Growth over the run, as a part of the mean, below which even a sure slope does not matter."""
PATIENCE = 120.0
"""Seconds until an answer that does not come counts as missing."""


PROMPTS = ("prompt", "messages")


class Sent(NamedTuple):
    """A request; its client reads all, or leaves after so many events or, of a whole answer, 1/20 seconds."""

    kind: str
    path: str
    body: dict[str, Any]
    leaves: int | None = None


def traffic(seed: int, scale: float = 1.0) -> Iterator[Sent]:
    """Requests without end, the same for the same seed; `scale` makes all of them longer or shorter."""
    rng = random.Random(seed)
    beginnings = [words(rng, round(128 * scale)) for _ in range(8)]
    while True:
        if rng.random() < 0.03:
            yield bad(rng)
            continue
        text = (rng.choice(beginnings) if rng.random() < 0.4 else "") + words(
            rng, tail(rng, 120 * scale, 600 * scale)
        )
        chat, stream = rng.random() < 0.5, rng.random() < 0.7
        path = "/v1/chat/completions" if chat else "/v1/completions"
        said = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body = said | {
            "max_tokens": tail(rng, 80 * scale, 300 * scale),
            "stream": stream,
            **sampling(rng, chat),
        }
        leaves = rng.randrange(20) if rng.random() < 0.05 else None
        yield Sent("stream" if stream else "whole", path, body, leaves)


def tail(rng: random.Random, mean: float, longest: float) -> int:
    """A length of a long-tailed mix."""
    return max(1, round(min(longest, mean * rng.lognormvariate(-0.32, 0.8))))


def sampling(rng: random.Random, chat: bool) -> dict[str, Any]:
    """A few parameters at once; most requests have some."""
    menu: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 40, "min_p": 0.05},
        {"seed": rng.randrange(2**31)},
        {"stop": [" time", "\n\n\n"]},
        {"n": 2, "temperature": 1.0},
        {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3},
        {"ignore_eos": True},
    ]
    return dict(itertools.chain.from_iterable(each.items() for each in rng.sample(menu, rng.randrange(4))))


def bad(rng: random.Random) -> Sent:
    bodies: list[dict[str, Any]] = [
        {"prompt": "Hello", "temperature": -1},
        {"prompt": "Hello", "max_tokens": "many"},
        {"prompt": "Hello", "max_tokens": 10**6},
        {"prompt": "Hello", "top_q": 0.5},
        {"prompt": [-1]},
        {},
    ]
    return Sent("bad", "/v1/completions", rng.choice(bodies))


@dataclass
class Counts:
    """What became of the requests. All that is wrong is in `wrong`, in words."""

    sent: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """When each ended, and how long it took."""


class Client:
    def __init__(self, target: Target, http: aiohttp.ClientSession):
        self._url = target.url
        self._http = http
        self.counts = Counts()

    async def send(self, request: Sent) -> None:
        self.counts.sent += 1
        begin = time.monotonic()
        early = request.leaves is not None and request.kind == "whole"
        try:
            how = await asyncio.wait_for(self._exchange(request), request.leaves / 20 if early else PATIENCE)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            how = "left" if early and isinstance(error, TimeoutError) else "wrong"
            if how == "wrong":
                told = {name: value for name, value in request.body.items() if name not in PROMPTS}
                self.counts.wrong.append(f"{request.path} {told}: {type(error).__name__} {error}")
        self.counts.ended[how] += 1
        now = time.monotonic()
        self.counts.seconds.append((now, now - begin))

    async def _exchange(self, request: Sent) -> str:
        """How it ended. Raises ValueError for an answer that is not the one owed."""
        async with self._http.post(self._url + request.path, json=request.body) as answer:
            if request.kind == "bad":
                if answer.status != 400:
                    raise ValueError(f"{answer.status}, not 400: {(await answer.text())[:200]}")
                return "refused, as it should be"
            if answer.status != 200:
                raise ValueError(f"{answer.status}: {(await answer.text())[:200]}")
            if request.kind == "whole":
                if not all(choice["finish_reason"] for choice in (await answer.json())["choices"]):
                    raise ValueError("no finish_reason")
                return "complete"
            events = 0
            async for line in answer.content:
                if line.startswith(b'data: {"error"'):
                    raise ValueError(line.decode()[:200])
                if line == b"data: [DONE]\n":
                    return "complete"
                events += line.startswith(b"data: ")
                if request.leaves is not None and events > request.leaves:
                    return "left"
            raise ValueError("the stream ended early")


class Sample(NamedTuple):
    """The server at a moment: seconds since the begin, MiB of each process, and what `/metrics` says."""

    at: float
    http: float
    engine: float
    running: float
    waiting: float
    blocks: float
    """Part of the pool in use."""
    steps: float
    step_seconds: float
    tokens: float
    """Computed; this, steps and their seconds count from the server's start."""
    generated: float


async def capacity(
    target: Target, probe: httpx.AsyncClient, client: Client, requests: Iterator[Sent], seconds: float
) -> float:
    """Requests per second: what the engine computes of tokens while `CLIENTS` clients keep it busy, by what
    a request costs."""
    begin = time.monotonic()

    async def computed() -> float:
        """An engine in a long step may not answer in time: then its metrics are missing."""
        while (tokens := (await target.metrics(probe)).get("iteration_tokens_total_sum")) is None:
            await asyncio.sleep(0.1)
        return tokens

    async def work() -> None:
        while time.monotonic() < begin + seconds:
            await client.send(next(requests))

    before = await computed()
    clients = [asyncio.create_task(work()) for _ in range(CLIENTS)]
    await asyncio.sleep(seconds / 4)
    early, since = await computed(), time.monotonic()
    await asyncio.sleep(begin + seconds - since)
    late, until = await computed(), time.monotonic()
    await asyncio.gather(*clients)
    await target.idle(probe)
    each = (await computed() - before) / client.counts.sent
    return (late - early) / (until - since) / each


async def load(client: Client, requests: Iterator[Sent], rate: float, seconds: float, seed: int) -> None:
    """Requests that come when they come, whatever became of those before."""
    begin = time.monotonic()
    tasks = set()
    for due in itertools.takewhile(lambda due: due < seconds, arrivals(rate, 1.0, seed)):
        await asyncio.sleep(begin + due - time.monotonic())
        tasks.add(task := asyncio.create_task(client.send(next(requests))))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def watch(target: Target, probe: httpx.AsyncClient, samples: list[Sample]) -> None:
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "steps_total")
    names += ("step_time_seconds_sum", "iteration_tokens_total_sum", "generation_tokens_total")
    begin = time.monotonic()
    for second in itertools.count():
        await asyncio.sleep(begin + second - time.monotonic())
        metrics = await target.metrics(probe)
        if names[0] not in metrics:  # the engine did not answer in time
            continue
        engines = sum(map(private_memory, target.engine_pids()))
        now = time.monotonic() - begin
        memory = (private_memory(target.pid) / 2**20, engines / 2**20)
        samples.append(Sample(now, *memory, *(metrics[name] for name in names)))


async def soak(target: Target, args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Figures, and what is wrong in words."""
    requests = traffic(args.seed, args.scale)
    connections = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connections) as http, target.client() as probe:
        client = Client(target, http)  # its counts are of both phases: nothing may fail in either
        most = await capacity(target, probe, client, requests, args.capacity_seconds)
        print(f"capacity {most:.2f} requests/s; soaking at {args.load * most:.2f}", flush=True)
        engines, samples = target.engine_pids(), []
        watching = asyncio.create_task(watch(target, probe, samples))
        await load(client, requests, args.load * most, args.minutes * 60, args.seed)
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        end = await target.idle(probe)
    wrong = list(client.counts.wrong)
    if left := busy(end):
        wrong.append(f"left behind: {left}")
    if target.engine_pids() != engines:
        wrong.append(f"engines {engines} became {target.engine_pids()}")
    if compiles := end["compiles_after_ready_total"]:
        wrong.append(f"{compiles:.0f} compilations on a request's path")
    drifts = drift(samples)
    wrong += [f"{each.name} grows: {each.show()}" for each in drifts if each.matters]
    figures = {
        "capacity, requests/s": most,
        "load, requests/s": args.load * most,
        "requests": dict(client.counts.ended),
        "seconds of a request, median and 99%": np.percentile(
            [s for _, s in client.counts.seconds], [50, 99]
        ).tolist(),
        "drift": [each._asdict() for each in drifts],
        "samples": [each._asdict() for each in samples],
    }
    return figures, wrong


class Drift(NamedTuple):
    """How much something grew in the run: in its unit, with the 95% interval."""

    name: str
    mean: float
    growth: float
    low: float
    high: float
    tolerance: float

    @property
    def matters(self) -> bool:
        return self.low > 0 and self.growth > self.tolerance * self.mean

    def show(self) -> str:
        return f"{self.growth:+.3g} ({self.low:+.3g} to {self.high:+.3g}) beside a mean of {self.mean:.4g}"


def drift(samples: list[Sample]) -> list[Drift]:
    """Of the memory of each process (MiB), and of a step's time (ms) less what its tokens explain.

    Nothing where there are too few windows to tell."""
    windows = summed(samples)
    windows = windows[int(SETTLING * len(windows)) :]
    if len(windows) < FEWEST:
        return []
    at = np.array([w["at"] for w in windows])
    step = np.array([w["step ms"] for w in windows])
    explained = np.array([[w["tokens per step"], w["running"]] for w in windows])
    nothing = np.empty((len(at), 0))
    found = [("step time", "step time", step, explained)]
    for process in ("http", "engine"):
        memory = np.array([w[process] for w in windows])
        found.append((f"memory of the {process} process", "memory", memory, nothing))
    return [
        Drift(name, float(values.mean()), *growth(at, values, given), TOLERANCE[kind])
        for name, kind, values, given in found
    ]


def growth(at: np.ndarray, values: np.ndarray, given: np.ndarray) -> tuple[float, float, float]:
    """What time added from first to last, by least squares beside `given`, and its 95% interval."""
    from scipy import stats

    span = at[-1] - at[0]
    columns = np.column_stack([np.ones_like(at), (at - at[0]) / span, given])
    solution, _, rank, _ = np.linalg.lstsq(columns, values, rcond=None)
    rest = values - columns @ solution
    free = len(at) - rank
    variance = rest @ rest / free * np.linalg.pinv(columns.T @ columns)[1, 1]
    half = float(stats.t.ppf(0.975, free) * np.sqrt(variance))
    return float(solution[1]), float(solution[1]) - half, float(solution[1]) + half


def summed(samples: list[Sample]) -> list[dict[str, float]]:
    """Windows of `WINDOW` seconds in which there were steps: means, and rates from the counters."""
    windows = []
    for _, group in itertools.groupby(samples, lambda sample: sample.at // WINDOW):
        first, *_, last = part = list(group) * 2
        steps = last.steps - first.steps
        if steps <= 0:
            continue
        mean = {name: float(np.mean([getattr(s, name) for s in part])) for name in Sample._fields}
        windows.append(
            mean
            | {
                "step ms": 1e3 * (last.step_seconds - first.step_seconds) / steps,
                "tokens per step": (last.tokens - first.tokens) / steps,
                "output tokens/s": (last.generated - first.generated) / (last.at - first.at),
            }
        )
    return windows


def draw(samples: list[Sample], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    windows = summed(samples)
    minutes = [w["at"] / 60 for w in windows]
    panels = [
        ("memory, MiB", ("http", "engine")),
        ("in a step", ("step ms", "tokens per step")),
        ("output tokens/s", ("output tokens/s",)),
        ("requests", ("running", "waiting")),
    ]
    figure, axes = pyplot.subplots(len(panels), sharex=True, figsize=(10, 10), layout="constrained")
    for axis, (label, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(minutes, [w[name] for w in windows], label=name, marker=".")
        axis.set(ylabel=label, ylim=(0, None))
        axis.legend()
    axes[-1].set_xlabel(f"minutes (means of {WINDOW:.0f} s)")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--load", type=float, default=0.8, help="part of the capacity")
    parser.add_argument("--capacity-seconds", type=float, default=40.0, help="in which that is measured")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--out", type=Path, default=Path("soak"), help="directory for soak.json and soak.png")
    parser.add_argument("--seed", type=int, default=0)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    for name in ("minutes", "load", "capacity_seconds", "scale"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if args.minutes < SHORTEST:
        parser.error(f"--minutes {args.minutes:g} are too few to tell whether it drifts: at least {SHORTEST}")
    args.out.mkdir(parents=True, exist_ok=True)
    server = Server(options, args.out / "server.log")
    try:
        asyncio.run(server.warm())
        figures, wrong = asyncio.run(soak(server.target, args))
        status = server.stop()
    finally:
        server.process.kill()
    if status != 0:
        wrong.append(f"the server's exit status was {status}")
    samples = [Sample(**each) for each in figures["samples"]]
    if not figures["drift"]:
        wrong.append(f"too short to tell whether it drifts: {len(summed(samples))} windows with steps")
    (args.out / "soak.json").write_text(json.dumps(figures | {"wrong": wrong}, indent=1))
    draw(samples, f"{args.minutes:g} minutes at {args.load:.0%} of the capacity", args.out / "soak.png")
    print(json.dumps({name: figures[name] for name in figures if name not in ("samples", "drift")}, indent=1))
    print(*(f"{each['name']}: {Drift(**each).show()}" for each in figures["drift"]), sep="\n")
    print(*(wrong[:20] or ["held: no errors, no drift"]), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
