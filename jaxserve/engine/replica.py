"""Where a core runs: in a thread of this process, or in an engine process that is kept alive.

Both say the same things to `deliver`, on any thread: every message from the core, and `Died` when it ended.
"""

import asyncio
import atexit
import contextlib
import logging
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from jaxserve.config import EngineConfig
from jaxserve.engine.core_loop import Core, CoreLoop
from jaxserve.engine.messages import FromCore, Shutdown, Status, ToCore
from jaxserve.engine.process import LENGTH, encode_frame, reason_of
from jaxserve.errors import JaxserveError

log = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3
BACKOFF_SECONDS = 0.5
CLOSE_SECONDS = 5.0


class Died(msgspec.Struct):
    """The core ended, and everything in it is lost."""

    reason: str
    for_good: bool
    """It will not be started again."""


Deliver = Callable[[FromCore | Died], None]


class Replica(Protocol):
    """One core, wherever it runs."""

    def start(self, config: EngineConfig, deliver: Deliver) -> None: ...
    def send(self, message: ToCore) -> None: ...
    def kill(self, reason: str) -> None: ...
    async def close(self) -> None: ...


class ThreadReplica:
    """A core in a thread of this process: no copies, no supervision."""

    def __init__(self, replica: int = 0, factory: Callable[..., Core] | None = None):
        self._replica = replica
        self._factory = factory
        self._thread: threading.Thread | None = None

    def start(self, config: EngineConfig, deliver: Deliver) -> None:
        factory = self._factory
        if factory is None:
            from jaxserve.engine.core import EngineCore

            factory = EngineCore
        self._deliver = deliver
        self._loop = CoreLoop(partial(factory, config, replica=self._replica), deliver)
        self._thread = threading.Thread(target=self._run, name=f"engine-{self._replica}", daemon=True)
        self._thread.start()
        atexit.register(self._stop)  # a thread cut off inside the runtime would abort the process

    def send(self, message: ToCore) -> None:
        self._loop.send(message)

    def kill(self, reason: str) -> None:
        """A thread cannot be ended: it is given up."""
        self._deliver(Died(reason, for_good=True))

    async def close(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._stop)
            atexit.unregister(self._stop)

    def _stop(self) -> None:
        assert self._thread is not None
        self._loop.send(Shutdown())
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run()
        except Exception as error:
            if not isinstance(error, JaxserveError):
                log.exception("the engine failed")
            self._deliver(Died(reason_of(error), for_good=True))


class ProcessReplica:
    """A core in a process of its own, started again when it dies.

    It gives up after `MAX_FAILED_STARTS` starts in a row that never got ready, and at once when loading
    failed with a reason (a broken model, an option that does not fit): that would only fail again.
    """

    def __init__(
        self,
        replica: int = 0,
        log_level: str = "info",
        command: Sequence[str] = ("-m", "jaxserve.engine.process"),
    ):
        self._replica = replica
        self._log_level = log_level
        self._command = command
        self._supervisor: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._killed = ""
        """Why it was killed."""
        self._was_ready = False
        self._serving = False
        self._closing = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, config: EngineConfig, deliver: Deliver) -> None:
        self._options = msgspec.json.encode(config).decode()
        self._deliver = deliver
        self._supervisor = asyncio.create_task(self._supervise())

    def send(self, message: ToCore) -> None:
        """To a process that is gone: nothing, and `Died` follows; uvloop would raise."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    def kill(self, reason: str) -> None:
        """End the process, stuck or stopped as it may be; it is started again."""
        if self._process is not None and self._writer is not None:
            self._killed = reason
            _kill(self._process)
            self._writer.close()  # its own end of the socket stays open while the system holds it

    async def close(self) -> None:
        self._closing = True
        if self._supervisor is None:
            return
        if self._serving:  # else it is loading, and would not listen
            self.send(Shutdown())
            await asyncio.wait({self._supervisor}, timeout=CLOSE_SECONDS)
        self._supervisor.cancel()
        await asyncio.gather(self._supervisor, return_exceptions=True)

    async def _supervise(self) -> None:
        failed_starts = 0
        while True:
            self._killed, self._was_ready = "", False
            try:
                died = await self._run_once()
            except Exception as error:  # too little memory, perhaps, which may pass
                died = Died(f"the engine process cannot be run: {reason_of(error)}", for_good=False)
            if self._closing:
                return
            failed_starts = 0 if self._was_ready else failed_starts + 1
            died.for_good |= failed_starts >= MAX_FAILED_STARTS
            self._deliver(died)
            if died.for_good:
                return
            log.error("%s; it is started again", died.reason)
            await asyncio.sleep(BACKOFF_SECONDS * 2**failed_starts)

    async def _run_once(self) -> Died:
        """One life of the process, and how it ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._command,
                str(theirs.fileno()),
                str(self._replica),
                self._log_level,
                self._options,
                pass_fds=[theirs.fileno()],
            )
        told = ""
        try:
            reader, self._writer = await asyncio.open_unix_connection(sock=ours)
            async for message in _messages(reader):
                if isinstance(message, Status):
                    self._serving = message.state in ("ready", "warm")
                    self._was_ready |= self._serving
                    told = message.message
                self._deliver(message)
            if not self._killed and not await _ended(process):
                self.kill("the engine process closed its socket without ending")
        finally:
            self._serving = False
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            _kill(process)
            ended = await _ended(process)
        reason = self._killed or told or f"the engine process ended with status {process.returncode}"
        if not ended:
            return Died(f"{reason}; its process {process.pid} cannot be killed", for_good=True)
        return Died(reason, for_good=bool(told) and not self._was_ready)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def _ended(process: asyncio.subprocess.Process) -> bool:
    """Whether it ends within `CLOSE_SECONDS`."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), CLOSE_SECONDS)
    return process.returncode is not None


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[FromCore]:
    decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        while True:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            yield decoder.decode(await reader.readexactly(length))
