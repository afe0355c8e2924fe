"""AsyncEngine: the engine for asyncio. Text on the event loop, tokens in a thread or another process."""

import asyncio
import contextlib
import math
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.engine.lane import Job, Lane, Sink
from jaxserve.engine.messages import FromCore, Hello, ResetPrefixCache
from jaxserve.engine.prompts import Prompt, parse_prompt
from jaxserve.engine.replica import Died, Replica, ThreadReplica
from jaxserve.engine.stats import add_up
from jaxserve.errors import EngineDied, InvalidRequest, JaxserveError, renamed
from jaxserve.options import build
from jaxserve.outputs import BeamSearchOutput, RequestOutput
from jaxserve.sampling_params import BeamSearchParams, SamplingParams

if TYPE_CHECKING:
    from jaxserve.engine.text_side import TextSide
    from jaxserve.text.output import OutputProcessor
    from jaxserve.text.reading import Formats, MakeParser
    from jaxserve.text.tokenizer import Tokenizer

ENCODE_INLINE = 4096
"""Longest prompt, in characters, that is tokenised on the event loop."""

STATS_SECONDS = 2.0
"""How long `replica_stats` waits for a replica's answer."""

WATCH_SECONDS = 0.5
"""Between two looks at the replicas' signs of life."""

T = TypeVar("T")


