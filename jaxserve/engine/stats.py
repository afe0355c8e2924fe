"""What an engine counts: values in buckets, what its steps took, and several replicas as one."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

SAME = "block_size"
"""No sum: it is the same for all."""

INTER_TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Histogram:
    """Counts values by the smallest bound that they do not exceed."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def values(self) -> dict[str, float]:
        """How many values are at most each bound, the last of which is "+Inf", and their "sum"."""
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return {**dict(zip(names, accumulate(self._counts), strict=True)), "sum": self._sum}


class StepRecord(NamedTuple):
    """A step that is done. Times in seconds of `time.monotonic()`."""

    program: str
    tokens: int
    began: float
    ended: float


class StepStats:
    """What the steps of a core took, and how long its device had none. Times are those of one clock."""

    def __init__(self) -> None:
        self._programs: Counter[str] = Counter()
        self._tokens = Histogram(STEP_TOKENS)
        self._seconds = Histogram(STEP_SECONDS)
        self._gaps = Histogram(INTER_TOKEN_SECONDS)
        self._ended = 0.0
        self._idle = 0.0
        self._idle_since: float | None = None
        self.record: Callable[[StepRecord], None] | None = None
        """Gets every step, if anyone wants them."""

    def dispatched(self, now: float) -> None:
        """The device has a step."""
        if self._idle_since is not None:
            self._idle += now - self._idle_since
            self._idle_since = None

    def idle(self, since: float | None) -> None:
        """There is work, and the device has none of it, since then; None: there is no work."""
        self._idle_since = since if since is None or self._idle_since is None else self._idle_since

    def finished(self, program: str, tokens: int, dispatched: float, now: float) -> None:
        """A step is done that was dispatched then; it began when the one before it ended, at the earliest."""
        self._programs[program] += 1
        self._tokens.observe(tokens)
        began = max(dispatched, self._ended)
        self._seconds.observe(now - began)
        self._ended = now
        if self.record:
            self.record(StepRecord(program, tokens, began, now))

    def gaps(self, seconds: Iterable[float]) -> None:
        """The times since each sequence's token before; most of one step are the same."""
        for gap, times in Counter(seconds).items():
            self._gaps.observe(gap, times)

    def values(self) -> dict[str, Any]:
        return {
            "program_steps": dict(self._programs),
            "step_tokens": self._tokens.values(),
            "step_seconds": self._seconds.values(),
            "inter_token_seconds": self._gaps.values(),
            "device_idle_seconds": self._idle,
        }


def add_up(replicas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Numbers are added up, also those inside of a dict; a flag is set when it is for every replica."""
    total: dict[str, Any] = {}
    for stats in replicas:
        for name, value in stats.items():
            if name not in total or name == SAME:
                total[name] = value
            elif isinstance(value, bool):
                total[name] = total[name] and value
            elif isinstance(value, dict):
                total[name] = add_up([total[name], value])
            else:
                total[name] += value
    return total
