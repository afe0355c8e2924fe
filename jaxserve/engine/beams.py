"""Beam search: the likeliest sequences of a prompt, by trying several ways to go on at every token.

A beam is a request like any other, but its next token is chosen here, once all beams of its search have read
their step: until then it is parked. One that goes on in several ways is forked; the forks share its full
blocks. Scores and ends are those of transformers' `generate(num_beams=…)`.
"""

import math
from typing import NamedTuple

from msgspec.structs import replace

from jaxserve.engine.messages import BeamSearch, CoreOutput, CoreRequest, TokenLogprobs
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Scheduler
from jaxserve.outputs import FinishReason
from jaxserve.sampling_params import MAX_LOGPROBS


class Beam:
    """What a request is to its search."""

    __slots__ = ("candidates", "logprobs", "search", "total")

    def __init__(self, search: "Search", total: float = 0.0, logprobs: tuple[TokenLogprobs, ...] = ()):
        self.search = search
        self.total = total
        """The log probability of its output."""
        self.logprobs = logprobs
        """Of the output's tokens."""
        self.candidates: TokenLogprobs | None = None
        """What may be its next token, once a step has told."""


class Step(NamedTuple):
    """A way for a beam to go on."""

    total: float
    request: Request
    token: int
    logprobs: TokenLogprobs


class Hypothesis(NamedTuple):
    """A sequence that has ended."""

    score: float
    tokens: list[int]
    logprobs: list[TokenLogprobs]
    reason: FinishReason


class Search:
    """One prompt's search."""

    first: Request
    """The beam that it began with."""

    def __init__(self, spec: CoreRequest, asked: BeamSearch):
        self.spec = spec
        self.asked = asked
        self.live: list[Request] = []
        """The beams, the likeliest first."""
        self.finished: list[Hypothesis] = []
        """At most as many as beams, the best first."""
        self.begun = 0
        """Beams so far."""

    def next_spec(self) -> CoreRequest:
        """Of a new beam: nothing but the search ends it."""
        self.begun += 1
        return replace(
            self.spec,
            id=f"{self.spec.id}/{self.begun}",
            logprobs=MAX_LOGPROBS,
            stop_token_ids=[],
            follows=self.spec.follows or self.begun > 1,
        )

    def choose(self) -> list[Step]:
        """The likeliest ways on, once all beams have candidates; none at the end of the search.

        Of the `width` likeliest those that end become finished, of the others the `width` likeliest go on.
        """
        width, stops = self.asked.width, self.spec.stop_token_ids
        options = [step for request in self.live for step in self._steps(request)]
        options.sort(key=lambda step: -step.total)
        length = len(self.live[0].output) + 1
        last = length == self.spec.max_tokens
        for step in options[:width]:
            if last or step.token in stops:
                self.finished.append(self._hypothesis(step, length))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[width:]
        steps = [step for step in options if step.token not in stops][:width]
        return [] if last or not steps or not self._may_improve(steps[0].total, length) else steps

    def _steps(self, request: Request) -> list[Step]:
        beam, asked = request.beam, self.spec.logprobs or 0
        assert beam is not None and beam.candidates is not None
        tokens, logprobs = beam.candidates.token_ids[1:], beam.candidates.logprobs[1:]
        top = tokens[:asked], logprobs[:asked]
        return [
            Step(beam.total + own, request, token, TokenLogprobs([token, *top[0]], [own, *top[1]], rank))
            for rank, (token, own) in enumerate(zip(tokens, logprobs, strict=True), 1)
        ]

    def _hypothesis(self, step: Step, length: int) -> Hypothesis:
        assert step.request.beam is not None
        return Hypothesis(
            self._score(step.total, length),
            [*step.request.output, step.token],
            [*step.request.beam.logprobs, step.logprobs],
            "stop" if step.token in self.spec.stop_token_ids else "length",
        )

    def _may_improve(self, best: float, length: int) -> bool:
        """Whether the likeliest beam, of that log probability, may become better than what has finished."""
        if len(self.finished) < self.asked.width:
            return True
        if self.asked.early_stopping is True:
            return False
        grows = self.asked.early_stopping == "never" and self.asked.length_penalty > 0
        return self._score(best, self.spec.max_tokens if grows else length) > self.finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(length, self.asked.length_penalty)


class Searches:
    """Those of one core, by the ids of their requests."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._searches: dict[str, Search] = {}

    def add(self, spec: CoreRequest, now: float) -> Request:
        """The first beam. Raises what `Scheduler.add` does."""
        assert spec.beams is not None
        search = Search(spec, spec.beams)
        request = self._scheduler.add(search.next_spec(), now)
        request.beam = Beam(search)
        search.live, search.first = [request], request
        self._searches[spec.id] = search
        return request

    def abort(self, id: str) -> None:
        """End a search. Nothing happens for an unknown id."""
        if search := self._searches.get(id):
            self.end(search, "abort")

    def end(self, search: Search, reason: FinishReason) -> None:
        del self._searches[search.spec.id]
        for request in search.live:
            self._scheduler.finish(request, reason)

    def take(self, request: Request, candidates: TokenLogprobs) -> list[CoreOutput]:
        """What a step says of a beam's next token: the sequences that were found, once the search is done."""
        beam = request.beam
        assert beam is not None
        self._scheduler.park(request)
        beam.candidates = candidates
        search = beam.search
        if any(not other.parked for other in search.live):
            return []
        steps = search.choose()
        if not steps:
            self.end(search, "length")
            return _results(search)
        self._go_on(search, steps)
        return []

    def _go_on(self, search: Search, steps: list[Step]) -> None:
        """The first way of a beam is its own, the others are taken by forks. Beams without any end."""
        staying = {step.request for step in steps}
        for request in search.live:
            if request not in staying:
                self._scheduler.finish(request, "stop")
        live: list[tuple[Request, Beam]] = []
        for step in steps:
            beam, request = step.request.beam, step.request
            assert beam is not None
            if request in staying:
                staying.remove(request)
            else:
                request = self._scheduler.fork(request, search.next_spec(), step.token)
            live.append((request, Beam(search, step.total, (*beam.logprobs, step.logprobs))))
        for step, (request, beam) in zip(steps, live, strict=True):
            request.beam = beam
            if request is step.request:
                self._scheduler.go_on(request, step.token)
        search.live = [request for request, _ in live]


def _results(search: Search) -> list[CoreOutput]:
    """The best sequences, under the ids that are asked for."""
    first = search.first
    assert first.scheduled_at is not None
    return [
        CoreOutput(
            id=id,
            token_ids=found.tokens,
            logprobs=found.logprobs,
            finish_reason=found.reason,
            stop_token=found.tokens[-1] if found.reason == "stop" else None,
            cached_tokens=first.cached,
            times=(first.queued_at, first.scheduled_at),
        )
        for id, found in zip(search.asked.ids, search.finished, strict=False)
    ]
