"""`POST /reset_prefix_cache`: forget what prompts and outputs left for later requests."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxserve.server.state import ServerState


def routes(state: ServerState) -> list[Route]:
    async def reset(request: Request) -> Response:
        state.engine.reset_prefix_cache()
        return JSONResponse({"status": "ok"})

    return [Route("/reset_prefix_cache", reset, methods=["POST"])]
