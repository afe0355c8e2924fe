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
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np

from bench.processes import private_memory
from bench.robustness.server import Server, Target, busy
from bench.soak.drift import Drift, Sample, draw, drift, summed
from bench.soak.traffic import Client, Sent, traffic
from jaxserve.bench.workload import arrivals

CLIENTS = 64
"""That measure the capacity."""
SHORTEST = 2
"""Minutes that have enough windows, with some to spare for those without a step."""


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
