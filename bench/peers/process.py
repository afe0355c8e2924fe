"""A peer that runs, in a process of its own: asked in Python through `worker.py`, or over HTTP."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers.catalogue import Peer, free_port
from bench.processes import PeakMemory, cpu_seconds, tree

WORKER = Path(__file__).with_name("worker.py")
ENDING = 20.0
"""Seconds in which a peer that is done may end by itself."""


BUSY = 0.25
"""Part of a core that an idle peer may take: vLLM takes a sixth."""
QUIET = 2.0
LONGEST_SETTLING = 180.0
"""Seconds."""


class PeerFailed(Exception):
    """A peer did not start, ended, or gave something other than what was asked for."""


class Work(NamedTuple):
    """So many sequences at once, of so many tokens in and out."""

    sequences: int
    input: int
    output: int
    seed: int


class Running(ABC):
    """A peer from the start of its process on. What it and its libraries say goes to the file `log`."""

    answers = True
    """On its standard output, and ends with its standard input; or it is a server, which a signal ends."""

    def __init__(self, peer: Peer, command: Sequence[str], variables: Mapping[str, str], log: Path):
        self._log = log
        self._begin = time.perf_counter()
        try:
            with log.open("ab") as file:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if self.answers else file,
                    stderr=file,
                    env={**os.environ, **peer.variables, **variables},
                    start_new_session=True,
                )
        except OSError as error:
            raise PeerFailed(f"it does not start: {error}") from None
        self._memory = PeakMemory(self._process.pid)

    def first_token(self) -> float:
        """Seconds from the start of the process to its first token. Raises PeerFailed."""
        self._ask_first()
        return time.perf_counter() - self._begin

    @abstractmethod
    def _ask_first(self) -> None: ...

    def settle(self) -> None:
        """Wait until nothing goes on in the background: it has taken little processor time for a while."""
        end = time.monotonic() + LONGEST_SETTLING
        while time.monotonic() < end:
            before = self.cpu_seconds()
            time.sleep(QUIET)
            if self.cpu_seconds() - before < QUIET * BUSY:
                return

    @abstractmethod
    def measure(self, work: Work) -> dict[str, float]:
        """Metrics of `report.METRICS`. Raises PeerFailed."""

    def cpu_seconds(self) -> float:
        """Processor time so far, of all its processes."""
        return sum(map(cpu_seconds, tree(self._process.pid)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Its processes are stopped, of which some are never idle."""
        stopped = tree(self._process.pid)
        try:
            _signal(stopped, signal.SIGSTOP)
            yield
        finally:
            _signal(stopped, signal.SIGCONT)

    def stop(self) -> int:
        """End it; the most memory that all its processes took together, in bytes."""
        peak = self._memory.stop()
        with suppress(BrokenPipeError):  # of one that died with something unread
            self._process.stdin.close()
        if not self.answers:
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and whatever it left behind
        self._process.wait()
        return peak

    def _failed(self, what: str) -> PeerFailed:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return PeerFailed(f"{what}: {lines[-1][:200] if lines else 'it said nothing'} (see {self._log.name})")


def _signal(pids: list[int], which: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, which)


class InPython(Running):
    """Whole prompts in, whole outputs back, as tokens."""

    def __init__(self, peer: Peer, sequences: int, variables: Mapping[str, str], log: Path):
        options = json.dumps(peer.options(sequences))
        # -P: what stands beside worker.py is not for a peer to import
        super().__init__(peer, [str(peer.python), "-P", str(WORKER), peer.name, options], variables, log)

    def _ask_first(self) -> None:
        self._generate([[5] * 16], 1)

    def settle(self) -> None:
        self._tell({"settle": True})
        super().settle()

    def measure(self, work: Work) -> dict[str, float]:
        chance = random.Random(work.seed)
        prompts = [[chance.randrange(1000, 40000) for _ in range(work.input)] for _ in range(work.sequences)]
        self._generate(prompts, 2)  # some make their buffers and kernels for a size when they first see it
        first, whole = self._generate(prompts, 1), self._generate(prompts, work.output)
        return {
            "output": work.sequences * work.output / whole,
            "prefill": work.sequences * work.input / first,
            "first": first * 1e3,
        }

    def _generate(self, prompts: list[list[int]], output: int) -> float:
        answer = self._tell({"prompts": prompts, "output": output})
        if answer["lengths"] != [output] * len(prompts):
            raise PeerFailed(f"asked for {output} tokens each, it made {answer['lengths']}")
        return float(answer["seconds"])

    def _tell(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("it ended") from None
        if not (line := self._process.stdout.readline()):
            raise self._failed("it ended")
        return json.loads(line)


class OverHTTP(Running):
    """Its own server; `jaxserve bench serve` is the client, whose processor time is the same machine's."""

    answers = False

    def __init__(self, peer: Peer, sequences: int, variables: Mapping[str, str], log: Path):
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._result = log.with_suffix(".json")
        super().__init__(peer, peer.server(port, sequences), variables, log)

    def _ask_first(self) -> None:
        while True:
            try:
                model = self._get("/v1/models")["data"][0]["id"]
                self._get("/v1/completions", {"model": model, "prompt": [5] * 16, "max_tokens": 1})
                return
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise PeerFailed(f"it refuses the first request: {error.read()[:200]!r}") from None
            except (OSError, LookupError):  # not yet: it does not listen, or answers 503
                if self._process.poll() is not None:
                    raise self._failed("its server ended") from None
                time.sleep(0.02)

    def measure(self, work: Work) -> dict[str, float]:
        self._load(work, 2)  # some make their buffers and kernels for a size when they first see it
        whole, first = self._load(work, work.output), self._load(work, 1)
        return {
            "output": whole["output_throughput"],
            "prefill": first["input_throughput"],
            "first": whole["ttft_ms"]["p50"],
            "between": whole["tpot_ms"]["p50"],
            "client": whole["client_cpu_s"],
        }

    def _load(self, work: Work, output: int) -> dict[str, Any]:
        client = [sys.executable, "-m", "jaxserve", "bench", "serve", "--base-url", self._url]
        client += ["--max-concurrency", str(work.sequences), "--num-prompts", str(max(4, 2 * work.sequences))]
        client += ["--input-len", str(work.input), "--output-len", str(output), "--ignore-eos"]
        client += ["--seed", str(work.seed), "--output", str(self._result)]
        done = subprocess.run(client, capture_output=True, text=True)
        if done.returncode:
            raise self._failed(f"the client failed ({done.stderr.strip()[-200:]})")
        (run,) = json.loads(self._result.read_text())["runs"]
        if run["counts"]["failed"]:
            raise PeerFailed(f"{run['counts']['failed']} requests failed: {run['counts']['errors']}")
        return run["summary"]

    def _get(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
