"""`GET /load`: how many requests are in flight, for load balancers that know vLLM's."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxserve.server.state import ServerState


def routes(state: ServerState) -> list[Route]:
    async def load(request: Request) -> Response:
        return JSONResponse({"server_load": state.in_flight})

    return [Route("/load", load)]
