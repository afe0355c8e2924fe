"""One replica's requests: text goes in, tokens come back, text comes out."""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxserve.engine.messages import FromCore, Hello, Outputs, Stats, StatsRequest, Status
from jaxserve.engine.replica import Died, Replica
from jaxserve.errors import EngineDied
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.text.output import OutputProcessor

Stream = asyncio.Queue[RequestOutput | EngineDied | None]
"""What one request's iterator yields; None: it was aborted."""


class Lane:
    """A replica with its text side. Lives on the event loop.

    `make_processor(hello)` makes the text side for the model that a core has loaded.
    """

    def __init__(
        self,
        replica: Replica,
        make_processor: "Callable[[Hello], OutputProcessor]",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.replica = replica
        self.status = Status(state="loading")
        self.reason: str | None = None
        """Why the core died last."""
        self.gone = False
        self.restarts = 0
        """How often the core died and was started again."""
        self.hello: Hello | None = None
        self.streams: dict[str, Stream] = {}
        self._make_processor = make_processor
        self._processor: OutputProcessor | None = None
        self._asking: set[asyncio.Future[dict[str, Any]]] = set()
        self._clock = clock
        self._progress = clock()

    @property
    def ready(self) -> bool:
        return self.hello is not None and self.status.state in ("ready", "warm")

    @property
    def stalled_seconds(self) -> float:
        """How long it has had requests without finishing a step."""
        return self._clock() - self._progress if self.streams else 0.0

    def add(
        self,
        request_id: str,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        cache_salt: str,
        tenant: str,
    ) -> Stream:
        """Start a request on a core that is ready. Raises `InvalidRequest`."""
        if self._processor is None:
            assert self.hello is not None
            self._processor = self._make_processor(self.hello)
        requests = self._processor.add(request_id, text, ids, params, cache_salt, tenant)
        if not self.streams:
            self._progress = self._clock()
        stream = self.streams[request_id] = asyncio.Queue()
        for request in requests:
            self.replica.send(request)
        return stream

    def abort(self, request_id: str) -> None:
        """Unknown and finished requests are ignored."""
        if self.streams.pop(request_id, None) is not None and self._processor is not None:
            for abort in self._processor.abort(request_id):
                self.replica.send(abort)

    async def stats(self) -> dict[str, Any]:
        """Of a core that is ready. Raises `EngineDied`; of a core that is stuck there is no answer."""
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asking.add(reply)
        self.replica.send(StatsRequest())
        try:
            return await reply
        finally:
            self._asking.discard(reply)

    def handle(self, message: FromCore | Died) -> None:
        match message:
            case Outputs():
                self._process(message)
            case Status():
                if message.steps != self.status.steps:
                    self._progress = self._clock()
                self.status = message
            case Hello():
                self.hello = message
            case Stats():
                for reply in self._pending():  # one answer is news to all who ask
                    reply.set_result(message.values)
            case Died():
                self.reason, self.gone = message.reason, message.for_good
                self.restarts += not message.for_good
                self.end(f"the engine died: {message.reason}")

    def end(self, reason: str) -> None:
        """The core is gone: fail all that was in it."""
        self.status = Status(state="loading")
        self._processor = None
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.put_nowait(EngineDied(reason))
        for reply in self._pending():
            reply.set_exception(EngineDied(reason))

    def _pending(self) -> list[asyncio.Future[dict[str, Any]]]:
        return [reply for reply in self._asking if not reply.done()]

    def _process(self, message: Outputs) -> None:
        if self._processor is None:
            return
        self._progress = self._clock()
        outputs, aborts = self._processor.process(message.outputs)
        for output in outputs:
            stream = self.streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)
                if output.finished:
                    del self.streams[output.request_id]
        for abort in aborts:
            self.replica.send(abort)
