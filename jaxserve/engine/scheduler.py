"""Who runs in the next step. Pure Python and deterministic: no clock, no device.

Continuous batching with chunked prefill under one token budget: running decodes first, then prompts
under way, then those that wait. A step is planned before the last one's tokens are known, so a request's
length counts tokens in flight. All requests have a rank, by arrival or by priority and arrival. When the pool
is full the one that ranks last is preempted and recomputed later; the first never is, so every one finishes.
"""

import math
from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from jaxserve.config import EngineConfig
from jaxserve.engine.blocks import BlockPool
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.prefix_cache import Node
from jaxserve.engine.request import Request
from jaxserve.engine.waiting import WaitingQueue, rank
from jaxserve.errors import QueueFull
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


class Policy(NamedTuple):
    """How requests compete for the device."""

    aging: float | None = None
    """Seconds of waiting that count as one level of priority; None: priorities play no part."""
    fair_share: bool = True
    """Tenants take turns by the tokens computed for them."""
    prompt_share: float = 0.5
    """A prompt longer than this part of a step's tokens takes at most this part of what is left of them while
    shorter ones are there."""
    max_queued: int | None = None
    """With so many in a line, beside those that could run at once, no request joins it."""


def policy_of(config: EngineConfig) -> Policy:
    aging = config.priority_aging if config.scheduling_policy == "priority" else None
    return Policy(aging, config.fair_share, config.max_prompt_share, config.max_num_queued_reqs)