class AsyncEngine:
    """Generates for many callers at once.

    `AsyncEngine(model=…, **options)` runs its cores in threads of this process; nothing is loaded before
    `start` or the first `generate`. All methods belong on one event loop at a time. For `stall_timeout` and
    `retry_on_restart` see docs/server.md; a core in a thread that hangs is given up.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        replicas: Sequence[Replica] | None = None,
        chat_template: str | None = None,
        stall_timeout: float = 0.0,
        retry_on_restart: bool = False,
        **options: Any,
    ):
        self.config = config or build(EngineConfig, options)
        if replicas is None:
            replicas = [ThreadReplica(i) for i in range(parse_mesh(self.config.mesh).data)]
        self._chat_template = chat_template
        self._stall_timeout = stall_timeout
        self._retry_on_restart = retry_on_restart
        self._lanes = [Lane(replica, self._make_processor, self._take_back) for replica in replicas]
        self._waiting: dict[str, Job] = {}
        """Requests that a core took with it, until there is one that is ready."""
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closed = ""
        """Why."""
        self._has_text = False
        self._settled = asyncio.Event()
        """A replica is ready, or none will ever be."""
        self._failed = asyncio.Event()

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """None for a model without one: prompts are token ids then. Loads it on first use."""
        return self._text.tokenizer

    @property
    def formats(self) -> "Formats":
        """In which the model writes its reasoning and its tool calls."""
        return self._text.formats

    @property
    def ready(self) -> bool:
        return self._has_text and any(lane.ready for lane in self._lanes)

    @property
    def failure(self) -> str | None:
        """Why the engine will not serve again: no replica is left."""
        return self._lanes[0].reason if all(lane.gone for lane in self._lanes) else None

    @property
    def state(self) -> str:
        """One line for `/ready`: loading, ready, warm, or why not."""
        if self.ready:
            return min(lane.status.state for lane in self._lanes if lane.ready)
        return next((f"restarting: {lane.reason}" for lane in self._lanes if lane.reason), "loading")

    @property
    def max_model_len(self) -> int | None:
        """Most tokens a request can have, prompt and output together; None before the model is loaded."""
        hellos = [lane.hello for lane in self._lanes if lane.hello]
        return min((min(hello.max_model_len, hello.max_request_tokens) for hello in hellos), default=None)

    @property
    def stuck(self) -> str | None:
        """Why a replica counts as hung; None while all get on with their work."""
        reasons = (lane.stuck(self._stall_timeout or math.inf) for lane in self._lanes if not lane.gone)
        return next(filter(None, reasons), None)

    async def start(self) -> None:
        """Load the model and return when it can serve. Raises `ModelError` or `EngineDied`."""
        self._loop = asyncio.get_running_loop()
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        model = await _in_daemon_thread(lambda: self._path)
        options = {name: getattr(self.config, name) for name in EngineConfig.__struct_fields__}
        config = EngineConfig(**{**options, "model": model})
        for lane in self._lanes:
            lane.replica.start(config, partial(self._deliver, lane))
        if self._stall_timeout:
            self._watching = asyncio.create_task(self._watch())
        await asyncio.to_thread(lambda: self._text)
        self._has_text = True
        await self._settled.wait()
        if gone := [lane.reason for lane in self._lanes if lane.gone]:
            raise EngineDied(gone[0])

    def default_params(self, **given: Any) -> SamplingParams:
        """These parameters, and for the rest what the model's makers recommend. Raises `InvalidRequest`."""
        return SamplingParams(**{**self._text.sampling_defaults, **given})

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        tenant: str = "",
        follows: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs as `params.output_kind` says, the last one with `finished`.

        `prompt`: text, token ids, `{"prompt": …}` or `{"prompt_token_ids": […]}`. Closing the iterator aborts
        the request. Tenants take turns (the option `fair_share`). One that `follows`, as part of a larger
        request, is let in by a full queue. Raises `InvalidRequest` before the first
        output, `EngineDied` at any time.
        """
        items: asyncio.Queue[RequestOutput | JaxserveError | None] = asyncio.Queue()
        job = await self.submit(prompt, items.put_nowait, params, request_id, tenant, follows)
        try:
            while (item := await items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self.end(job)

    async def beam_search(
        self, prompt: Prompt, params: BeamSearchParams, request_id: str | None = None, tenant: str = ""
    ) -> BeamSearchOutput:
        """The likeliest completions of the prompt, the best first. Raises as `generate`."""
        from jaxserve.text.beams import beam_search_output

        with renamed({"n": "beam_width"}):
            outputs = self.generate(prompt, params.sampling_params(), request_id, tenant)
            async with contextlib.aclosing(outputs):
                found = [output async for output in outputs][-1]
        found.raise_failure()
        return beam_search_output(found, params, self.tokenizer)

    async def submit(
        self,
        prompt: Prompt,
        sink: Sink,
        params: SamplingParams | None = None,
        request_id: str | None = None,
        tenant: str = "",
        follows: bool = False,
        make_parser: "MakeParser | None" = None,
    ) -> Job:
        """`generate` without an iterator between: `sink` is called with each output, in the turn of the event
        loop that brings it, or with the error that ends the request. Raises `InvalidRequest`, `EngineDied`.
        `make_parser`: for outputs with reasoning or tool calls in them (`Formats.parser`).

        Whoever gives up on the request before its end must `end` it.
        """
        await self.start()
        content, cache_salt = parse_prompt(prompt)
        params = params or self.default_params()
        text, ids = await self._encode(content, params.truncate_prompt_tokens is not None)
        request_id = request_id or uuid.uuid4().hex
        if self._job(request_id):
            raise InvalidRequest(f"a request with the id {request_id!r} is running already", "request_id")
        job = Job(request_id, text, ids, params, cache_salt, tenant, follows, sink, make_parser)
        try:
            self._choose_lane().add(job)
        except BaseException:
            self.end(job)
            raise
        return job

    def end(self, job: Job) -> None:
        """Nothing more comes of the request, and what runs of it is aborted. Ended ones are ignored."""
        if self._job(job.request_id) is job:  # and not the next one of this id
            self._forget(job.request_id)

    async def encode(self, text: str, add_special_tokens: bool = True, any_length: bool = False) -> list[int]:
        """The text's token ids; the event loop goes on while those of a long one are found.

        Raises `InvalidRequest` without a tokenizer and, unless `any_length`, for a text that is far too long.
        """
        if self.tokenizer is None:
            raise InvalidRequest("this model has no tokenizer: send token ids", "prompt")
        if self.max_model_len is not None and not any_length:
            self.tokenizer.check_length(text, self.max_model_len)
        if len(text) <= ENCODE_INLINE:
            return self.tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens)

    async def abort(self, request_id: str) -> None:
        """End a request now; its iterator ends. Unknown ids are ignored."""
        if job := self._job(request_id):
            self._forget(request_id)
            job.sink(None)

    async def stats(self) -> dict[str, Any]:
        """The counters of `Engine.stats()`, added up over the replicas that are ready; empty when none is."""
        await self.start()
        return add_up((await self._ask(timeout=None)).values())

    async def replica_stats(self) -> dict[int, dict[str, Any]]:
        """The counters of each replica that is ready and answers within `STATS_SECONDS`. Starts nothing."""
        return await self._ask(STATS_SECONDS)

    def reset_prefix_cache(self) -> None:
        """Forget the prompts and outputs that later ones could have begun with."""
        for lane in self._lanes:
            if lane.ready:
                lane.replica.send(ResetPrefixCache())

    @property
    def restarts(self) -> list[int]:
        """How often each replica was started again."""
        return [lane.restarts for lane in self._lanes]

    async def failed(self) -> str:
        """Wait until the engine will not serve again; why."""
        await self._failed.wait()
        return self.failure or ""

    async def close(self, reason: str = "the engine was closed") -> None:
        """End every request, with an `EngineDied` that gives the reason, and stop the cores."""
        if self._starting is None:
            return
        self._closed = reason
        if self._watching:
            self._watching.cancel()
        for lane in self._lanes:
            lane.end(reason)
        self._place()
        if not self._starting.done():
            self._starting.cancel()
            await asyncio.wait({self._starting})
        await asyncio.gather(*(lane.replica.close() for lane in self._lanes))

    async def __aenter__(self) -> "AsyncEngine":
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @cached_property
    def _path(self) -> str:
        from jaxserve.loading.hub import resolve

        return str(resolve(self.config.model))

    @cached_property
    def _text(self) -> "TextSide":
        from jaxserve.engine.text_side import load_text_side

        return load_text_side(self.config, self._path, self._chat_template)

    async def _ask(self, timeout: float | None) -> dict[int, dict[str, Any]]:
        """The replicas' counters; nothing of one that dies or takes longer than `timeout` seconds."""

        async def ask(lane: Lane) -> dict[str, Any] | None:
            with contextlib.suppress(EngineDied, TimeoutError):
                return await asyncio.wait_for(lane.stats(), timeout)
            return None

        ready = {i: lane for i, lane in enumerate(self._lanes) if lane.ready}
        answers = await asyncio.gather(*map(ask, ready.values()))
        return {i: answer for i, answer in zip(ready, answers, strict=True) if answer is not None}

    async def _encode(self, prompt: str | list[int], any_length: bool) -> tuple[str | None, list[int]]:
        if isinstance(prompt, list):
            return None, prompt
        return prompt, await self.encode(prompt, any_length=any_length)

    def _choose_lane(self) -> Lane:
        ready = [lane for lane in self._lanes if lane.ready]
        if not ready:
            raise EngineDied(self._closed or self.failure or f"the engine is {self.state}")
        return min(ready, key=lambda lane: lane.sequences)

    def _job(self, request_id: str) -> Job | None:
        """The request of that id that has not ended."""
        held = (self._waiting, *(lane.jobs for lane in self._lanes))
        return next((jobs[request_id] for jobs in held if request_id in jobs), None)

    def _forget(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        for lane in self._lanes:
            lane.abort(request_id)

    def _take_back(self, job: Job) -> bool:
        """Keep a request for another core, once: it may be the one that its core dies of."""
        if not (self._retry_on_restart and job.fresh):
            return False
        job.fresh = False
        self._waiting[job.request_id] = job
        return True

    def _place(self) -> None:
        """Give the waiting requests to cores that are ready; an error if there will never be one."""
        if self._waiting and (self.ready or self.failure is not None or self._closed):
            waiting, self._waiting = self._waiting, {}
            for job in waiting.values():
                try:
                    self._choose_lane().add(job)
                except JaxserveError as error:
                    job.sink(error)

    async def _watch(self) -> None:
        """Have replicas killed that hang."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for lane in self._lanes:
                lane.watch(WATCH_SECONDS)
                if not lane.gone and (reason := lane.stuck(self._stall_timeout)):
                    lane.replica.kill(reason)

    def _make_processor(self, hello: Hello) -> "OutputProcessor":
        from jaxserve.text.output import OutputProcessor

        return OutputProcessor(
            self._text.tokenizer,
            self._text.eos_token_ids,
            hello.max_model_len,
            hello.max_request_tokens,
            hello.vocab_size,
            self.config.scheduling_policy == "priority",
            self._text.formats.tags(self._text.tokenizer),
        )

    def _deliver(self, lane: Lane, message: FromCore | Died) -> None:
        """From a core, on any thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and the requests with it
            self._loop.call_soon_threadsafe(self._handle, lane, message)

    def _handle(self, lane: Lane, message: FromCore | Died) -> None:
        if self._closed:
            return
        lane.handle(message)
        self._place()
        if self.failure is not None:
            self._failed.set()
        if all(each.ready or each.gone for each in self._lanes):
            self._settled.set()


async def _in_daemon_thread(function: Callable[[], T]) -> T:
    """Unlike `asyncio.to_thread`, a download that hangs does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not result.done():
            set_it(value)

    def work() -> None:
        try:
            value = function()
        except BaseException as error:
            outcome = partial(settle, result.set_exception, error)
        else:
            outcome = partial(settle, result.set_result, value)
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(outcome)

    threading.Thread(target=work, daemon=True).start()
    return await result
