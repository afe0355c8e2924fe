"""The HTTP server: uvicorn around our app."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from jaxserve.config import ServerConfig
from jaxserve.server.app import build_app
from jaxserve.server.protocol import HttpProtocol
from jaxserve.server.state import ServerState

FLUSH_SECONDS = 3
"""For the last bytes of responses, once the engine is closed."""
IDLE_SECONDS = 75
"""Of a connection until it is closed: later than clients and proxies do, or their next request might meet the
closing."""


def make_server(config: ServerConfig, state: ServerState) -> uvicorn.Server:
    return Server(
        uvicorn.Config(
            build_app(config, state),
            http=HttpProtocol,
            ws="none",
            proxy_headers=False,
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
    )


class Server(uvicorn.Server):
    """Signals are ours: requests are drained before uvicorn hears of the end."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
