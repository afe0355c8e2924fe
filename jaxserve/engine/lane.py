"""One replica's requests: text goes in, tokens come back, text comes out."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxserve.engine.messages import FromCore, Hello, Outputs, Stats, StatsRequest, Status
from jaxserve.engine.replica import Died, Replica
from jaxserve.errors import EngineDied, JaxserveError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxserve.text.output import OutputProcessor
    from jaxserve.text.reading import MakeParser

Sink = Callable[[RequestOutput | JaxserveError | None], None]
"""Takes what comes of one request; None: it was aborted. It is called for all outputs of a step in one turn
of the event loop, and must neither raise nor end a request."""


@dataclass(eq=False)
class Job:
    """A request as it came, so that it can be given to another core, and where its outputs go."""

    request_id: str
    text: str | None
    ids: list[int]
    params: SamplingParams
    cache_salt: str
    tenant: str
    follows: bool
    """Part of a larger request of which something came before it."""
    sink: Sink
    make_parser: "MakeParser | None" = None
    fresh: bool = True
    """Nothing of it has been handed out, and it was in no core that died."""


class Lane:
    """A replica with its text side. Lives on the event loop.

    `make_processor(hello)` makes the text side for the model that a core has loaded. `take_back(job)` says
    whether a job that a core took with it lives on; else it ends with the error.
    """

    def __init__(
        self,
        replica: Replica,
        make_processor: "Callable[[Hello], OutputProcessor]",
        take_back: Callable[[Job], bool] = lambda job: False,
    ):
        self.replica = replica
        self.status = Status(state="loading")
        self.reason: str | None = None
        """Why the core died last."""
        self.gone = False
        self.restarts = 0
        """How often the core died and was started again."""
        self.hello: Hello | None = None
        self.jobs: dict[str, Job] = {}
        self._make_processor = make_processor
        self._processor: OutputProcessor | None = None
        self._asking: set[asyncio.Future[dict[str, Any]]] = set()
        self._take_back = take_back
        self._silent = 0.0
        """Seconds since the last sign of life."""
        self._stalled = 0.0
        """Seconds since there was progress, or nothing to do."""

    @property
    def ready(self) -> bool:
        return self.hello is not None and self.status.state in ("ready", "warm")

    @property
    def sequences(self) -> int:
        """How many its requests ask for."""
        return sum(job.params.num_sequences for job in self.jobs.values())

    def watch(self, seconds: float) -> None:
        """So much time went by. It is counted, not read from a clock: while this process itself is stopped,
        or too busy to listen, none does."""
        self._silent += seconds
        self._stalled += seconds

    def stuck(self, limit: float) -> str | None:
        """Why the core counts as hung, after `limit` seconds; None while it gets on."""
        if self._silent >= limit:
            return f"the engine has given no sign of life for {self._silent:.0f} s"
        if self.jobs and self._stalled >= limit:
            return f"the engine has work but finished no step for {self._stalled:.0f} s"
        return None

    def add(self, job: Job) -> None:
        """Start a request on a core that is ready. Raises `InvalidRequest`."""
        if self._processor is None:
            assert self.hello is not None
            self._processor = self._make_processor(self.hello)
        requests = self._processor.add(
            job.request_id,
            job.text,
            job.ids,
            job.params,
            job.cache_salt,
            job.tenant,
            job.follows,
            job.make_parser,
        )
        if not self.jobs:
            self._stalled = 0.0
        self.jobs[job.request_id] = job
        for request in requests:
            self.replica.send(request)

    def abort(self, request_id: str) -> None:
        """Unknown and finished requests are ignored."""
        if self.jobs.pop(request_id, None) is not None and self._processor is not None:
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
        if self.gone:  # a thread that was given up may speak again
            return
        self._silent = 0.0
        match message:
            case Outputs():
                self._process(message)
            case Status():
                if (message.state, message.steps) != (self.status.state, self.status.steps):
                    self._stalled = 0.0
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
        """The core is gone: fail all that was in it and does not live on."""
        self.status = Status(state="loading")
        self._processor = None
        jobs, self.jobs = self.jobs, {}
        for job in jobs.values():
            if not self._take_back(job):
                job.sink(EngineDied(reason))
        for reply in self._pending():
            reply.set_exception(EngineDied(reason))

    def _pending(self) -> list[asyncio.Future[dict[str, Any]]]:
        return [reply for reply in self._asking if not reply.done()]

    def _process(self, message: Outputs) -> None:
        if self._processor is None:
            return
        self._stalled = 0.0
        outputs, aborts = self._processor.process(message.outputs)
        for output in outputs:
            job = self.jobs.get(output.request_id)
            if job is not None:
                job.fresh = False
                if output.finished:
                    del self.jobs[output.request_id]
                job.sink(output)
        for abort in aborts:
            self.replica.send(abort)
