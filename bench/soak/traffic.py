"""A mix of requests without end, and the client that sends them and judges what comes back."""

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp

from bench.robustness.server import Target
from jaxserve.bench.workload import words

PATIENCE = 120.0
"""Seconds until an answer that does not come counts as missing."""
PROMPTS = ("prompt", "messages")


class Sent(NamedTuple):
    """A request; its client reads all, or leaves after so many events or, of a whole answer, 1/20 seconds."""

    kind: str
    path: str
    body: dict[str, Any]
    leaves: int | None = None


def traffic(seed: int, scale: float = 1.0) -> Iterator[Sent]:
    """Requests without end, the same for the same seed; `scale` makes all of them longer or shorter."""
    rng = random.Random(seed)
    beginnings = [words(rng, round(128 * scale)) for _ in range(8)]
    while True:
        if rng.random() < 0.03:
            yield bad(rng)
            continue
        text = (rng.choice(beginnings) if rng.random() < 0.4 else "") + words(
            rng, tail(rng, 120 * scale, 600 * scale)
        )
        chat, stream = rng.random() < 0.5, rng.random() < 0.7
        path = "/v1/chat/completions" if chat else "/v1/completions"
        said = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
        body = said | {
            "max_tokens": tail(rng, 80 * scale, 300 * scale),
            "stream": stream,
            **sampling(rng, chat),
        }
        leaves = rng.randrange(20) if rng.random() < 0.05 else None
        yield Sent("stream" if stream else "whole", path, body, leaves)


def tail(rng: random.Random, mean: float, longest: float) -> int:
    """A length of a long-tailed mix."""
    return max(1, round(min(longest, mean * rng.lognormvariate(-0.32, 0.8))))


def sampling(rng: random.Random, chat: bool) -> dict[str, Any]:
    """A few parameters at once; most requests have some."""
    menu: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 40, "min_p": 0.05},
        {"seed": rng.randrange(2**31)},
        {"stop": [" time", "\n\n\n"]},
        {"n": 2, "temperature": 1.0},
        {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3},
        {"ignore_eos": True},
    ]
    return dict(itertools.chain.from_iterable(each.items() for each in rng.sample(menu, rng.randrange(4))))


def bad(rng: random.Random) -> Sent:
    bodies: list[dict[str, Any]] = [
        {"prompt": "Hello", "temperature": -1},
        {"prompt": "Hello", "max_tokens": "many"},
        {"prompt": "Hello", "max_tokens": 10**6},
        {"prompt": "Hello", "top_q": 0.5},
        {"prompt": [-1]},
        {},
    ]
    return Sent("bad", "/v1/completions", rng.choice(bodies))


@dataclass
class Counts:
    """What became of the requests. All that is wrong is in `wrong`, in words."""

    sent: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    """When each ended, and how long it took."""


class Client:
    def __init__(self, target: Target, http: aiohttp.ClientSession):
        self._url = target.url
        self._http = http
        self.counts = Counts()

    async def send(self, request: Sent) -> None:
        self.counts.sent += 1
        begin = time.monotonic()
        early = request.leaves is not None and request.kind == "whole"
        try:
            how = await asyncio.wait_for(self._exchange(request), request.leaves / 20 if early else PATIENCE)
        except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
            how = "left" if early and isinstance(error, TimeoutError) else "wrong"
            if how == "wrong":
                told = {name: value for name, value in request.body.items() if name not in PROMPTS}
                self.counts.wrong.append(f"{request.path} {told}: {type(error).__name__} {error}")
        self.counts.ended[how] += 1
        now = time.monotonic()
        self.counts.seconds.append((now, now - begin))

    async def _exchange(self, request: Sent) -> str:
        """How it ended. Raises ValueError for an answer that is not the one owed."""
        async with self._http.post(self._url + request.path, json=request.body) as answer:
            if request.kind == "bad":
                if answer.status != 400:
                    raise ValueError(f"{answer.status}, not 400: {(await answer.text())[:200]}")
                return "refused, as it should be"
            if answer.status != 200:
                raise ValueError(f"{answer.status}: {(await answer.text())[:200]}")
            if request.kind == "whole":
                if not all(choice["finish_reason"] for choice in (await answer.json())["choices"]):
                    raise ValueError("no finish_reason")
                return "complete"
            events = 0
            async for line in answer.content:
                if line.startswith(b'data: {"error"'):
                    raise ValueError(line.decode()[:200])
                if line == b"data: [DONE]\n":
                    return "complete"
                events += line.startswith(b"data: ")
                if request.leaves is not None and events > request.leaves:
                    return "left"
            raise ValueError("the stream ended early")
