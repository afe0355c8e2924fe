"""`jaxserve bench startup`: from the start of a server's process to its first token over HTTP and to warm."""

import asyncio
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from jaxserve.bench.client import Client, Endpoint
from jaxserve.bench.options import Reporting, add, needs, read
from jaxserve.bench.serve import is_warm, probe, session
from jaxserve.bench.workload import Ask
from jaxserve.cli.flags import Parser, add_options, read_options
from jaxserve.config import EngineConfig, about
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.options import describe

if TYPE_CHECKING:
    from jaxserve.bench.metrics import Samples

Caches = Literal["first", "cold", "warm"]
KEPT = {"first": {"models"}, "cold": {"models", "native"}}
"""What is left in jaxserve's directory before such a start; before a warm one everything is."""
POLL_SECONDS = 0.02
WARM_POLL_SECONDS = 0.2
END_SECONDS = 30
QUESTION = Ask("What is the capital of France?", 7, 8)


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    caches: Annotated[
        list[Caches] | None,
        about("what a start finds: first: the model; cold: the C++ kernels too; warm: all (cold warm)"),
    ] = None
    rounds: Annotated[int, about("how often each is started, in turn")] = 3
    command: Annotated[
        str | None, about("start this server instead: {port} in it is replaced, {cache} by a directory")
    ] = None
    request_model: Annotated[str | None, about("which of its models is asked; by default the first")] = None
    endpoint: Annotated[Endpoint, about("what is asked")] = "chat"
    ready_path: Annotated[
        str | None, about("answers with 200 when the server is ready (jaxserve: /ready, others: /v1/models)")
    ] = None
    timeout: Annotated[float, about("seconds that a start may take")] = 600.0

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, not {self.rounds}")
        if not 0 < self.timeout < float("inf"):
            raise ConfigError(f"timeout must be above 0, not {self.timeout}")
        if self.command is not None and "{port}" not in self.command:
            raise ConfigError("command must have its {port}")
        if self.command is not None:
            try:
                shlex.split(self.command)
            except ValueError as error:
                raise ConfigError(f"command cannot be read: {error}") from None
        if self.command is not None and self.caches:
            if "{cache}" not in self.command:
                raise ConfigError("caches of another command need a {cache} in it")
            if "first" in self.caches:
                raise ConfigError("caches of another command are cold or warm")

    @property
    def starts(self) -> list[Caches | None]:
        """What to measure in a round, in the order in which one leaves its caches to the next."""
        if self.command is not None and "{cache}" not in self.command:
            return [None]
        order: tuple[Caches, ...] = ("first", "cold", "warm")
        return [caches for caches in order if caches in (self.caches or ("cold", "warm"))]


def parser() -> Parser:
    parser = Parser(
        prog="jaxserve bench startup",
        usage="jaxserve bench startup [MODEL] [OPTIONS]",
        description="Time starts of a server, jaxserve by default: until it is ready, until its first token\n"
        "over HTTP, and until every program is compiled.",
    )
    add(parser, Options, Reporting)
    add_options(parser, EngineConfig)
    return parser


def run(args: Namespace) -> int:
    options, reporting = read(args, Options), read(args, Reporting)
    config = read_options(args, EngineConfig)
    flags = as_flags(config)
    if options.command is not None and flags:
        raise ConfigError(f"{flags[0]} has no meaning with a command: write it into the command")
    needs("aiohttp")
    reporting.check()
    import aiohttp  # noqa: F401  # now: in a start the time of it would count

    from jaxserve.bench import metrics, report, results

    kept = msgspec.structs.asdict(options) | {"engine": msgspec.structs.asdict(config)}
    result = results.new_result("startup", reporting.label or options.command or config.model, kept)
    with tempfile.TemporaryDirectory() as place:
        server = _Server(options, config, flags, Path(place))
        server.prepare()
        for turn in range(options.rounds):
            for caches in options.starts:
                begin = time.perf_counter()
                samples = server.start(caches)
                done = results.Run(
                    setting={"caches": caches} if caches else {},
                    round=turn,
                    duration=time.perf_counter() - begin,
                    summary=metrics.summarise(samples),
                    samples=samples,
                )
                result.runs.append(done)
    print(report.show_ranges(result, ("ready_s", "first_token_s", "warm_s")))
    reporting.finish(result)
    return 0


