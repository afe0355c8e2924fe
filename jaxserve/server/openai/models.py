"""`GET /v1/models` and `/v1/models/{id}`."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.server.state import ServerState


def models_routes(state: ServerState) -> tuple[Any, Any]:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": state.started,
            "owned_by": "jaxserve",
            "max_model_len": state.engine.max_model_len,
        }

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in state.model_names]})

    async def get_model(request: Request) -> Response:
        return JSONResponse(card(state.check_model(request.path_params["id"])))

    return list_models, get_model
