"""The loop around one core: take what came, step, hand out what it gave."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

from jaxserve.engine.messages import (
    Abort,
    CoreOutput,
    CoreRequest,
    FromCore,
    Hello,
    Outputs,
    ResetPrefixCache,
    Shutdown,
    Stats,
    StatsRequest,
    Status,
    ToCore,
)

HEARTBEAT_SECONDS = 1.0


class Core(Protocol):
    """What the loop needs of `EngineCore`."""

    hello: Hello
    steps: int

    @property
    def state(self) -> Literal["ready", "warm"]: ...
    def add(self, request: CoreRequest) -> None: ...
    def abort(self, id: str, keep: int | None = None) -> None: ...
    def step(self) -> list[CoreOutput]: ...
    def has_unfinished(self) -> bool: ...
    def stats(self) -> dict[str, Any]: ...
    def reset_prefix_cache(self) -> None: ...
    def close(self) -> None: ...


class CoreLoop:
    """Runs one core until `Shutdown`. `send` and `emit` may be called from any thread.

    `make_core` loads the model, in the thread that calls `run`; `emit` gets every message from the core.
    """

    def __init__(self, make_core: Callable[[], Core], emit: Callable[[FromCore], None]):
        self._make_core = make_core
        self._emit = emit
        self._inbox: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
        self._core: Core | None = None
        self._ended = threading.Event()

    def send(self, message: ToCore) -> None:
        self._inbox.put(message)

    def run(self) -> None:
        """Load, then serve. Raises what the core raises."""
        self._emit(self._status())
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()
        try:
            core = self._make_core()
            self._emit(core.hello)
            self._core = core
            self._emit(self._status())
            while self._receive(core):
                if outputs := core.step():
                    self._emit(Outputs(outputs))
        finally:
            self._ended.set()
            if self._core:
                self._core.close()

    def _receive(self, core: Core) -> bool:
        """Hand the core all that is waiting; sleep while it has nothing to do. False: time to end."""
        while True:
            try:
                message = self._inbox.get(block=not core.has_unfinished())
            except queue.Empty:
                return True
            match message:
                case CoreRequest():
                    core.add(message)
                case Abort():
                    core.abort(message.id, message.keep)
                case StatsRequest():
                    self._emit(Stats(core.stats()))
                case ResetPrefixCache():
                    core.reset_prefix_cache()
                case Shutdown():
                    return False

    def _heartbeat(self) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            while not self._ended.wait(HEARTBEAT_SECONDS):
                self._emit(self._status())

    def _status(self) -> Status:
        core = self._core
        return Status(state=core.state, steps=core.steps) if core else Status(state="loading")
