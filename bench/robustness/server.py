"""The server under test: started as a user would, and watched from outside."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

PATIENCE = 300.0


class Target:
    """A server that is running: its address and its HTTP process."""

    def __init__(self, url: str, pid: int):
        self.url = url
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)
        self.pid = pid

    def client(self, **options: Any) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=PATIENCE, limits=limits, **options)

    def engine_pids(self) -> list[int]:
        """In the order of their start."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def memory(self) -> list[float]:
        """MiB that the HTTP process and each engine process hold of their own."""
        return [_private_mib(pid) for pid in (self.pid, *self.engine_pids())]

    async def metrics(self, http: httpx.AsyncClient) -> dict[str, float]:
        """Every sample of `/metrics`, added up over the replicas."""
        samples: dict[str, float] = {}
        for family in text_string_to_metric_families((await http.get("/metrics")).text):
            for sample in family.samples:
                name = sample.name.removeprefix("jaxserve:")
                samples[name] = samples.get(name, 0.0) + sample.value
        return samples

    async def idle(self, http: httpx.AsyncClient, patience: float = PATIENCE) -> dict[str, float]:
        """The metrics once nothing runs, waits or holds a block; the last ones if that never happens."""
        deadline = time.monotonic() + patience
        while busy(metrics := await self.metrics(http)) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return metrics

    async def ready(self, http: httpx.AsyncClient) -> bool:
        try:
            return (await http.get("/ready")).status_code == 200
        except httpx.TransportError:
            return False


def busy(metrics: dict[str, float]) -> dict[str, float]:
    """What of the metrics says that a request is still there."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: metrics[name] for name in names if metrics.get(name, 1.0)}


class Server:
    """`jaxserve serve` in a process of its own; its log goes to a file."""

    def __init__(self, options: Sequence[str], log: Path):
        self.log = log
        self._begin = time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxserve", "serve", "--port", "0", *options],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={"JAX_PLATFORMS": "cpu"} | os.environ,
            )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        url = next((word for word in words if word.startswith("http://")), None)
        if url is None:
            raise SystemExit(f"the server did not start:\n{log.read_text()}")
        self.seconds_to_ready = time.monotonic() - self._begin
        self.target = Target(url, self.process.pid)

    async def warm(self) -> None:
        async with self.target.client() as http:
            while (await http.get("/ready")).json()["engine"] != "warm":
                await asyncio.sleep(0.1)

    def stop(self) -> int | None:
        """The exit status after a SIGTERM; None if it had to be killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, patience: float = 60.0) -> int | None:
        try:
            return self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None


def _private_mib(pid: int) -> float:
    """Anonymous memory: the model's file and the libraries, which are mapped, grow with what is touched."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0
