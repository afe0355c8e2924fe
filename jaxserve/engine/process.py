"""The engine process: one core behind a local socket, started by the HTTP process.

A frame is four bytes of length, then a msgpack message of `jaxserve.engine.messages`.
"""

import ctypes
import gc
import logging
import os
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.engine.core_loop import Core, CoreLoop
from jaxserve.engine.messages import FromCore, Status, ToCore
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from jaxserve.engine.core import EngineCore

LENGTH = struct.Struct(">I")
PR_SET_PDEATHSIG = 1
_encoder = msgspec.msgpack.Encoder()


def encode_frame(message: ToCore | FromCore) -> bytes:
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def run(sock: socket.socket, make_core: Callable[[], Core]) -> int:
    """Serve one core to the process at the other end of `sock`, and end when that process does."""
    # The HTTP process decides when to stop: a signal for the whole group (Ctrl-C, a service manager)
    # must not take the engine away from requests that are draining.
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    sending = threading.Lock()

    def emit(message: FromCore) -> None:
        frame = encode_frame(message)
        with sending:
            sock.sendall(frame)

    loop = CoreLoop(make_core, emit)
    threading.Thread(target=_read, args=(sock, loop), name="reader", daemon=True).start()
    try:
        loop.run()
    except Exception as error:
        if not isinstance(error, JaxserveError):
            logging.getLogger(__name__).exception("the engine failed")
        emit(Status(state="failed", message=reason_of(error)))
        return 1
    return 0


def with_own_devices(config: EngineConfig, replica: int) -> EngineConfig:
    """One replica's share of the mesh, the other replicas' GPUs hidden: jax takes memory on all it sees."""
    shape = parse_mesh(config.mesh)
    if shape.data == 1:
        return config
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(shape.tensor * shape.data)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[replica * shape.tensor : (replica + 1) * shape.tensor])
    # two that draw seeds draw different ones; deterministic, it must not matter who answers
    seed = config.seed if config.deterministic else config.seed + replica
    return msgspec.structs.replace(config, mesh=f"{shape.tensor}x1", seed=seed)


def reason_of(error: Exception) -> str:
    """One line for a person: ours say enough, others need their kind."""
    return str(error) if isinstance(error, JaxserveError) else f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """Let Linux end this process with the one that started it, stuck or stopped as it may be; elsewhere the
    end of the socket has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _engine_core(config: EngineConfig) -> Core:
    gc.disable()  # all that is imported and traced stays: the collector would look through it again and again
    from jaxserve.engine.core import EngineCore  # heartbeats go out while jax is imported

    core = EngineCore(config)
    gc.freeze()
    gc.enable()
    threading.Thread(target=_freeze_when_warm, args=(core,), name="freeze", daemon=True).start()
    return core


def _freeze_when_warm(core: "EngineCore") -> None:
    """What loading and compiling left behind stays: no collection between two steps looks at it again."""
    if core.wait_until_warm():
        gc.collect()
        gc.freeze()


def _read(sock: socket.socket, loop: CoreLoop) -> None:
    decoder = msgspec.msgpack.Decoder(ToCore)
    stream = sock.makefile("rb")
    try:
        while header := stream.read(LENGTH.size):
            loop.send(decoder.decode(stream.read(*LENGTH.unpack(header))))
    except (OSError, struct.error, msgspec.DecodeError) as error:
        logging.getLogger(__name__).error("the HTTP process was cut off: %s", error)
    os._exit(0)  # the HTTP process is gone, and no one is left to serve


def main(argv: list[str], factory: Callable[[EngineConfig], Core] = _engine_core) -> None:
    """`argv`: file descriptor of the socket, replica, log level, and the EngineConfig as JSON."""
    _end_with_parent()
    fd, replica, log_level, options = argv
    config = msgspec.json.decode(options, type=EngineConfig)
    logging.basicConfig(
        level=log_level.upper(), format=f"%(asctime)s %(levelname)s engine[{replica}] %(name)s: %(message)s"
    )
    config = with_own_devices(config, int(replica))
    status = run(socket.socket(fileno=int(fd)), partial(factory, config))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for compilations that still run in background threads


if __name__ == "__main__":
    main(sys.argv[1:])
