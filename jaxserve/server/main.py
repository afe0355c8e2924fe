"""The life of a server: listen, load, serve, drain, end."""

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import uvloop

from jaxserve.config import ServerConfig, parse_mesh
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.replica import ProcessReplica, Replica
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    import uvicorn

    from jaxserve.server.state import ServerState

log = logging.getLogger(__name__)

MAX_FILES = 65535


def run(config: ServerConfig, replicas: Sequence[Replica] | None = None) -> int:
    """Serve until a signal; the exit status. `replicas`: engine processes, if not the usual ones."""
    logging.basicConfig(
        level=config.log_level.upper(), format="%(asctime)s %(levelname)s server %(name)s: %(message)s"
    )
    if replicas is None:
        replicas = [ProcessReplica(i, config.log_level) for i in range(parse_mesh(config.mesh).data)]
    engine = AsyncEngine(
        config,
        replicas=replicas,
        chat_template=config.chat_template,
        stall_timeout=config.stall_timeout,
        retry_on_restart=config.retry_on_restart,
    )
    _allow_many_connections()
    try:
        listener = _listen(config.host, config.port)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        return _fail(f"cannot listen on {config.host}:{config.port}: {reason}")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, engine, listener))
    except JaxserveError as error:
        return _fail(str(error))


async def _serve(config: ServerConfig, engine: AsyncEngine, listener: socket.socket) -> int:
    stop = _stop_on_signal()
    stopped = asyncio.create_task(stop.wait())
    failed = asyncio.create_task(_watch(config, engine, _place(listener)))
    # a thread's work, so that the engine's process has begun before the HTTP side is imported
    web, state = await asyncio.to_thread(_make_web, config, engine)
    serving = asyncio.create_task(web.serve(sockets=[listener]))
    await asyncio.wait({failed, stopped, serving}, return_when=asyncio.FIRST_COMPLETED)
    status = 0
    if stopped.done():
        await _drain(state, config.shutdown_timeout)
    elif failed.done():
        status = _fail(failed.result())
    else:
        error = serving.exception()
        status = _fail(f"the HTTP server ended by itself{f': {error!r}' if error else ''}")
    failed.cancel()
    stopped.cancel()
    await engine.close("the server is shutting down")
    web.should_exit = True
    await asyncio.wait({serving})
    return status


def _make_web(config: ServerConfig, engine: AsyncEngine) -> "tuple[uvicorn.Server, ServerState]":
    from jaxserve.server.state import ServerState
    from jaxserve.server.web import make_server

    state = ServerState(config, engine)
    return make_server(config, state), state


async def _watch(config: ServerConfig, engine: AsyncEngine, place: str) -> str:
    """Say when it serves; return why it never will (again)."""
    try:
        await engine.start()
    except JaxserveError as error:
        return str(error)
    gc.collect()
    gc.freeze()  # what was imported and loaded stays, and is not looked at again
    names = ", ".join(config.served_model_name or [config.model])
    print(f"jaxserve listens on {place} and serves {names} ({engine.max_model_len} tokens)", flush=True)
    return await engine.failed()


async def _drain(state: "ServerState", timeout: float) -> None:
    """Let nobody in, and wait for those inside."""
    state.draining = True
    clock = asyncio.get_running_loop().time
    deadline = clock() + timeout
    if state.in_flight:
        log.info("shutting down when %d running requests end, or in %.0f s", state.in_flight, timeout)
    while state.in_flight and clock() < deadline:
        await asyncio.sleep(0.05)


def _stop_on_signal() -> asyncio.Event:
    """Set by the first signal; the second ends the process at once, and the engine with it."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


def _allow_many_connections() -> None:
    """Each is an open file, of which a shell allows a thousand unless it is asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    with suppress(ValueError, OSError):  # a system may have a lower limit than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=2048)


def _place(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _fail(reason: str) -> int:
    print(f"jaxserve: {reason}", file=sys.stderr, flush=True)
    return 1
