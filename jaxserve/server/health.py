"""Routes for probes: alive, healthy, ready, and which version."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import jaxserve
from jaxserve.server.errors import unavailable
from jaxserve.server.state import ServerState


def routes(state: ServerState) -> list[Route]:
    engine = state.engine

    async def live(request: Request) -> Response:
        """The HTTP process answers."""
        return JSONResponse({"status": "ok"})

    async def health(request: Request) -> Response:
        """The engine lives and gets on with its work."""
        if not engine.ready:
            raise unavailable(f"the engine is {engine.state}")
        if stuck := engine.stuck:
            raise unavailable(stuck)
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        """New requests are let in; `engine` is "warm" once every program is compiled."""
        if reason := state.unready_reason():
            raise unavailable(reason, "not_ready")
        return JSONResponse({"status": "ready", "engine": engine.state})

    async def version(request: Request) -> Response:
        return JSONResponse({"version": jaxserve.__version__})

    return [
        Route("/live", live),
        Route("/health", health),
        Route("/ping", health),
        Route("/ready", ready),
        Route("/version", version),
    ]