class Scheduler:
    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        prefix_cache: bool = True,
        policy: Policy = Policy(),  # noqa: B008
    ):
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.policy = policy
        self.waiting = WaitingQueue(policy.fair_share)
        self.running: list[Request] = []
        """In order of rank."""
        self.preemptions = 0
        self._refused: tuple[Request, int] | None = None
        """Who was looked up in the cache and did not fit, and how many blocks were left then."""
        self._requests: dict[str, Request] = {}
        self._slots = deque(range(max_num_seqs))
        self._arrivals = 0
        self._forks: list[Request] = []
        """Who got a slot since the last step."""
        self._most = 0
        """Sequences of a step."""

    def add(self, spec: CoreRequest, now: float = 0.0) -> Request:
        """Queue a new sequence that arrives at `now`, in seconds.

        Raises ValueError for a duplicate id, nothing to do, or one the empty pool cannot hold; QueueFull.
        """
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
        if self.policy.max_queued is not None and not spec.follows:
            waiting = self.waiting.in_line(spec.tenant)
            if waiting >= self.policy.max_queued + (0 if self._refused else len(self._slots)):
                raise QueueFull(f"{waiting} sequences are waiting, and no more may")
        # waiting longer by the aging time is worth one level, an order that never changes
        urgency = 0.0 if self.policy.aging is None else now + spec.priority * self.policy.aging
        request = Request(spec, (urgency, self._arrivals))
        self._arrivals += 1
        self._requests[spec.id] = request
        self.waiting.push(request)
        return request

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of that id."""
        return self._requests.get(request_id)

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def schedule(self, limits: Limits) -> Schedule:
        """Plan the next step and count it as dispatched. No chunks: nothing can run now."""
        planned = self._plan(limits)
        while not planned.chunks and self._make_way():
            planned = self._plan(limits)
        return planned

    def _plan(self, limits: Limits) -> Schedule:
        self._most = limits.seqs
        self._yield_to_priority(limits.seqs)
        wanted = {request: pending for request in self.running if (pending := request.pending)}
        prompts = {request: pending for request, pending in wanted.items() if pending > 1}
        long = self._long(limits.tokens, prompts)
        lengths = self._divide(limits.tokens, wanted, prompts, long) if prompts else wanted
        self._make_room(lengths)
        used = sum(lengths.values())
        admitted = self._admit(limits.seqs, limits.tokens - used, long)
        if prompts:
            self._top_up(lengths, limits.tokens - used - sum(chunk.length for chunk in admitted))
        chunks = [self._chunk(request, length) for request, length in lengths.items()]
        chunks += admitted
        if prompts or admitted:
            chunks.sort(key=lambda chunk: chunk.length > 1)
        entered = [chunk.request for chunk in admitted]
        if chunks and self._forks:
            entered += [fork for fork in self._forks if fork.slot is not None and fork not in entered]
            self._forks = []
        return Schedule(chunks, entered)

    def append(self, request: Request, token: int) -> FinishReason | None:
        """Take a token that a step sampled for the request; the reason if it is the last one.

        Raises GrammarFailed.
        """
        request.inflight -= 1
        return None if request.finish_reason is not None else self._take(request, token)

    def extend(self, request: Request, tokens: Sequence[int]) -> list[int]:
        """Take tokens that nothing samples, up to the request's last one; those that were taken.

        Raises GrammarFailed.
        """
        for count, token in enumerate(tokens, 1):
            if self._take(request, token) is not None:
                return list(tokens[:count])
        return list(tokens)

    def _take(self, request: Request, token: int) -> FinishReason | None:
        if request.matcher is not None:
            request.matcher.take(token)
        request.output.append(token)
        self._commit(request)
        complete = request.matcher is not None and request.matcher.finished
        if complete or token in request.spec.stop_token_ids:
            self.finish(request, "stop")
        elif len(request.output) >= request.spec.max_tokens:
            self.finish(request, "length")
        return request.finish_reason

    def park(self, request: Request) -> None:
        """A step of a beam was read; `go_on` has its next token, in time."""
        request.inflight -= 1
        if request.slot is None:
            self._leave_line(request)

    def go_on(self, request: Request, token: int) -> None:
        """Append to a beam that was parked the token that was chosen for it."""
        request.output.append(token)
        self._commit(request)
        if request.slot is None:
            self.waiting.push(request)

    def fork(self, parent: Request, spec: CoreRequest, token: int) -> Request:
        """A new request for another token after a parked beam's output. It shares the full blocks, and what
        is in the last one is computed again. Without a slot it waits, and shares what the cache has then."""
        request = Request(spec, (*parent.rank[:2], self._arrivals))
        self._arrivals += 1
        self._requests[spec.id] = request
        request.output = [*parent.output, token]
        request.cached = parent.cached
        if parent.slot is None or not self._slots or len(self.running) >= self._most:
            self.waiting.push(request)
            return request
        full = parent.computed // self.pool.block_size
        request.blocks = parent.blocks[:full]
        self.pool.share(request.blocks)
        request.computed = full * self.pool.block_size
        request.chain, request.committed = parent.chain, parent.committed
        request.slot = self._slots.popleft()
        insort(self.running, request, key=rank)
        self._forks.append(request)
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request at any moment. Its blocks are free at once, a step in flight notwithstanding:
        steps run in the order they were dispatched, so the next owner writes after it."""
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        del self._requests[request.id]
        if request.slot is not None:
            self.running.remove(request)
            self._vacate(request)
        elif not request.parked:
            self._leave_line(request)

    def preempt(self, request: Request) -> None:
        """Take a running request off the device; it is recomputed from its tokens later."""
        self.running.remove(request)
        self._vacate(request)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        if not request.parked:
            self.waiting.push(request)

    def _leave_line(self, request: Request) -> None:
        self.waiting.remove(request)
        if self._refused and self._refused[0] is request:
            self._refused = None

    def _make_way(self) -> bool:
        """Preempt a beam where all that run are parked, and what they wait for has no room beside them."""
        first = self.waiting.first()
        stuck = first is not None and not first.inflight and all(r.parked for r in self.running)
        if not stuck or not self.running:
            return False
        self.preempt(self.running[-1])
        return True

    def _yield_to_priority(self, seqs: int) -> None:
        """Preempt running requests for a waiting one that outranks them, if that makes room for it."""
        request = self.waiting.first()
        if self.policy.aging is None or request is None or request.inflight:
            return
        competing = [r for r in self.running if self.waiting.compete(r, request)]
        outranked = [r for r in competing if r.rank > request.rank]
        if not outranked or self._has_room(request, seqs):
            return
        if self.pool.blocks_for(request.length) <= self._unpromised(without=outranked):
            while not self._has_room(request, seqs):
                self.preempt(outranked.pop())

    def _has_room(self, request: Request, seqs: int) -> bool:
        fits = self.pool.blocks_for(request.length) <= self._unpromised()
        return fits and bool(self._slots) and len(self.running) < seqs

    def _divide(
        self, budget: int, wanted: dict[Request, int], prompts: dict[Request, int], long: float
    ) -> dict[Request, int]:
        """How many tokens each running request gets: decodes first, then prompts under way."""
        lengths = {request: pending for request, pending in wanted.items() if pending == 1}
        budget -= len(lengths)
        for request, pending in prompts.items():
            if length := self._share(pending, budget, long):
                lengths[request] = length
                budget -= length
        return lengths

    def _long(self, budget: int, prompts: dict[Request, int]) -> float:
        """More tokens than this make a prompt one that leaves room to shorter ones; infinite without such."""
        long = self.policy.prompt_share * budget
        under_way = any(pending <= long for pending in prompts.values())
        candidates = islice(self.waiting, len(self._slots))
        return long if under_way or any(request.length <= long for request in candidates) else math.inf

    def _share(self, wanted: int, budget: int, long: float) -> int:
        return min(wanted, math.ceil(self.policy.prompt_share * budget) if wanted > long else budget)

    def _top_up(self, lengths: dict[Request, int], budget: int) -> None:
        """Give what nobody else could use to the prompts under way."""
        under_way = [(request, length) for request, length in lengths.items() if request.pending > length]
        if not under_way:
            return
        free = self.pool.free - sum(self._new_blocks(request, length) for request, length in lengths.items())
        for request, length in under_way:
            more = min(request.pending - length, budget)
            blocks = self._new_blocks(request, length + more) - self._new_blocks(request, length)
            if more > 0 and blocks <= free:
                lengths[request] += more
                budget -= more
                free -= blocks

    def _make_room(self, lengths: dict[Request, int]) -> None:
        """Preempt those that rank last until the others' tokens fit the pool. Alone, the first fits."""
        if sum(lengths.values()) <= self.pool.free:  # a token starts one block at most
            return
        needed = sum(self._new_blocks(request, length) for request, length in lengths.items())
        while needed > self.pool.free:
            victim = self.running[-1]
            needed -= self._new_blocks(victim, lengths.pop(victim, 0))
            self.preempt(victim)

    def _admit(self, seqs: int, budget: int, long: float) -> list[Chunk]:
        """First chunks of waiting requests, as many as slots, budget and the pool have room for."""
        admitted: list[Chunk] = []
        while budget > 0 and self._slots and len(self.running) < seqs:
            request = self.waiting.first()
            # a preempted request needs its token that is still in flight
            if request is None or request.inflight:
                break
            room = self._unpromised()
            if (request, room) == self._refused or not self._take_cached(request, room):
                self._refused = request, room
                break
            self._refused = None
            self.waiting.remove(request)
            insort(self.running, request, key=rank)
            request.slot = self._slots.popleft()
            admitted.append(self._chunk(request, self._share(request.pending, budget, long)))
            budget -= admitted[-1].length
        return admitted

    def _unpromised(self, without: Sequence[Request] = ()) -> int:
        """Blocks that are free once those `without` are preempted, less what the others' tokens need."""
        leaving = set(without)
        owned = Counter(block for request in leaving for block in request.blocks)
        freed = sum(self.pool.references(block) == owners for block, owners in owned.items())
        staying = (request for request in self.running if request not in leaving)
        return self.pool.free + freed - sum(self._new_blocks(r, r.pending) for r in staying)

    def _take_cached(self, request: Request, room: int) -> bool:
        """Give a waiting request the blocks that the cache has for it, unless it does not fit `room` blocks.

        Its last token is computed in any case, for the next one, and those that tell logprobs of the prompt.
        Blocks are committed as soon as the step that writes them is planned: steps run in that order, and a
        step writes before it reads.
        """
        pool, size = self.pool, self.pool.block_size
        blocks: list[int] = []
        chain: Node = request.spec.cache_salt
        if self.prefix_cache:
            unscored = request.unscored(0, request.length)
            tokens = request.tokens(0, unscored.start if unscored else request.length - 1)
            blocks, chain = pool.cache.match(request.spec.cache_salt, tokens, size)
        revived = sum(not pool.references(block) for block in blocks)
        if pool.blocks_for(request.length) - len(blocks) + revived > room:
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
        if not self.prefix_cache or request.slot is None:
            return
        size = self.pool.block_size
        full = min(request.computed, request.known) // size
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
        new: list[int] = []
        if count := self._new_blocks(request, length):
            allocated = self.pool.allocate(count)
            assert allocated is not None
            new = allocated
            request.blocks += new
        samples = start + length == request.length
        request.computed += length
        request.inflight += samples
        self.waiting.charge(request, length)
        self._commit(request)
        return Chunk(request, start, length, new, samples)

    def _vacate(self, request: Request) -> None:
        self.pool.release(reversed(request.blocks))  # the end of a chain is worth least
        request.blocks = []
        assert request.slot is not None
        self._slots.append(request.slot)
        request.slot = None
