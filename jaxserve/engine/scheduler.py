"""Who runs in the next step. Pure Python and deterministic: no clock, no device.

Continuous batching with chunked prefill under one token budget: running decodes first, then prompts
under way, then new requests in order of arrival. A step is planned before the last one's tokens are
known, so a request's length counts tokens in flight. When the pool is full the newest request is
preempted and recomputed later; the oldest never is, so every request finishes.
"""

from bisect import insort
from collections import deque
from typing import NamedTuple

from jaxserve.engine.blocks import BlockPool
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.prefix_cache import Node
from jaxserve.engine.request import Request
from jaxserve.outputs import FinishReason


class Limits(NamedTuple):
    """The largest step that can run: grows while programs are being compiled."""

    seqs: int
    tokens: int
    """At least `seqs`, so that every running request moves in every step."""


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
    def __init__(self, pool: BlockPool, max_num_seqs: int, prefix_cache: bool = True):
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.waiting: deque[Request] = deque()
        """In order of arrival, and all of them newer than those that run."""
        self.running: list[Request] = []
        """In order of arrival."""
        self.preemptions = 0
        self._refused: tuple[Request, int] | None = None
        """Who was looked up in the cache and did not fit, and how many blocks were free then."""
        self._requests: dict[str, Request] = {}
        self._slots = deque(range(max_num_seqs))
        self._arrivals = 0

    def add(self, spec: CoreRequest) -> Request:
        """Queue a new sequence. Raises ValueError for a duplicate id, nothing to do, or one the empty pool
        cannot hold."""
        if spec.id in self._requests:
            raise ValueError(f"request {spec.id!r} exists already")
        if not spec.prompt or spec.max_tokens < 1:
            raise ValueError("a request needs a prompt of at least one token and one token to generate")
        # the last token is never fed back, so its key and value need no place
        if self.pool.blocks_for(len(spec.prompt) + spec.max_tokens - 1) > self.pool.capacity:
            raise ValueError(
                f"a prompt of {len(spec.prompt)} tokens and {spec.max_tokens} to generate do not fit "
                f"the pool's {self.pool.capacity} blocks of {self.pool.block_size} tokens"
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
        lengths, budget = self._divide(limits.tokens)
        self._make_room(lengths)
        chunks = [self._chunk(request, length) for request, length in lengths.items()]
        admitted = self._admit(limits.seqs, budget)
        chunks += admitted
        chunks.sort(key=lambda chunk: chunk.length > 1)
        return Schedule(chunks, [chunk.request for chunk in admitted])

    def append(self, request: Request, token: int) -> FinishReason | None:
        """Take a token that a step sampled for the request; the reason if it is the last one."""
        request.inflight -= 1
        if request.finish_reason is not None:
            return None
        request.output.append(token)
        self._commit(request)
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
        insort(self.waiting, request, key=lambda r: r.arrival)

    def _divide(self, budget: int) -> tuple[dict[Request, int], int]:
        """How many tokens each running request gets, decodes first, and what is left of the budget."""
        lengths = {}
        pending = [(request, request.pending) for request in self.running]
        for request, wanted in sorted(pending, key=lambda item: item[1] > 1):
            if length := min(wanted, budget):
                lengths[request] = length
                budget -= length
        return lengths, budget

    def _make_room(self, lengths: dict[Request, int]) -> None:
        """Preempt the newest requests until the others' tokens fit the pool. Alone, the oldest fits."""
        needed = sum(self._new_blocks(request, length) for request, length in lengths.items())
        while needed > self.pool.free:
            victim = self.running[-1]
            needed -= self._new_blocks(victim, lengths.pop(victim, 0))
            self.preempt(victim)

    def _admit(self, seqs: int, budget: int) -> list[Chunk]:
        """First chunks of waiting requests, as many as slots, budget and the pool have room for.

        A budget that is left means that the prompts under way have all their blocks.
        """
        admitted: list[Chunk] = []
        while self.waiting and budget > 0 and self._slots and len(self.running) < seqs:
            request = self.waiting[0]
            # a preempted request needs its token that is still in flight
            if request.inflight or (request, self.pool.free) == self._refused:
                break
            if not self._take_cached(request):
                self._refused = request, self.pool.free
                break
            self.waiting.popleft()
            self.running.append(request)
            request.slot = self._slots.popleft()
            admitted.append(self._chunk(request, min(request.pending, budget)))
            budget -= admitted[-1].length
        return admitted

    def _take_cached(self, request: Request) -> bool:
        """Give a waiting request the blocks that the cache has for it, unless the others it needs do not fit.

        Its last token is computed in any case: that gives the next one. Blocks are committed as soon as
        the step that writes them is planned: steps run in that order, and a step writes before it reads.
        """
        pool, size = self.pool, self.pool.block_size
        blocks: list[int] = []
        chain: Node = request.spec.cache_salt
        if self.prefix_cache:
            tokens = request.tokens(0, request.length - 1)
            blocks, chain = pool.cache.match(request.spec.cache_salt, tokens, size)
        revived = sum(not pool.references(block) for block in blocks)
        if pool.blocks_for(request.length) - len(blocks) + revived > pool.free:
            return False
        pool.share(blocks)
        request.blocks, request.chain, request.committed = blocks, chain, len(blocks)
        request.computed = len(blocks) * size
        if request.cached is None:
            request.cached = request.computed
            if self.prefix_cache:
                pool.cache.queries += len(request.spec.prompt)
                pool.cache.hits += request.cached
        return True

    def _commit(self, request: Request) -> None:
        """Let the cache know the request's full blocks whose tokens the host knows."""
        size = self.pool.block_size
        full = min(request.computed, request.known) // size
        if not self.prefix_cache or request.slot is None:
            return
        for i in range(request.committed, full):
            tokens = request.tokens(i * size, size)
            request.chain = self.pool.cache.commit(request.chain, tokens, request.blocks[i])
            request.committed = i + 1

    def _new_blocks(self, request: Request, length: int) -> int:
        """Blocks that the request's next `length` tokens need beyond those it has."""
        return max(0, self.pool.blocks_for(request.computed + length) - len(request.blocks))

    def _chunk(self, request: Request, length: int) -> Chunk:
        """The request's next `length` tokens, counted as dispatched; the blocks they need must be free."""
        start = request.computed
        new = self.pool.allocate(self._new_blocks(request, length))
        assert new is not None
        request.blocks += new
        samples = start + length == request.length
        request.computed += length
        request.inflight += samples
        self._commit(request)
        return Chunk(request, start, length, new, samples)

    def _vacate(self, request: Request) -> None:
        self.pool.release(reversed(request.blocks))  # the end of a chain is worth least
        request.blocks = []
        assert request.slot is not None
        self._slots.append(request.slot)
        request.slot = None
