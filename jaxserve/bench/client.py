"""Timed requests to an OpenAI-compatible server. They share the machine with it: they must cost little."""

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from jaxserve.bench.workload import Ask

if TYPE_CHECKING:
    import aiohttp

Endpoint = Literal["completions", "chat"]
DETAIL = 300
"""Characters of an error that are kept."""
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Record(msgspec.Struct):
    """What became of one request. Seconds: `start` since the run began, the others since `start`."""

    start: float
    end: float = 0.0
    times: list[float] = msgspec.field(default_factory=list)
    """When each event with a token came; a completion's may have no text yet."""
    prompt_tokens: int | None = None
    """As the server counts them; None: it did not say."""
    output_tokens: int | None = None
    error: str | None = None
    """The kind of error."""
    detail: str = ""

    @property
    def tokens(self) -> int:
        """Of the output, by the server's count or else one for each event."""
        return len(self.times) if self.output_tokens is None else self.output_tokens


class Failure(Exception):
    """A request went wrong: the kind of error, and its text."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


class Client:
    """Sends requests over one session; `extra` are further fields of every body."""

    def __init__(
        self,
        session: "aiohttp.ClientSession",
        base_url: str,
        endpoint: Endpoint,
        model: str,
        extra: dict[str, Any],
    ):
        self._session = session
        self._url = base_url + PATHS[endpoint]
        self._chat = endpoint == "chat"
        options = {"stream": True, "stream_options": {"include_usage": True}}
        self._body = {"model": model, **options, **extra}

    async def send(self, ask: Ask, begin: float, due: float | None = None) -> Record:
        """Times count from `due`, if the request has a time at which it should have been sent.

        `begin` is that of the run, in seconds of `time.perf_counter()`.
        """
        import aiohttp

        fields = {"max_tokens": ask.output_tokens, **self._body}
        if self._chat:
            fields["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            fields["prompt"] = ask.prompt
        body = msgspec.json.encode(fields)
        start = time.perf_counter() if due is None else begin + due
        record = Record(start - begin)
        try:
            await self._stream(body, start, record)
        except Failure as failure:
            record.error, record.detail = failure.args
        except TimeoutError:
            record.error = "timeout"
        except aiohttp.ClientConnectorError as error:
            record.error, record.detail = "cannot connect", str(error)
        except (aiohttp.ClientError, OSError) as error:
            record.error, record.detail = "disconnected", f"{type(error).__name__}: {error}"
        record.end = time.perf_counter() - start
        return record

    async def _stream(self, body: bytes, start: float, record: Record) -> None:
        async with await self._post(body) as response:
            if response.status != 200:
                raise Failure(f"HTTP {response.status}", (await response.text())[:DETAIL])
            if response.content_type != "text/event-stream":
                self._take(await response.read(), time.perf_counter() - start, record)
                return
            rest, ended = b"", False
            async for data in response.content.iter_any():
                now = time.perf_counter() - start
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        ended |= self._take(line[5:].strip(), now, record)
        if not ended:
            raise Failure("disconnected", "the stream ended before it was finished")

    async def _post(self, body: bytes) -> "aiohttp.ClientResponse":
        """Again, where a kept connection turns out to be closed: llama.cpp closes it after a stream."""
        import aiohttp

        try:
            return await self._session.post(self._url, data=body)
        except (aiohttp.ClientConnectorError, aiohttp.ServerTimeoutError):
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            return await self._session.post(self._url, data=body)

    def _take(self, data: bytes, now: float, record: Record) -> bool:
        """Note one event; whether it says that the stream is finished."""
        if data == b"[DONE]":
            return True
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            raise Failure("no JSON", f"{error}: {data[:DETAIL]!r}") from None
        if event.error is not None:
            raise Failure("error in the stream", str(event.error)[:DETAIL])
        if event.usage is not None:
            record.prompt_tokens = event.usage.prompt_tokens
            record.output_tokens = event.usage.completion_tokens
        finished = False
        for choice in event.choices:
            finished |= choice.finish_reason is not None
            if _has_token(choice):
                record.times.append(now)
        return finished


def _has_token(choice: _Choice) -> bool:
    if delta := choice.delta or choice.message:
        return bool(delta.content or delta.reasoning_content)
    # a token of a completion may have no text of its own; the last event may have no token
    return bool(choice.text) or (choice.text is not None and choice.finish_reason is None)


async def closed_loop(
    client: Client, asks: Iterable[Ask], concurrency: int, duration: float | None
) -> list[Record]:
    """So many clients, each sending a request when its last one ended; none is sent after `duration`."""
    records: list[Record] = []
    todo = iter(asks)
    begin = time.perf_counter()

    async def work() -> None:
        while duration is None or time.perf_counter() - begin < duration:
            if (ask := next(todo, None)) is None:
                return
            records.append(await client.send(ask, begin))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return records


async def open_loop(
    client: Client,
    asks: Iterable[Ask],
    due: Iterable[float],
    concurrency: int | None,
    duration: float | None,
) -> list[Record]:
    """Requests sent when they are due, whatever became of the others; at most `concurrency` at once.

    One that had to wait for its turn is timed from when it was due.
    """
    slots = asyncio.Semaphore(concurrency) if concurrency else None
    begin = time.perf_counter()

    async def send(ask: Ask, at: float) -> Record:
        if slots is None:
            return await client.send(ask, begin, at)
        async with slots:
            return await client.send(ask, begin, at)

    tasks = []
    for ask, at in zip(asks, due, strict=False):
        if duration is not None and at >= duration:
            break
        await asyncio.sleep(begin + at - time.perf_counter())
        tasks.append(asyncio.create_task(send(ask, at)))
    return list(await asyncio.gather(*tasks))
