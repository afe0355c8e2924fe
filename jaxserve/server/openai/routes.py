"""The paths of OpenAI's API."""

from starlette.routing import Route

from jaxserve.server.endpoint import EngineEndpoint
from jaxserve.server.openai.chat import chat
from jaxserve.server.openai.completions import complete
from jaxserve.server.openai.models import models_routes
from jaxserve.server.openai.tokens import detokenize, render_chat, tokenize, tokenizer_info_route
from jaxserve.server.state import ServerState


def routes(state: ServerState) -> list[Route]:
    list_models, get_model = models_routes(state)
    return [
        Route("/v1/chat/completions", EngineEndpoint(state, chat), methods=["POST"]),
        Route("/v1/chat/completions/render", EngineEndpoint(state, render_chat), methods=["POST"]),
        Route("/v1/completions", EngineEndpoint(state, complete), methods=["POST"]),
        Route("/tokenize", EngineEndpoint(state, tokenize), methods=["POST"]),
        Route("/detokenize", EngineEndpoint(state, detokenize), methods=["POST"]),
        Route("/tokenizer_info", tokenizer_info_route(state)),
        Route("/v1/models", list_models),
        Route("/v1/models/{id:path}", get_model),
    ]