def as_flags(config: EngineConfig) -> list[str]:
    """The command line that gives these options: those that are not the default."""
    flags = []
    for option in describe(EngineConfig).values():
        value, flag = getattr(config, option.name), option.name.replace("_", "-")
        if value == option.default:
            continue
        if option.type is bool:
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


class _Server:
    """What is started, and the directory that its caches are in."""

    def __init__(self, options: Options, config: EngineConfig, flags: list[str], place: Path):
        self._options = options
        self._model = config.model
        self._place = place
        self._ours = options.command is None
        ours = [sys.executable, "-m", "jaxserve", "serve", "--port", "{port}", *flags]
        self._command = ours if self._ours else shlex.split(options.command or "")
        self._ready_path = options.ready_path or ("/ready" if self._ours else "/v1/models")

    def prepare(self) -> None:
        """Fetch the model, and have what the first start is meant to find."""
        if not self._ours:
            if self._options.starts == ["warm"]:
                self.start("cold")
            return
        from jaxserve.home import home
        from jaxserve.loading.hub import resolve

        resolve(self._model)
        (self._place / "models").symlink_to(home().resolve() / "models")
        wanted, native = self._options.starts[0], home() / "native"
        if wanted != "first" and native.is_dir():
            shutil.copytree(native, self._place / "native")
        if wanted == "warm" or (wanted == "cold" and not native.is_dir()):
            self.start(None)

    def start(self, caches: Caches | None) -> "Samples":
        """One life of the server: seconds from its start until each event."""
        kept = (KEPT if self._ours else {"cold": set()}).get(caches or "", None)
        for path in self._place.iterdir() if kept is not None else ():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        port = _free_port()
        command = [
            part.replace("{port}", str(port)).replace("{cache}", str(self._place)) for part in self._command
        ]
        env = os.environ | ({"JAXSERVE_HOME": str(self._place)} if self._ours else {})
        with tempfile.TemporaryFile() as log, _process(command, env, log) as (process, begin):
            try:
                return asyncio.run(self._watch(f"http://127.0.0.1:{port}", process, begin))
            except JaxserveError as error:
                log.seek(0)
                said = log.read()[-500:].decode(errors="replace").strip()
                raise JaxserveError(f"{error}; its last words: {said}") from None

    async def _watch(self, base: str, process: "subprocess.Popen[bytes]", begin: float) -> "Samples":
        deadline = begin + self._options.timeout
        async with session(None, self._options.timeout) as http:

            async def wait(what: str, path: str, pause: float, enough: Any) -> float:
                while True:
                    problem, answer = await probe(http, base + path)
                    if not problem and enough(answer):
                        return time.perf_counter() - begin
                    if process.poll() is not None:
                        raise JaxserveError(f"the server ended with status {process.returncode}")
                    if time.perf_counter() > deadline:
                        raise JaxserveError(f"the server was not {what} in time: {problem}")
                    await asyncio.sleep(pause)

            samples = {"ready_s": [await wait("ready", self._ready_path, POLL_SECONDS, lambda _: True)]}
            _, models = await probe(http, f"{base}/v1/models")
            listed = models.get("data") if isinstance(models, dict) else None
            model = self._options.request_model or (listed[0]["id"] if listed else "default")
            client = Client(http, base, self._options.endpoint, model, {"temperature": 0})
            while (record := await client.send(QUESTION, begin)).error or not record.times:
                if record.error != "HTTP 503" or time.perf_counter() > deadline:
                    raise JaxserveError(f"the first request failed: {record.error} {record.detail}")
                await asyncio.sleep(POLL_SECONDS)
            samples["first_token_s"] = [record.start + record.times[0]]
            _, state = await probe(http, f"{base}/ready")
            if isinstance(state, dict) and "engine" in state:  # it says more than yes
                samples["warm_s"] = [await wait("warm", "/ready", WARM_POLL_SECONDS, is_warm)]
            return samples


@contextmanager
def _process(
    command: list[str], env: dict[str, str], log: Any
) -> "Iterator[tuple[subprocess.Popen[bytes], float]]":
    """A command under way and when it began; at the end it is ended, with all that it started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # this ends it too
    begin = time.perf_counter()
    try:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    except OSError as error:
        raise JaxserveError(f"cannot start {command[0]}: {error.strerror}") from None
    try:
        yield process, begin
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
