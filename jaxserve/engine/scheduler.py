"""Who runs in the next step. Pure Python and deterministic: no clock, no device.

Continuous batching with chunked prefill under one token budget: running decodes first, then prompts
under way, then new requests in order of arrival. A step is planned before the last one's tokens are
known, so a request's length counts tokens in flight. When the pool is full the newest request is
preempted and recomputed later; the oldest never is, so every request finishes.
"""

from collections import deque
from typing import NamedTuple

from jaxserve.engine.blocks import BlockPool
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.request import Request
from jaxserve.outputs import FinishReason


class Limits(NamedTuple):
    """The largest step that can run: grows while programs are being compiled."""

    seqs: int
    tokens: int


class Chunk(NamedTuple):
    """Tokens `start` to `start + length` of one request, to be computed in one step."""

    request: Request
    start: int
    length: int
    new_blocks: list[int]
    """Blocks that the step adds at the end of the request's table."""
    samples: bool
    """Whether the chunk reaches the end of the sequence, so that a token is sampled."""


class Schedule(NamedTuple):
    """One step: its chunks (single tokens first) and those of its requests that enter the device."""

    chunks: list[Chunk]
    admitted: list[Request]


class Scheduler:
    def __init__(self, pool: BlockPool, max_num_seqs: int):
        self.pool = pool
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        """In order of arrival."""
        self.preemptions = 0
        self._requests: dict[str, Request] = {}
        self._slots = deque(range(max_num_seqs))
        self._arrivals = 0

    def add(self, spec: CoreRequest) -> Request:
        """Queue a new sequence. Raises ValueError for a duplicate id or one the empty pool cannot hold."""
        if spec.id in self._requests:
            raise ValueError(f"request {spec.id!r} exists already")
        tokens = len(spec.prompt) + spec.max_tokens
        # the last token is never fed back, so its key and value need no place
        if not spec.prompt or self.pool.blocks_for(tokens - 1) > self.pool.capacity:
            raise ValueError(
                f"a prompt of {len(spec.prompt)} tokens and {spec.max_tokens} to generate do not fit the pool's "
                f"{self.pool.capacity} blocks of {self.pool.block_size} tokens"
            )
        request = Request(spec, self._arrivals)
        self._arrivals += 1
        self._requests[spec.id] = request
        self.waiting.append(request)
        return request

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of that id."""
        return self._requests.get(request_id)

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def schedule(self, limits: Limits) -> Schedule:
        """Plan the next step and count it as dispatched. No chunks: nothing can run now."""
        chunks: dict[str, Chunk] = {}
        budget = limits.tokens
        for request in sorted(self.running, key=lambda r: (r.pending > 1, r.arrival)):
            length = min(request.pending, budget)
            if length > 0 and request.slot is not None and self._make_room(request, length, chunks):
                chunks[request.id] = self._chunk(request, length)
                budget -= length
        admitted = self._admit(limits, budget, chunks)
        for chunk in chunks.values():
            chunk.request.computed += chunk.length
            chunk.request.inflight += chunk.samples
        return Schedule(sorted(chunks.values(), key=lambda c: c.length > 1), admitted)

    def append(self, request: Request, token: int) -> FinishReason | None:
        """Take a token that a step sampled for the request; the reason if it is the last one."""
        request.inflight -= 1
        if request.finish_reason is not None:
            return None
        request.output.append(token)
        if token in request.spec.stop_token_ids:
            self.finish(request, "stop")
        elif len(request.output) >= request.spec.max_tokens:
            self.finish(request, "length")
        return request.finish_reason

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request at any moment. Its blocks are free at once, a step in flight notwithstanding:
        steps run in the order they were dispatched, so the next owner writes after it."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        del self._requests[request.id]
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._vacate(request)

    def preempt(self, request: Request) -> None:
        """Take a running request off the device; it is recomputed from its tokens later."""
        self.running.remove(request)
        self._vacate(request)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        # keep the queue in order of arrival
        ahead = 0
        while ahead < len(self.waiting) and self.waiting[ahead].arrival < request.arrival:
            ahead += 1
        self.waiting.insert(ahead, request)

    def _admit(self, limits: Limits, budget: int, chunks: dict[str, Chunk]) -> list[Request]:
        admitted: list[Request] = []
        promised = sum(self._missing(request) for request in self.running)
        while self.waiting and budget > 0 and self._slots and len(self.running) < limits.seqs:
            request = self.waiting[0]
            if request.inflight or self.pool.blocks_for(request.length) > self.pool.free - promised:
                break
            self.waiting.popleft()
            self.running.append(request)
            self.running.sort(key=lambda r: r.arrival)
            request.slot = self._slots.popleft()
            admitted.append(request)
            length = min(request.pending, budget)
            chunks[request.id] = self._chunk(request, length)
            promised += self._missing(request)
            budget -= length
        return admitted

    def _missing(self, request: Request) -> int:
        """Blocks that the request's tokens so far still need."""
        return max(0, self.pool.blocks_for(request.length) - len(request.blocks))

    def _chunk(self, request: Request, length: int) -> Chunk:
        """The request's next `length` tokens, with blocks that are known to be free."""
        start = request.computed
        new = self.pool.allocate(max(0, self.pool.blocks_for(start + length) - len(request.blocks)))
        assert new is not None
        request.blocks += new
        return Chunk(request, start, length, new, start + length == request.length)

    def _make_room(self, request: Request, length: int, chunks: dict[str, Chunk]) -> bool:
        """Preempt the newest requests until `length` more tokens fit; False if that was `request` itself."""
        needed = self.pool.blocks_for(request.computed + length) - len(request.blocks)
        while needed > self.pool.free:
            victim = self.running[-1]
            chunks.pop(victim.id, None)
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _vacate(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        assert request.slot is not None
        self._slots.append(request.slot)
        request.slot = None
