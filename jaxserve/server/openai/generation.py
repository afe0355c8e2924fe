"""What chat and completions share: running prompts on the engine and watching their outputs."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.lane import Job, Sink
from jaxserve.errors import InvalidRequest, JaxserveError, renamed
from jaxserve.outputs import CompletionOutput, RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.endpoint import Caller
from jaxserve.server.errors import ApiError, unavailable
from jaxserve.server.openai.responses import Usage
from jaxserve.server.state import ServerState
from jaxserve.text.output import check_token_ids, truncated
from jaxserve.text.reading import MakeParser

Show = Callable[[int, RequestOutput], None]
"""Takes the number of a prompt and an output of it, at once: there is no task between it and the engine."""


async def _nothing() -> None: ...


class Generation:
    """One HTTP request's prompts on their way through the engine.

    `written` maps a parameter, in errors about it, to the field the client wrote.
    """

    def __init__(
        self,
        state: ServerState,
        prompts: Sequence[str | list[int]],
        cache_salt: str,
        caller: Caller,
        params: SamplingParams,
        written: dict[str, str],
        add_special_tokens: bool = True,
        make_parser: MakeParser | None = None,
    ):
        self.created = int(time.time())
        self.usage = Usage()
        self._engine = state.engine
        self._make_parser = make_parser
        self._timeout = state.request_timeout
        self._deadline = self._timeout and asyncio.get_running_loop().time() + self._timeout
        self._prompts = prompts
        self._cache_salt = cache_salt
        self._tenant = caller.tenant
        self._watch = state.outcomes.watch(caller.arrived, len(prompts), params)
        self._params = params
        self._written = written
        self._add_special_tokens = add_special_tokens
        self._begun: set[int] = set()
        self._running = len(prompts)

    async def run(self, show: Show, taken: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Show every output as it comes. `taken` waits until the client has what was shown.

        The first error ends all and is raised; a 504 when time is up. Cancelling it aborts what still runs.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        jobs = []
        with self._watch:
            try:
                async with asyncio.timeout_at(self._deadline):
                    for i in range(len(self._prompts)):
                        if ended.done():  # with an error: no more is begun
                            break
                        jobs.append(await self._submit(i, partial(self._take, show, ended, i)))
                        if len(self._prompts) > 1:
                            await asyncio.sleep(0)  # others have a turn between any two
                    await ended
                    await taken()
            except TimeoutError:
                told = f"the request took longer than the {self._timeout:g} s that this server gives it"
                raise ApiError(504, told, code="request_timeout") from None
            finally:
                ended.cancel()
                for job in jobs:
                    self._engine.end(job)

    async def _submit(self, i: int, sink: Sink) -> Job:
        written = self._written if len(self._prompts) == 1 else self._written | {"prompt": f"prompt[{i}]"}
        with renamed(written):
            content = self._prompts[i]
            if isinstance(content, str) and not self._add_special_tokens:
                any_length = self._params.truncate_prompt_tokens is not None
                content = await self._engine.encode(content, False, any_length)
            kind = "prompt" if isinstance(content, str) else "prompt_token_ids"
            prompt = {kind: content, "cache_salt": self._cache_salt}
            return await self._engine.submit(
                prompt,
                sink,
                self._params,
                tenant=self._tenant,
                follows=i > 0,
                make_parser=self._make_parser,
            )

    def _take(
        self, show: Show, ended: asyncio.Future[None], i: int, item: RequestOutput | JaxserveError | None
    ) -> None:
        if ended.done():
            return
        try:
            if not isinstance(item, RequestOutput):
                raise item or ApiError(500, "the request was aborted", code="engine_error")
            self._count(i, item)
            show(i, item)
        except Exception as error:
            ended.set_exception(error)
            ended.exception()  # it may come while prompts are still submitted
            return
        if item.finished:
            self._running -= 1
            if not self._running:
                ended.set_result(None)

    def _count(self, i: int, output: RequestOutput) -> None:
        if output.error_code == "queue_full":
            raise unavailable(f"the server is busy: {output.error}", "queue_full")
        if output.error_code == "invalid_request":  # found only by compiling its grammar
            raise InvalidRequest(output.error or "", output.error_param)
        if output.error is not None:
            raise ApiError(500, f"the engine failed: {output.error}", code="engine_error")
        if i not in self._begun:
            self._begun.add(i)
            self.usage.count_prompt(output)
        self.usage.count_output(output)
        self._watch.saw(i, output)


class ScoredPrompts(Generation):
    """A `Generation` that is there for the logprobs of its prompts: the one token of each is nobody's."""

    def _take(
        self, show: Show, ended: asyncio.Future[None], i: int, item: RequestOutput | JaxserveError | None
    ) -> None:
        if isinstance(item, RequestOutput) and item.error is None:
            for sequence in item.outputs:
                sequence.text, sequence.token_ids = "", []
                sequence.logprobs = None if sequence.logprobs is None else []
                sequence.finish_reason = sequence.finish_reason and "length"
            item.num_unused_tokens = 0
        super()._take(show, ended, i, item)


class PromptsOnly:
    """Instead of a `Generation` where nothing is generated: the engine has no part in it."""

    def __init__(
        self,
        engine: AsyncEngine,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        written: dict[str, str],
        add_special_tokens: bool,
    ):
        self.created = int(time.time())
        self.usage = Usage()
        self._engine = engine
        self._prompts = prompts
        self._params = params
        self._written = written
        self._add_special_tokens = add_special_tokens

    async def run(self, show: Show, taken: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Show every prompt, of as many empty sequences as asked for."""
        for i, prompt in enumerate(self._prompts):
            written = {"prompt": f"prompt[{i}]"} if len(self._prompts) > 1 else self._written
            with renamed(written):
                ids = await self._token_ids(prompt)
            empty = [CompletionOutput(k, "", [], finish_reason="length") for k in range(self._params.n)]
            output = RequestOutput("", None, ids, empty, finished=True)
            self.usage.count_prompt(output)
            show(i, output)
            await asyncio.sleep(0)
        await taken()

    async def _token_ids(self, prompt: str | list[int]) -> list[int]:
        limit, any_length = self._engine.max_model_len, self._params.truncate_prompt_tokens is not None
        text = isinstance(prompt, str)
        ids = await self._engine.encode(prompt, self._add_special_tokens, any_length) if text else prompt
        ids = truncated(ids, self._params, limit)
        if not ids:
            raise InvalidRequest("the prompt is empty; it needs at least one token", "prompt")
        if limit is not None and len(ids) > limit:
            told = f"the prompt has {len(ids)} tokens, and a request can have {limit}"
            raise InvalidRequest(told, "prompt", "context_length_exceeded")
        if self._engine.tokenizer is not None:
            check_token_ids(ids, self._engine.tokenizer.vocab_size, "prompt")
        return ids
