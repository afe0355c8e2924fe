"""What the routes share: the engine, its names, and whether requests are let in."""

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxserve.config import ServerConfig
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.server.errors import ApiError, unavailable
from jaxserve.server.metrics.outcomes import Outcomes


class ServerState:
    def __init__(self, config: ServerConfig, engine: AsyncEngine):
        self.engine = engine
        self.model_names = config.served_model_name or [config.model]
        self.max_body_size = config.max_body_size
        self.share_prefix_cache = config.share_prefix_cache
        self.trust_request_chat_template = config.trust_request_chat_template
        self.template_processes = asyncio.Semaphore(2)
        """How many of clients' own templates are rendered at a time."""
        self.request_timeout = config.request_timeout
        self.vllm_metrics = config.metrics_compat == "vllm"
        self.outcomes = Outcomes()
        self.started = int(time.time())
        self.draining = False
        self.in_flight = 0
        """Requests for the engine that have not been answered to the end."""

    def unready_reason(self) -> str | None:
        """Why requests are not let in now; None when they are."""
        if self.draining:
            return "the server is shutting down"
        return None if self.engine.ready else f"the engine is {self.engine.state}"

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Around a request for the engine. Raises a 503 while it cannot be served."""
        if reason := self.unready_reason():
            raise unavailable(reason, "shutting_down" if self.draining else "engine_unavailable")
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def cache_salt(self, tenant: str, wanted: str | None) -> str:
        """What keeps a caller's prompts apart in the prefix cache: the time of an answer tells whether a
        prompt was there before."""
        salt = f"{'' if self.share_prefix_cache else tenant}/{wanted or ''}"
        return hashlib.sha256(salt.encode()).hexdigest()

    def check_model(self, name: str | None) -> str:
        """The model's name for the response. Raises a 404 for a name that is not served."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(self.model_names)
            raise ApiError(
                404, f"no model {name!r} here; served: {served}", param="model", code="model_not_found"
            )
        return name
