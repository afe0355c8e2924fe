"""What HTTP costs: the same work through `Engine.generate` and through streaming HTTP clients, in turn.

    python -m bench.streams [--clients 64] [--input 192] [--output 128] [--rounds 3] [--profile DIR]

The engine that generates and the server are processes of their own, both warm, one at work at a time. The
clients share one thread here that reads and counts events and nothing more. They take processor time of the
machine all the same: "less the client" leaves out what their time would be, spread over all cores.

Prints output tokens per second, and the processor time that each process took for a token: of the engine's
main thread, which is the host's part of a step, and of the HTTP process. `--profile` records both processes
with py-spy while the last round runs.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from bench.processes import cpu_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--input", type=int, default=192)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", type=Path, metavar="DIR", help="where py-spy's records go")
    parser.add_argument("--generate", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.generate:
        generate(json.loads(args.generate))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    tokens = args.clients * (args.input + args.output + 64)
    options = {"max_num_seqs": args.clients, "enable_prefix_caching": False, "num_blocks": tokens // 16}
    server, offline = Server(options), Offline(options)
    rows: dict[str, list[float]] = {}
    try:
        for turn in range(args.rounds + 1):
            work = make_work(args, turn)
            if args.profile and turn == args.rounds:
                server.record(args.profile)
            direct = offline.run(work)
            seen = server.run(work)
            if turn:  # the first finds cold caches
                for name, value in report(work, direct, seen).items():
                    rows.setdefault(name, []).append(value)
    finally:
        server.close()
        offline.close()
    print(f"{args.clients} sequences, {args.input} tokens in, {args.output} out, greedy; median (min-max)\n")
    for name, values in rows.items():
        digits = 3 if "ratio" in name else 1
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:48} {middle:8.{digits}f} ({low:.{digits}f}-{high:.{digits}f})")


def report(work: dict[str, Any], direct: dict[str, float], seen: dict[str, float]) -> dict[str, float]:
    tokens = len(work["bodies"]) * work["output"]
    http, alone = tokens / seen["seconds"], tokens / direct["seconds"]
    without = tokens / (seen["seconds"] - seen["client"] / (os.cpu_count() or 1))
    per_token = 1e6 / tokens
    return {
        "Engine.generate, output tokens/s": alone,
        "HTTP, output tokens/s": http,
        "HTTP less the client, output tokens/s": without,
        "ratio HTTP / Engine.generate": http / alone,
        "ratio less the client": without / alone,
        "Engine.generate: main thread, us per token": direct["main"] * per_token,
        "engine process: main thread, us per token": seen["main"] * per_token,
        "engine process: all threads, us per token": seen["engine"] * per_token,
        "Engine.generate: all threads, us per token": direct["all"] * per_token,
        "HTTP process, us per token": seen["http"] * per_token,
        "client, us per token": seen["client"] * per_token,
        "last first token after, ms": seen["first"] * 1e3,
        **{
            f"{side}, {name}": figures[key] * scale
            for side, figures in (("Engine.generate", direct), ("HTTP", seen))
            for name, key, scale in (("steps", "steps", 1), ("device idle, ms", "idle", 1e3))
        },
    }


def make_work(args: argparse.Namespace, turn: int) -> dict[str, Any]:
    """Prompts that no round has seen before, and the request bodies for them."""
    chance = random.Random(turn)
    prompts = [[chance.randrange(1000, 40000) for _ in range(args.input)] for _ in range(args.clients)]
    shared = {"max_tokens": args.output, "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [shared | {"prompt": prompt} for prompt in prompts]
    return {"bodies": bodies, "prompts": prompts, "output": args.output}


class Server:
    """`jaxserve serve`, warm."""

    def __init__(self, options: dict[str, Any]):
        flags = []
        for name, value in options.items():
            flag = name.replace("_", "-")
            flags += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jaxserve", "serve", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            text=True,
        )
        words = self._process.stdout.readline().split()
        self._url = next(word for word in words if word.startswith("http://"))
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._engine = int(children[0])
        self._recorders: list[subprocess.Popen] = []
        while self._get("/ready")["engine"] != "warm":
            time.sleep(0.5)

    def run(self, work: dict[str, Any]) -> dict[str, float]:
        before = self._times()
        seconds, client, first = asyncio.run(stream_all(self._url, work))
        taken = {name: after - before[name] for name, after in self._times().items()}
        return taken | {"seconds": seconds, "client": client, "first": first}

    def record(self, place: Path) -> None:
        """Both processes with py-spy, until `close`."""
        spy = shutil.which("py-spy") or sys.exit("--profile needs py-spy")
        place.mkdir(parents=True, exist_ok=True)
        for name, pid in (("http", self._process.pid), ("engine", self._engine)):
            command = [
                spy,
                "record",
                "-p",
                str(pid),
                "-f",
                "raw",
                "-o",
                str(place / f"{name}.txt"),
                "-r",
                "200",
            ]
            self._recorders.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        time.sleep(2)

    def close(self) -> None:
        for recorder in self._recorders:
            recorder.send_signal(signal.SIGINT)
            recorder.wait()
        self._process.terminate()
        self._process.wait()

    def _times(self) -> dict[str, float]:
        """Seconds of processor time so far."""
        return {
            "http": cpu_seconds(self._process.pid),
            "engine": cpu_seconds(self._engine),
            "main": cpu_seconds(self._engine, thread=self._engine),
            "steps": self._metric("steps_total"),
            "idle": self._metric("device_idle_seconds_total"),
        }

    def _metric(self, name: str) -> float:
        with urllib.request.urlopen(self._url + "/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"jaxserve:{name}{{"))

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url + path) as answer:
            return json.load(answer)


async def stream_all(url: str, work: dict[str, Any]) -> tuple[float, float, float]:
    """Send all requests at once and read every stream to its end.

    Seconds, processor seconds of this thread, and seconds until every stream has begun.
    """
    host, _, port = url.removeprefix("http://").rpartition(":")
    loop = asyncio.get_running_loop()
    clients = []
    for body in work["bodies"]:
        _, client = await loop.create_connection(Client, host, int(port))
        clients.append((client, json.dumps(body).encode()))
    spent, begin = time.thread_time(), time.perf_counter()
    for client, body in clients:
        client.send(host, body)
    await asyncio.gather(*(client.done for client, _ in clients))
    seconds, spent = time.perf_counter() - begin, time.thread_time() - spent
    for client, _ in clients:
        assert client.good, client.tail
    return seconds, spent, max(client.first for client, _ in clients) - begin


class Client(asyncio.Protocol):
    """One stream: what comes is looked at for its end only."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.done = asyncio.get_running_loop().create_future()
        self.first = 0.0
        self.good = False
        self.tail = b""

    def send(self, host: str, body: bytes) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        self._transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        self.first = self.first or time.perf_counter()
        self.tail = (self.tail + data)[-64:]
        if b"[DONE]" in self.tail or (data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200")):
            self.good = b"[DONE]" in self.tail
            self._transport.close()
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


class Offline:
    """`Engine.generate` in a process of its own: a line of JSON in, one out."""

    def __init__(self, options: dict[str, Any]):
        command = [sys.executable, "-m", "bench.streams", "--generate", json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._process.stdout.readline()

    def run(self, work: dict[str, Any]) -> dict[str, float]:
        self._process.stdin.write(json.dumps({"prompts": work["prompts"], "output": work["output"]}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def generate(options: dict[str, Any]) -> None:
    from jaxserve import Engine, SamplingParams

    engine = Engine(**options)
    engine.wait_until_warm()
    print("ready", flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        params = SamplingParams(temperature=0.0, max_tokens=work["output"], ignore_eos=True)
        before = engine.stats()
        spent, main, begin = time.process_time(), time.thread_time(), time.perf_counter()
        engine.generate(work["prompts"], params, use_progress=False)
        seconds = time.perf_counter() - begin
        taken = {"seconds": seconds, "all": time.process_time() - spent, "main": time.thread_time() - main}
        after = engine.stats()
        for name, key in (("steps", "steps"), ("idle", "device_idle_seconds")):
            taken[name] = after[key] - before[key]
        print(json.dumps(taken), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
