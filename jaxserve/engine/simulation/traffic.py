"""Requests over time: read from a trace, or drawn from a distribution."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from jaxserve.config import about
from jaxserve.errors import ConfigError

DAY = 86_400.0
BUSIEST = 15 * 3600.0


class Arrival(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request: a line of a trace. Times in seconds from the trace's begin, lengths in tokens."""

    arrival: float
    prompt: int
    output: int
    """Tokens until it ends."""
    max_tokens: int | None = None
    """What it asked for, when it stops by itself before that."""
    tenant: str = ""
    priority: int = 0
    prefix: str = ""
    """Requests with the same begin with the same `prefix_tokens`."""
    prefix_tokens: int = 0
    abort: float | None = None
    """When its client goes away."""

    def __post_init__(self) -> None:
        if not 0 <= self.arrival < math.inf:
            raise ValueError("arrival must be a time from 0 on")
        if self.prompt < 1 or self.output < 1:
            raise ValueError("prompt and output must be at least 1")
        if self.max_tokens is not None and self.max_tokens < self.output:
            raise ValueError("max_tokens must not be below output")
        if not 0 <= self.prefix_tokens <= self.prompt:
            raise ValueError("prefix_tokens must not be above prompt")
        if self.abort is not None and not self.abort >= self.arrival:
            raise ValueError("abort must not be before arrival")


class Traffic(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A distribution of requests. Lengths are log-normal."""

    seed: Annotated[int, about("draws the traffic")] = 0
    duration: Annotated[float, about("seconds of arrivals")] = 3600.0
    rate: Annotated[float, about("requests per second, on average over a day")] = 1.0
    daily: Annotated[float, about("how much the rate swings over a day, 0 to 1; the busiest is 15:00")] = 0.0
    prompt_tokens: Annotated[float, about("median length of prompts")] = 100.0
    prompt_spread: Annotated[float, about("standard deviation of the logarithm of prompts' lengths")] = 0.8
    output_tokens: Annotated[float, about("median length of outputs")] = 40.0
    output_spread: Annotated[float, about("standard deviation of the logarithm of outputs' lengths")] = 0.6
    max_tokens: Annotated[int, about("longest output")] = 512
    stop_share: Annotated[float, about("part of the requests that end before their max_tokens")] = 0.5
    long_share: Annotated[float, about("part of the requests that have a long prompt")] = 0.01
    long_tokens: Annotated[int, about("length of long prompts")] = 4000
    tenants: Annotated[int, about("tenants; the n-th sends 1/n as much as the first")] = 1
    priorities: Annotated[int, about("levels of priority, equally frequent")] = 1
    prefixes: Annotated[int, about("different system prompts")] = 10
    prefix_share: Annotated[float, about("part of the requests that begin with a system prompt")] = 0.5
    prefix_tokens: Annotated[int, about("length of system prompts")] = 64
    abort_share: Annotated[float, about("part of the requests whose client goes away")] = 0.01
    abort_after: Annotated[float, about("seconds after which it does, on average")] = 3.0

    def __post_init__(self) -> None:
        for name in ("duration", "rate", "prompt_tokens", "output_tokens", "abort_after"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("daily", "stop_share", "long_share", "prefix_share", "abort_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        for name in ("prompt_spread", "output_spread", "prefix_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("max_tokens", "long_tokens", "tenants", "priorities", "prefixes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")

    def draw(self) -> Iterator[Arrival]:
        """In order of arrival, the same for the same seed."""
        rng = random.Random(self.seed)
        weights = [1 / n for n in range(1, self.tenants + 1)]
        highest = self.rate * (1 + self.daily)
        now = rng.expovariate(highest)
        while now < self.duration:
            swing = 1 + self.daily * math.cos(2 * math.pi * (now - BUSIEST) / DAY)
            if rng.random() * highest <= self.rate * swing:
                yield self._request(rng, now, weights)
            now += rng.expovariate(highest)

    def _request(self, rng: random.Random, now: float, weights: list[float]) -> Arrival:
        prompt = _log_normal(rng, self.prompt_tokens, self.prompt_spread)
        if rng.random() < self.long_share:
            prompt = self.long_tokens
        prefix = rng.random() < self.prefix_share
        output = min(_log_normal(rng, self.output_tokens, self.output_spread), self.max_tokens)
        return Arrival(
            arrival=now,
            prompt=prompt + prefix * self.prefix_tokens,
            output=output,
            max_tokens=self.max_tokens if rng.random() < self.stop_share else None,
            tenant=f"tenant-{rng.choices(range(self.tenants), weights)[0]}" if self.tenants > 1 else "",
            priority=rng.randrange(self.priorities),
            prefix=f"prefix-{rng.randrange(self.prefixes)}" if prefix else "",
            prefix_tokens=prefix * self.prefix_tokens,
            abort=now + rng.expovariate(1 / self.abort_after) if rng.random() < self.abort_share else None,
        )


def read_trace(path: str) -> list[Arrival]:
    """A file of one JSON object per line, each an `Arrival`. Raises ConfigError naming the line."""
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the trace: {error}") from None
    decoder = msgspec.json.Decoder(Arrival)
    arrivals = []
    for number, line in enumerate(lines, 1):
        try:
            arrivals.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    if not arrivals:
        raise ConfigError(f"{path} has no requests")
    return arrivals


def _log_normal(rng: random.Random, median: float, spread: float) -> int:
    return max(1, round(rng.lognormvariate(math.log(median), spread)))
