"""The HTTP application: routes, and what lies around all of them."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from jaxserve.config import ServerConfig
from jaxserve.errors import ConfigError, EngineDied, InvalidRequest
from jaxserve.server import health, load, prefix_cache
from jaxserve.server.auth import OPEN, Auth
from jaxserve.server.errors import ApiError, answer
from jaxserve.server.metrics import page as metrics
from jaxserve.server.metrics.responses import CountResponses
from jaxserve.server.openai import routes as openai_routes
from jaxserve.server.request_id import RequestId
from jaxserve.server.state import ServerState


def build_app(config: ServerConfig, state: ServerState) -> Starlette:
    """Raises `ConfigError` for options that cannot be."""
    answered = (ApiError, InvalidRequest, EngineDied, HTTPException, Exception)
    routes = [
        *health.routes(state),
        *load.routes(state),
        *metrics.routes(state),
        *prefix_cache.routes(state),
        *openai_routes.routes(state),
    ]
    paths = frozenset(route.path for route in routes)
    count = Middleware(CountResponses, responses=state.outcomes.responses, paths=paths)
    app = Starlette(
        routes=routes,
        middleware=[count, *_middleware(config)],
        exception_handlers=dict.fromkeys(answered, answer),
    )
    app.router.redirect_slashes = False
    return app


def _middleware(config: ServerConfig) -> list[Middleware]:
    """From the outside in: a browser must be able to read a 401 too."""
    layers = [Middleware(RequestId)]
    if config.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
        layers.insert(0, cors)
    if config.api_key:
        if not all(config.api_key):
            raise ConfigError("api_key must not be empty")
        open_paths = OPEN | {"/metrics"} if config.open_metrics else OPEN
        layers.append(Middleware(Auth, keys=config.api_key, open=open_paths))
    return layers
