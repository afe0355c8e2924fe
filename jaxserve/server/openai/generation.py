"""What chat and completions share: running prompts on the engine and watching their outputs."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.endpoint import Caller
from jaxserve.server.errors import ApiError, unavailable
from jaxserve.server.openai.requests import renamed
from jaxserve.server.openai.responses import Usage
from jaxserve.server.state import ServerState

T = TypeVar("T")


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
    ):
        self.created = int(time.time())
        self.usage = Usage()
        self._engine = state.engine
        self._timeout = state.request_timeout
        self._deadline = self._timeout and asyncio.get_running_loop().time() + self._timeout
        self._prompts = prompts
        self._cache_salt = cache_salt
        self._tenant = caller.tenant
        self._watch = state.outcomes.watch(caller.arrived, len(prompts), params)
        self._params = params
        self._written = written

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        """(prompt's number, output) as they come. Closing it aborts what still runs."""
        seen = set()
        runs = [self._run(i) for i in range(len(self._prompts))]
        with self._watch:
            async with aclosing(_merge(runs)) as merged:
                while item := await self._next_in_time(merged):
                    i, output = item
                    if output.error_code == "queue_full":
                        raise unavailable(f"the server is busy: {output.error}", "queue_full")
                    if output.error is not None:
                        raise ApiError(500, f"the engine failed: {output.error}", code="engine_error")
                    if i not in seen:
                        seen.add(i)
                        self.usage.count_prompt(output)
                    self.usage.count_output(output)
                    self._watch.saw(i, output)
                    yield i, output

    async def _next_in_time(self, items: AsyncIterator[T]) -> T | None:
        """None after the last one. Raises a 504 when time is up."""
        late = self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline
        try:
            if late:  # an item that is there already would not wait for the clock
                raise TimeoutError
            async with asyncio.timeout_at(self._deadline):
                return await anext(items, None)
        except TimeoutError:
            told = f"the request took longer than the {self._timeout:g} s that this server gives it"
            raise ApiError(504, told, code="request_timeout") from None

    async def _run(self, i: int) -> AsyncGenerator[RequestOutput]:
        written = self._written if len(self._prompts) == 1 else self._written | {"prompt": f"prompt[{i}]"}
        with renamed(written):
            kind = "prompt" if isinstance(self._prompts[i], str) else "prompt_token_ids"
            prompt = {kind: self._prompts[i], "cache_salt": self._cache_salt}
            run = self._engine.generate(prompt, self._params, tenant=self._tenant, follows=i > 0)
            async with aclosing(run) as outputs:
                async for output in outputs:
                    yield output


async def _merge(runs: list[AsyncGenerator[RequestOutput]]) -> AsyncGenerator[tuple[int, RequestOutput]]:
    """The outputs of all runs as they come; the first error ends all."""
    if len(runs) == 1:
        async with aclosing(runs[0]) as outputs:
            async for output in outputs:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_drain(i, run, queue)) for i, run in enumerate(runs)]
    try:
        running = len(runs)
        while running:
            i, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield i, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(i: int, run: AsyncGenerator[RequestOutput], queue: asyncio.Queue) -> None:
    try:
        async with aclosing(run) as outputs:
            async for output in outputs:
                queue.put_nowait((i, output))
        queue.put_nowait((i, None))
    except Exception as error:
        queue.put_nowait((i, error))
