"""What is done to a running server. Each scenario returns its figures, and what went wrong in words."""

import asyncio
import json
import os
import random
import signal
import socket
import statistics
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from itertools import count
from typing import Any, NamedTuple

import h11
import httpx

from bench.robustness.cases import make_case
from bench.robustness.play import expect_answer, play
from bench.robustness.request import request
from bench.robustness.server import Target, busy


class Findings(NamedTuple):
    figures: dict[str, Any]
    wrong: list[str]
    """Empty when all held."""


class Outcome(NamedTuple):
    """How a streamed completion ended."""

    status: int
    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False
    first: float = 0.0
    """When its first token came."""

    @property
    def complete(self) -> bool:
        return self.done and self.finish_reason is not None and self.error is None

    @property
    def refused(self) -> bool:
        """It ended with a clear error."""
        return bool(self.error and self.error.get("message") and self.error.get("code"))


QUESTIONS = [f"Count to {n} and then " + "go on, " * n for n in range(12)]


async def ask(target: Target, prompt: str, max_tokens: int, begun: asyncio.Event | None = None) -> Outcome:
    """A greedy completion as a stream, read to its end."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    outcome = Outcome(0)
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port)
        with closing(writer):
            writer.write(request("/v1/completions", json.dumps(body).encode()))
            async for item in _answer(reader):
                outcome = _advance(outcome, item)
                if begun and outcome.first:
                    begun.set()
    except (OSError, h11.RemoteProtocolError) as error:
        return outcome._replace(error={"message": f"the connection broke: {error!r}"})
    finally:
        if begun:
            begun.set()
    return outcome


async def _answer(reader: asyncio.StreamReader) -> AsyncIterator[int | str]:
    """The status, then what each event holds; for an answer that is no stream, its body."""
    connection, rest, stream = expect_answer(), b"", False
    while not isinstance(event := connection.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**16))
        elif isinstance(event, h11.Response):
            yield event.status_code
            stream = event.status_code == 200
        elif isinstance(event, h11.Data):
            *events, rest = (rest + event.data).split(b"\n\n")
            for each in events:
                if each.startswith(b"data: "):
                    yield each.removeprefix(b"data: ").decode()
    if not stream:
        yield rest.decode()


def _advance(outcome: Outcome, item: int | str) -> Outcome:
    if isinstance(item, int):
        return outcome._replace(status=item)
    if item == "[DONE]":
        return outcome._replace(done=True)
    event = json.loads(item)
    if "error" in event:
        return outcome._replace(error=event["error"])
    if event["usage"]:
        outcome = outcome._replace(tokens=event["usage"]["completion_tokens"])
    for choice in event["choices"]:
        outcome = outcome._replace(
            text=outcome.text + choice["text"],
            finish_reason=choice["finish_reason"] or outcome.finish_reason,
            first=outcome.first or time.monotonic(),
        )
    return outcome


async def fuzz(
    target: Target, requests: int = 10_000, seed: int = 0, only: int | None = None, at_once: int = 16
) -> Findings:
    """Bad requests beside good ones whose answers are known."""
    wrong: list[str] = []
    kinds: dict[str, int] = {}
    good = 0
    async with target.client() as http:
        engines = target.engine_pids()
        before = target.memory()
        known = [(await ask(target, question, 8)).text for question in QUESTIONS]
        numbers = iter([only] if only is not None else range(requests))
        over = asyncio.Event()

        async def bad() -> None:
            for number in numbers:
                case = make_case(seed, number)
                kinds[case.name] = kinds.get(case.name, 0) + 1
                if problem := await play(case, target.host, target.port):
                    wrong.append(f"--seed {seed} --only {number} ({case.name}): {problem}")
                    print(wrong[-1], flush=True)

        async def fine(first: int) -> None:
            nonlocal good
            for i in count(first):
                if over.is_set():
                    return
                which = i % len(QUESTIONS)
                outcome = await ask(target, QUESTIONS[which], 8)
                good += 1
                if not outcome.complete or outcome.text != known[which]:
                    wrong.append(f"a good request beside: {outcome}, not {known[which]!r}")

        beside = [asyncio.create_task(fine(i)) for i in range(4)]
        await asyncio.gather(*(bad() for _ in range(at_once)))
        over.set()
        await asyncio.gather(*beside)
        metrics = await target.idle(http, 30.0)
    if left := busy(metrics):
        wrong.append(f"left behind: {left}")
    if target.engine_pids() != engines:
        wrong.append(f"engines {engines} became {target.engine_pids()}")
    if compiles := metrics["compiles_after_ready_total"]:
        wrong.append(f"{compiles:.0f} compilations on a request's path")
    figures = {"bad": sum(kinds.values()), "good": good, "engine pids": engines, "kinds": kinds}
    return Findings(figures | {"memory MiB": [before, target.memory()]}, wrong)


async def disconnect(target: Target, clients: int = 1000, seed: int = 0, at_once: int = 50) -> Findings:
    """Clients that go away: before their body ends, while they wait, between events, inside one."""
    moments: dict[str, int] = {}
    numbers = iter(range(clients))

    async def leave() -> None:
        for number in numbers:
            moment = await _disconnect(target, random.Random(f"{seed}/{number}"))
            moments[moment] = moments.get(moment, 0) + 1

    async with target.client() as http:
        engines = target.engine_pids()
        await asyncio.gather(*(leave() for _ in range(at_once)))
        begin = await target.metrics(http)
        end = await target.idle(http, 30.0)
    steps = int(end["steps_total"] - begin["steps_total"])
    wrong = [f"left behind: {left}"] if (left := busy(end)) else []
    if steps > 2:
        wrong.append(f"{steps} steps after the last")
    if target.engine_pids() != engines:
        wrong.append(f"engines {engines} became {target.engine_pids()}")
    figures = {"clients": clients, "moments": moments, "steps after the last": steps}
    return Findings(figures | {"steps before": int(begin["steps_total"])}, wrong)


async def _disconnect(target: Target, rng: random.Random) -> str:
    """One client; the moment at which it went."""
    fields = {"prompt": "a" * rng.randrange(1, 300), "max_tokens": 200, "ignore_eos": True}
    body = json.dumps(fields | {"stream": rng.random() < 0.8, "n": rng.choice([1, 1, 1, 3])}).encode()
    data = request("/v1/completions", body)
    reader, writer = await asyncio.open_connection(target.host, target.port)
    moment = rng.choice(["body", "at once", "later", "events", "half an event"])
    with suppress(OSError):  # the server may have answered and gone
        match moment:
            case "body":
                writer.write(data[: rng.randrange(1, len(data))])
            case "at once":
                writer.write(data)
            case "later":
                writer.write(data)
                await asyncio.sleep(rng.random() * 0.2)
            case "events" | "half an event":
                writer.write(data)
                for _ in range(rng.randrange(1, 20)):
                    await reader.readline()
                if moment == "half an event":
                    await reader.read(rng.randrange(1, 30))
        await writer.drain()
        if rng.random() < 0.5:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return moment


async def kill(target: Target, streams: int = 50, max_tokens: int = 300) -> Findings:
    """`kill -9` on an engine process under load."""
    async with target.client() as http:
        known = [(await ask(target, question, 8)).text for question in QUESTIONS]
        (engine,) = target.engine_pids()
        begun = asyncio.Event()
        load = [
            asyncio.create_task(ask(target, QUESTIONS[i % len(QUESTIONS)], max_tokens, begun))
            for i in range(streams)
        ]
        await begun.wait()
        os.kill(engine, signal.SIGKILL)
        begin = time.monotonic()
        outcomes = await asyncio.wait_for(asyncio.gather(*load), 120)
        while not (await target.ready(http) and engine not in target.engine_pids()):
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - begin
        answers = [(await ask(target, question, 8)).text for question in QUESTIONS]
        left = busy(await target.idle(http, 30.0))
    wrong = [f"{outcome}" for outcome in outcomes if not (outcome.complete or outcome.refused)]
    if answers != known:
        wrong.append(f"other answers than before: {answers}, not {known}")
    if left:
        wrong.append(f"left behind: {left}")
    complete = sum(outcome.complete for outcome in outcomes)
    errors = sorted({f"{o.error['code']}: {o.error['message']}" for o in outcomes if o.error})
    figures = {"streams": streams, "complete": complete, "errors": errors, "seconds to ready": seconds}
    return Findings(figures, wrong)


async def drain(target: Target, streams: int = 50, max_tokens: int = 300) -> Findings:
    """SIGTERM while streams run. The caller looks at the exit status."""
    begun = [asyncio.Event() for _ in range(streams)]
    load = [
        asyncio.create_task(ask(target, QUESTIONS[i % len(QUESTIONS)], max_tokens, begun[i]))
        for i in range(streams)
    ]
    await asyncio.gather(*(each.wait() for each in begun))
    running = sum(not task.done() for task in load)
    os.kill(target.pid, signal.SIGTERM)
    outcomes = await asyncio.gather(*load)
    wrong = [f"{o}" for o in outcomes if not o.complete or o.tokens != max_tokens]
    return Findings({"streams running": running, "complete": len(outcomes) - len(wrong)}, wrong)


async def overload(target: Target, slots: int, seconds: float = 60.0, max_tokens: int = 100) -> Findings:
    """Ten times as many clients as sequences can run, each asking again as soon as it is answered."""
    asked: list[tuple[float, Outcome]] = []
    until = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until:
            begin = time.monotonic()
            asked.append((begin, await ask(target, QUESTIONS[0], max_tokens)))

    async with target.client() as http:
        async with _watched(target, http) as watched:
            await asyncio.gather(*(client() for _ in range(10 * slots)))
        left = busy(await target.idle(http, 30.0))
    lost = [f"{outcome}" for _, outcome in asked if not outcome.complete or outcome.tokens != max_tokens]
    displaced = _displaced([(begin, outcome.first) for begin, outcome in asked])
    wrong = lost[:5] + ([f"left behind: {left}"] if left else []) + watched.growth()
    if displaced >= slots:
        wrong.append(f"a request was served {displaced} places from its turn, with {slots} running at once")
    figures = {"clients": 10 * slots, "requests": len(asked), "lost": len(lost)}
    return Findings(figures | {"places out of turn": displaced} | watched.figures(), wrong)


async def flood(target: Target, slots: int, seconds: float = 60.0, max_tokens: int = 400) -> Findings:
    """Requests at ten times the rate the server can answer, whatever it does; its queue is bounded."""
    outcomes: list[Outcome] = []

    async def one() -> None:
        outcomes.append(await ask(target, QUESTIONS[0], max_tokens))

    async with target.client() as http:
        await one()
        begin = time.monotonic()
        for _ in range(3):
            await asyncio.gather(*(one() for _ in range(slots)))
        rate = 10 * 3 * slots / (time.monotonic() - begin)
        outcomes.clear()
        async with _watched(target, http) as watched, asyncio.TaskGroup() as group:
            begin = time.monotonic()
            for i in range(int(rate * seconds)):
                await asyncio.sleep(begin + i / rate - time.monotonic())
                group.create_task(one())
        left = busy(await target.idle(http, 30.0))
    complete = sum(outcome.complete and outcome.tokens == max_tokens for outcome in outcomes)
    refused = sum(outcome.status == 503 and outcome.refused for outcome in outcomes)
    lost = [f"{o}" for o in outcomes if not o.complete and not (o.status == 503 and o.refused)]
    wrong = lost[:5] + ([f"left behind: {left}"] if left else []) + watched.growth()
    figures = {"a second": round(rate, 1), "requests": len(outcomes), "complete": complete}
    return Findings(figures | {"refused": refused, "lost": len(lost)} | watched.figures(), wrong)


def _displaced(times: list[tuple[float, float]]) -> int:
    """How far from its turn any request was served: (asked, first token) of each."""
    order = sorted(range(len(times)), key=lambda i: times[i][0])
    served = sorted(order, key=lambda i: times[i][1])
    turn = {request: place for place, request in enumerate(order)}
    return max(abs(place - turn[request]) for place, request in enumerate(served))


class _Watch:
    """Twice a second: the memory of both processes, and how many wait."""

    def __init__(self) -> None:
        self.memory: list[list[float]] = []
        self.waiting = 0

    async def run(self, target: Target, http: httpx.AsyncClient) -> None:
        while True:
            self.memory.append(target.memory())
            self.waiting = max(self.waiting, int((await target.metrics(http))["num_requests_waiting"]))
            await asyncio.sleep(0.5)

    def figures(self) -> dict[str, Any]:
        early, late = self._quarters()
        return {"most waiting": self.waiting, "memory MiB": {"second quarter": early, "last quarter": late}}

    def growth(self) -> list[str]:
        """Which process holds more in the last quarter of the time than in the second one. Half a minute or
        less says nothing: a process takes what it needs first."""
        pairs = zip(*self._quarters(), strict=True) if len(self.memory) > 60 else ()
        return [f"memory grew: {a} MiB, then {b}" for a, b in pairs if b > 1.05 * a + 8]

    def _quarters(self) -> tuple[list[float], list[float]]:
        """Of the time, the second and the last: each process's median."""
        quarter = max(1, len(self.memory) // 4)
        return _medians(self.memory[quarter : 2 * quarter]), _medians(self.memory[-quarter:])


def _medians(memory: list[list[float]]) -> list[float]:
    return [round(statistics.median(each), 1) for each in zip(*memory, strict=True)]


@asynccontextmanager
async def _watched(target: Target, http: httpx.AsyncClient) -> AsyncIterator[_Watch]:
    watch = _Watch()
    task = asyncio.create_task(watch.run(target, http))
    try:
        yield watch
    finally:
        task.cancel()
