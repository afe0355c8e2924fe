"""Turns the scheduler as the core does: the next step is dispatched, then the one before it read."""

import heapq
from array import array
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.engine.blocks import BlockPool
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Chunk, Limits, Policy, Scheduler
from jaxserve.engine.simulation.cost import Cost
from jaxserve.engine.simulation.invariants import Invariants, Violation
from jaxserve.engine.simulation.traffic import Arrival
from jaxserve.errors import QueueFull

STOP = -1
"""The token by which a request ends by itself. Others are its number; prefixes have numbers below."""


class Setup(NamedTuple):
    """An engine: its sizes, how requests compete in it, and what a step costs."""

    num_blocks: int
    block_size: int
    limits: Limits
    policy: Policy
    cost: Cost
    prefix_cache: bool = True


class Visit:
    """What became of a request. Times are virtual seconds; None: it did not come to that."""

    __slots__ = ("arrival", "ended", "first", "last", "number", "outcome", "preemptions", "started")

    def __init__(self, number: int, arrival: Arrival):
        self.number = number
        self.arrival = arrival
        self.outcome: str | None = None
        """stop, length, abort, queue_full or too_long."""
        self.started: float | None = None
        """When it was first admitted."""
        self.first: float | None = None
        """When its first token was read."""
        self.last = 0.0
        self.ended = 0.0
        self.preemptions = 0


class Meters:
    """What is added up over a run, in seconds, tokens and blocks."""

    def __init__(self) -> None:
        self.steps = self.rows = self.prompt = self.output = 0
        """`prompt`: tokens of prompts and of what is recomputed; `output`: tokens that were read."""
        self.busy = 0.0
        self.block_seconds = 0.0
        self.most_blocks = 0
        self.most_waiting = 0
        self.gaps = array("d")
        """Between two tokens of a request."""


class Simulation:
    """One engine under a list of numbered requests, in order of arrival."""

    def __init__(self, setup: Setup, arrivals: Iterable[tuple[int, Arrival]], audit_every: int = 1):
        self.pool = BlockPool(setup.num_blocks, setup.block_size)
        self.scheduler = Scheduler(self.pool, setup.limits.seqs, setup.prefix_cache, setup.policy)
        self.visits = [Visit(number, arrival) for number, arrival in arrivals]
        self.now = 0.0
        self.meters = Meters()
        self._setup = setup
        self._invariants = Invariants(self.scheduler, setup.limits, audit_every)
        self._coming = deque(self.visits)
        self._leaving: list[tuple[float, int, Request]] = []
        """A heap of those whose clients will go away."""
        self._present: dict[Request, Visit] = {}
        self._flights: deque[tuple[float, list[Chunk]]] = deque()
        """Steps that were not read, with the time at which each is done."""
        self._prefixes: dict[str, int] = {}

    def run(self) -> None:
        """To the end of the last request. Raises Violation, with the moment in it."""
        try:
            while self._wait():
                self._receive()
                self._step()
            self._invariants.audit()
        except Exception as error:  # whatever the scheduler raises, it should not
            violation = error if isinstance(error, Violation) else Violation(type(error).__name__, str(error))
            detail = f"{violation.detail} (step {self.meters.steps}, {self.now:.3f} s)"
            raise Violation(violation.rule, detail) from error

    def _wait(self) -> bool:
        """Sleep while there is nothing to do. False: nothing will come."""
        if not self._present and not self._flights:
            if not self._coming:
                return False
            self.now = max(self.now, self._coming[0].arrival.arrival)
        return True

    def _receive(self) -> None:
        while self._coming and self._coming[0].arrival.arrival <= self.now:
            self._add(self._coming.popleft())
        while self._leaving and self._leaving[0][0] <= self.now:
            request = heapq.heappop(self._leaving)[2]
            if request.finish_reason is None:
                self.scheduler.finish(request, "abort")
                self._end(request, "abort")

    def _step(self) -> None:
        meters = self.meters
        inflight = bool(self._flights)
        self._invariants.planning()
        schedule = self.scheduler.schedule(self._setup.limits)
        self._invariants.planned(schedule, inflight)
        for request in schedule.admitted:
            visit = self._present[request]
            if visit.started is None:
                visit.started = self.now
        if schedule.chunks:
            self._dispatch(schedule.chunks)
        ahead = 1 if schedule.chunks else 0
        while len(self._flights) > ahead:
            self._collect()
        self._invariants.turned()
        meters.most_blocks = max(meters.most_blocks, self.pool.used)
        waiting = self.scheduler.unfinished - len(self.scheduler.running)
        meters.most_waiting = max(meters.most_waiting, waiting)

    def _dispatch(self, chunks: list[Chunk]) -> None:
        begin = max(self.now, self._flights[-1][0]) if self._flights else self.now
        seconds = self._setup.cost.step(chunks)
        self._flights.append((begin + seconds, chunks))
        meters = self.meters
        meters.steps += 1
        meters.rows += len(chunks)
        meters.prompt += sum(chunk.length for chunk in chunks if chunk.length > 1)
        meters.busy += seconds
        meters.block_seconds += seconds * self.pool.used

    def _collect(self) -> None:
        self.now, chunks = self._flights.popleft()
        now, append, gaps, present = self.now, self.scheduler.append, self.meters.gaps, self._present
        read = 0
        for request, _, _, _, samples in chunks:
            if not samples:
                continue
            if request.finish_reason is not None:  # its extra token is dropped
                request.inflight -= 1
                continue
            visit = present[request]
            arrival = visit.arrival
            ends = len(request.output) + 1 == arrival.output and arrival.max_tokens is not None
            reason = append(request, STOP if ends else visit.number)
            if visit.first is None:
                visit.first = now
            else:
                gaps.append(now - visit.last)
            visit.last = now
            read += 1
            if reason:
                self._end(request, reason)
        if read:
            self.meters.output += read
            self._invariants.read()

    def _add(self, visit: Visit) -> None:
        arrival = visit.arrival
        prefix = -2 - self._prefixes.setdefault(arrival.prefix, len(self._prefixes))
        own = arrival.prompt - arrival.prefix_tokens
        spec = CoreRequest(
            id=str(visit.number),
            prompt=[prefix] * arrival.prefix_tokens + [visit.number] * own,
            max_tokens=arrival.max_tokens or arrival.output,
            stop_token_ids=[STOP],
            tenant=arrival.tenant,
            priority=arrival.priority,
        )
        visit.ended = self.now
        try:
            request = self.scheduler.add(spec, self.now)
        except QueueFull:
            visit.outcome = "queue_full"
            self._invariants.refused(arrival.tenant)
        except ValueError:
            visit.outcome = "too_long"
            self._invariants.too_long(len(spec.prompt) + spec.max_tokens)
        else:
            self._present[request] = visit
            self._invariants.added(request)
            if arrival.abort is not None:
                heapq.heappush(self._leaving, (arrival.abort, visit.number, request))

    def _end(self, request: Request, outcome: str) -> None:
        visit = self._present.pop(request)
        visit.outcome, visit.ended, visit.preemptions = outcome, self.now, request.preemptions
        self._invariants.ended(request, None if outcome == "abort" else visit.arrival.output)
