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
        if self._writer is not None:
            self._writer.write(encode_frame(message))

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
            try:
                was_ready, reason = await self._run_once()
                told_why = bool(reason) and not was_ready
            except OSError as error:  # too little memory, perhaps, which may pass
                was_ready, told_why, reason = False, False, f"cannot start the engine process: {error}"
            if self._closing:
                return
            failed_starts = 0 if was_ready else failed_starts + 1
            for_good = told_why or failed_starts >= MAX_FAILED_STARTS
            if not reason:
                assert self._process is not None
                reason = f"the engine process ended with status {self._process.returncode}"
            self._deliver(Died(reason, for_good))
            if for_good:
                return
            log.error("%s; it is started again", reason)
            await asyncio.sleep(BACKOFF_SECONDS * 2**failed_starts)

    async def _run_once(self) -> tuple[bool, str]:
        """One life of the process: whether it ever got ready, and the reason it gave for its end."""
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
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        was_ready, reason = False, ""
        try:
            async for message in _messages(reader):
                if isinstance(message, Status):
                    self._serving = message.state in ("ready", "warm")
                    was_ready |= self._serving
                    reason = message.message
                self._deliver(message)
            await asyncio.wait_for(process.wait(), CLOSE_SECONDS)
        except TimeoutError:
            reason = "the engine process closed its socket without ending"
        finally:
            self._serving = False
            self._writer.close()
            self._writer = None
            if process.returncode is None:
                process.kill()
                await process.wait()
        return was_ready, reason


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[FromCore]:
    decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
    with contextlib.suppress(asyncio.IncompleteReadError, OSError):
        while True:
            (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            yield decoder.decode(await reader.readexactly(length))
