"""The scheduler in an engine without a device: the real packing over a toy model in plain Python.

The toy model's next token is a function of all tokens before it, which it reads out of the pool through
the block tables, so a wrong block, slot, position or token anywhere changes what a request generates.
"""

import zlib
from collections import Counter, deque

from jaxserve.engine.batch import FROM_DEVICE, Bucket, StepLayout
from jaxserve.engine.blocks import DUMMY, BlockPool
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Chunk, Limits, Policy, Schedule, Scheduler
from jaxserve.engine.waiting import rank

VOCAB = 40
LOST = None


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCAB


def expected_output(spec: CoreRequest) -> list[int]:
    output: list[int] = []
    while len(output) < spec.max_tokens:
        output.append(next_token(spec.prompt + output))
        if output[-1] in spec.stop_token_ids:
            break
    return output


class ToyDevice:
    """Runs packed steps in the order they are dispatched, as the compiled programs do."""

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int):
        self.block_size = block_size
        self.pool = [[LOST] * block_size for _ in range(num_blocks)]
        self.tables = [dict[int, int]() for _ in range(max_num_seqs + 1)]
        self.last_token = [LOST] * (max_num_seqs + 1)

    def admit(self, request: Request) -> None:
        self.tables[request.slot] = dict(enumerate(request.blocks))

    def run(self, layout: StepLayout, packed) -> list[int | None]:
        """The token of every row; garbage where the row does not sample."""
        step = {name: view.tolist() for name, view in layout.fields(packed).items()}
        dummy = len(self.tables) - 1
        for slot, index, block in zip(
            step["update_slot"], step["update_index"], step["update_block"], strict=True
        ):
            assert (slot == dummy) == (block == DUMMY)
            self.tables[slot][index] = block
        rows = zip(step["slots"], step["starts"], step["q_lens"], step["samples"], strict=True)
        rows, at = list(rows), 0
        for slot, start, length, _ in rows:  # all is written before anything is read
            for position, token in enumerate(step["tokens"][at : at + length], start):
                token = self.last_token[slot] if token == FROM_DEVICE else token
                block = self.tables[slot][position // self.block_size]
                self.pool[block][position % self.block_size] = token
            at += length
        sampled = []
        for slot, start, length, samples in rows:
            if not length:
                assert (slot, samples) == (dummy, 0)
                continue
            table = self.tables[slot]
            context = [
                self.pool[table[i // self.block_size]][i % self.block_size] for i in range(start + length)
            ]
            token = next_token(context) if LOST not in context else LOST
            if samples:
                self.last_token[slot] = token
            sampled.append(token)
        return sampled


class ToyEngine:
    """Turns the scheduler as the core does, with steps in flight, and checks its promises at every turn."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        depth: int = 1,
        prefix_cache: bool = True,
        policy: Policy = Policy(),  # noqa: B008
    ):
        self.depth = depth
        """Steps whose tokens are unread while the next one is planned."""
        self.max_num_seqs = max_num_seqs
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, max_num_seqs, prefix_cache, policy)
        self.device = ToyDevice(num_blocks, block_size, max_num_seqs)
        self.flights: deque[list[tuple[Chunk, int | None]]] = deque()
        self.requests: list[Request] = []
        self.turns = 0
        self._computed: dict[Request, int] = {}

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        stop: list[int] = [],  # noqa: B006
        salt: str = "",
        tenant: str = "",
        priority: int = 0,
        now: float = 0.0,
        follows: bool = False,
    ) -> Request:
        spec = CoreRequest(
            id=str(len(self.requests)),
            prompt=prompt,
            max_tokens=max_tokens,
            stop_token_ids=stop,
            cache_salt=salt,
            tenant=tenant,
            priority=priority,
            follows=follows,
        )
        self.requests.append(self.scheduler.add(spec, now))
        return self.requests[-1]

    def step(self, limits: Limits) -> Schedule:
        """Dispatch a step, then read the one that was dispatched `depth` steps before it."""
        self.turns += 1
        before = list(self.scheduler.running)
        decoding = [request for request in before if request.pending == 1]
        schedule = self.scheduler.schedule(limits)
        self._check_schedule(schedule, limits, before, decoding)
        for request in schedule.admitted:
            self.device.admit(request)
        if schedule.chunks:
            bucket = Bucket(limits.tokens + 1, limits.seqs)
            layout = StepLayout(bucket, self.pool.block_size)
            packed = layout.pack(schedule.chunks, dummy_slot=self.max_num_seqs)
            self.flights.append(list(zip(schedule.chunks, self.device.run(layout, packed), strict=True)))
        if self.flights and (len(self.flights) > self.depth or not schedule.chunks):
            for chunk, token in self.flights.popleft():
                if chunk.samples:
                    assert chunk.request.finish_reason or token is not LOST
                    self.scheduler.append(chunk.request, token)
        self.check_state(limits)
        return schedule

    def run(self, limits: Limits) -> None:
        """Step until nothing is left."""
        idle = 0
        while self.scheduler.unfinished or self.flights:
            idle = 0 if self.step(limits).chunks else idle + 1
            assert idle <= self.depth + 1, "nothing moves"
        self.check_finished()

    def abort(self, request: Request) -> None:
        self.scheduler.finish(request, "abort")

    def lose_device(self) -> None:
        """What the core does when a step fails: pool and slots are gone, all is recomputed."""
        for chunk, _ in [item for flight in self.flights for item in flight]:
            chunk.request.inflight = 0
        self.flights.clear()
        self.pool.cache.clear()
        for request in list(self.scheduler.running):
            self.scheduler.preempt(request)
        self.device = ToyDevice(self.pool.num_blocks, self.pool.block_size, self.max_num_seqs)

    def _check_schedule(
        self, schedule: Schedule, limits: Limits, before: list[Request], decoding: list[Request]
    ) -> None:
        chunks, running = schedule.chunks, self.scheduler.running
        scheduled = {chunk.request for chunk in chunks}
        assert len(scheduled) == len(chunks) <= limits.seqs
        assert sum(chunk.length for chunk in chunks) <= limits.tokens
        singles = [chunk.length == 1 for chunk in chunks]
        assert singles == sorted(singles, reverse=True)
        for request in before:
            if request not in running:
                del self._computed[request]
        starts = {chunk.request: chunk.start for chunk in chunks}
        for request in schedule.admitted:
            self._computed[request] = starts[request]
            assert starts[request] % self.pool.block_size == 0
        for request, start, length, _, samples in chunks:
            assert length > 0 and start == self._computed[request]
            self._computed[request] += length
            assert samples == (start + length == request.length - samples)
        # whoever decodes and stays gets a token
        assert scheduled.issuperset(request for request in decoding if request in running)
        stayed = [r for r in before if r in running and r not in schedule.admitted]
        if self.scheduler.policy.aging is None:  # the first stays, and others give way from the end
            assert before[:1] == stayed[:1] and before[: len(stayed)] == stayed
        assert running == sorted(stayed + schedule.admitted, key=rank)
        if not self.flights:
            assert chunks or not self.scheduler.unfinished

    def check_state(self, limits: Limits) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert len(running) <= limits.seqs
        everyone = {request.rank for request in [*running, *waiting]}
        assert self.scheduler.unfinished == len(everyone) == len(running) + len(waiting)
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(self.max_num_seqs))
        assert all(request.slot is None and not request.blocks for request in waiting)
        for request in running:
            assert len(request.blocks) == self.pool.blocks_for(request.computed)
            assert request.computed <= request.length
        owned = Counter(block for request in running for block in request.blocks)
        assert len(owned) == self.pool.used and DUMMY not in owned
        assert all(self.pool.references(block) == count for block, count in owned.items())
        for request in running:  # what others share is full, so nobody writes to it
            for i, block in enumerate(request.blocks):
                assert owned[block] == 1 or (i + 1) * self.pool.block_size <= request.computed
        for request in list(self._computed):
            if request not in running:
                del self._computed[request]

    def check_finished(self) -> None:
        """Nothing is left, and every request that was not aborted has exactly its tokens."""
        assert self.pool.used == 0 and self.pool.free == self.pool.capacity
        assert not self.scheduler.running and not self.scheduler.waiting
        for request in self.requests:
            wanted = expected_output(request.spec)
            assert request.inflight == 0 and request.finish_reason is not None
            if request.finish_reason == "abort":
                assert request.output == wanted[: len(request.output)]
            else:
                assert request.output == wanted
                stopped = bool(wanted) and wanted[-1] in request.spec.stop_token_ids
                assert request.finish_reason == ("stop" if stopped else "length")
