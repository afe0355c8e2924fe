"""The scheduler in an engine without a device: the real packing over a toy model in plain Python.

The toy model's next token is a function of all tokens before it, which it reads out of the pool through
the block tables, so a wrong block, slot, position or token anywhere changes what a request generates.
"""

import random
import subprocess
import sys
import zlib
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.batch import FROM_DEVICE, Bucket, StepLayout
from jaxserve.engine.blocks import DUMMY, BlockPool
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Chunk, Limits, Schedule, Scheduler

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

    def run(self, layout: StepLayout, packed) -> list[int | None]:
        """The token of every row; garbage where the row does not sample."""
        step = {name: view.tolist() for name, view in layout.fields(packed).items()}
        dummy = len(self.tables) - 1
        for slot, index, block in zip(
            step["update_slot"], step["update_index"], step["update_block"], strict=True
        ):
            assert (slot == dummy) == (block == DUMMY)
            self.tables[slot][index] = block
        sampled, at = [], 0
        for slot, start, length, samples in zip(
            step["slots"], step["starts"], step["q_lens"], step["samples"], strict=True
        ):
            if not length:
                assert (slot, samples) == (dummy, 0)
                continue
            table = self.tables[slot]
            for position, token in enumerate(step["tokens"][at : at + length], start):
                token = self.last_token[slot] if token == FROM_DEVICE else token
                self.pool[table[position // self.block_size]][position % self.block_size] = token
            at += length
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

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int, depth: int = 1):
        self.depth = depth
        """Steps whose tokens are unread while the next one is planned."""
        self.max_num_seqs = max_num_seqs
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, max_num_seqs)
        self.device = ToyDevice(num_blocks, block_size, max_num_seqs)
        self.flights: deque[list[tuple[Chunk, int | None]]] = deque()
        self.requests: list[Request] = []
        self._computed: dict[Request, int] = {}

    def add(self, prompt: list[int], max_tokens: int, stop: list[int] = []) -> Request:  # noqa: B006
        spec = CoreRequest(
            id=str(len(self.requests)), prompt=prompt, max_tokens=max_tokens, stop_token_ids=stop
        )
        self.requests.append(self.scheduler.add(spec))
        return self.requests[-1]

    def step(self, limits: Limits) -> Schedule:
        """Dispatch a step, then read the one that was dispatched `depth` steps before it."""
        before = list(self.scheduler.running)
        decoding = [request for request in before if request.pending == 1]
        schedule = self.scheduler.schedule(limits)
        self._check_schedule(schedule, limits, before, decoding)
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
        self._computed.update(dict.fromkeys(schedule.admitted, 0))
        for request, start, length, _, samples in chunks:
            assert length > 0 and start == self._computed[request]
            self._computed[request] += length
            assert samples == (start + length == request.length - samples)
        # the oldest stays, and whoever decodes and stays gets a token
        assert before[:1] == running[: len(before[:1])]
        assert scheduled.issuperset(request for request in decoding if request in running)
        # older requests were not passed by those that came in
        assert before[: len(running) - len(schedule.admitted)] + schedule.admitted == running
        if not self.flights:
            assert chunks or not self.scheduler.unfinished

    def check_state(self, limits: Limits) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert len(running) <= limits.seqs
        arrivals = [request.arrival for request in [*running, *waiting]]
        assert arrivals == sorted(set(arrivals))
        assert self.scheduler.unfinished == len(arrivals)
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots) and set(slots) <= set(range(self.max_num_seqs))
        assert all(request.slot is None and not request.blocks for request in waiting)
        for request in running:
            assert len(request.blocks) == self.pool.blocks_for(request.computed)
            assert request.computed <= request.length
        owned = [block for request in running for block in request.blocks]
        assert len(set(owned)) == len(owned) == self.pool.used and DUMMY not in owned
        assert all(self.pool.references(block) == 1 for block in owned)
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


def play(rng: random.Random, steps: int) -> ToyEngine:
    """Random traffic over a random small engine: arrivals, aborts, lost devices, limits that grow."""
    block_size = rng.choice([1, 2, 3, 4, 16])
    max_num_seqs = rng.randint(1, 8)
    engine = ToyEngine(rng.randint(2, 24), block_size, max_num_seqs, rng.choice([0, 1, 1, 2, 3]))
    room = engine.pool.capacity * block_size + 1
    most = Limits(max_num_seqs, max_num_seqs + rng.choice([0, 1, 3, 8, 64]))
    seqs = rng.randint(1, max_num_seqs)
    limits = Limits(seqs, rng.randint(seqs, most.tokens))
    arrivals = rng.random()
    for _ in range(steps):
        while rng.random() < arrivals and engine.scheduler.unfinished < 20:
            prompt = rng.randint(1, room - 1)
            prompt = min(prompt, rng.choice([1, 4, 16, 256]))
            max_tokens = rng.randint(1, min(room - prompt, 24))
            stop = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 2]))]
            engine.add([rng.randrange(VOCAB) for _ in range(prompt)], max_tokens, stop)
        if rng.random() < 0.05:
            engine.abort(rng.choice(engine.requests)) if engine.requests else None
        if rng.random() < 0.01:
            engine.lose_device()
        if rng.random() < 0.1 and limits != most:
            seqs = rng.randint(limits.seqs, most.seqs)
            limits = Limits(seqs, rng.randint(max(seqs, limits.tokens), most.tokens))
        engine.step(limits)
    engine.run(limits)
    return engine


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_request_gets_its_tokens(rng):
    play(rng, 40)


def test_thousands_of_steps():
    preemptions = stopped = aborted = 0
    for seed in range(60):
        engine = play(random.Random(seed), 150)
        preemptions += engine.scheduler.preemptions
        stopped += sum(request.finish_reason == "stop" for request in engine.requests)
        aborted += sum(request.finish_reason == "abort" for request in engine.requests)
    # the traffic really went to where it hurts
    assert preemptions > 500 and stopped > 100 and aborted > 100


def test_imports_neither_jax_nor_numpy():
    code = (
        "import sys, jaxserve.engine.scheduler\n"
        "print([m for m in ('jax', 'numpy', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_small_pool_and_many_requests():
    engine = ToyEngine(num_blocks=41, block_size=16, max_num_seqs=16)
    for i in range(64):
        engine.add([i % VOCAB] * (i % 50 + 1), 200)
    engine.run(Limits(16, 64))
    assert engine.scheduler.preemptions > 0


def test_a_long_prompt_does_not_stop_decodes():
    engine = ToyEngine(num_blocks=100, block_size=4, max_num_seqs=4)
    limits = Limits(4, 8)
    decoding = [engine.add([i], 60) for i in range(3)]
    engine.step(limits)
    long = engine.add([7] * 200, 4)
    while long.pending > 1:
        lengths = {chunk.request: chunk.length for chunk in engine.step(limits).chunks}
        assert lengths == {**dict.fromkeys(decoding, 1), long: 5}
    engine.run(limits)


def test_prompts_share_the_budget_in_order_of_arrival():
    engine = ToyEngine(num_blocks=100, block_size=4, max_num_seqs=4)
    first, second, third = (engine.add([i] * 10, 1) for i in range(3))
    steps = [[(c.request, c.start, c.length) for c in engine.step(Limits(4, 12)).chunks] for _ in range(3)]
    assert steps == [
        [(first, 0, 10), (second, 0, 2)],
        [(second, 2, 8), (third, 0, 4)],
        [(third, 4, 6)],
    ]


def test_a_prompt_of_the_whole_pool():
    engine = ToyEngine(num_blocks=5, block_size=4, max_num_seqs=2)
    engine.add([1] * 16, 1)
    engine.add([2] * 4, 13)
    with pytest.raises(ValueError, match="16 tokens and 2 to generate do not fit the pool's 4 blocks of 4"):
        engine.add([1] * 16, 2)
    engine.run(Limits(2, 8))
    assert engine.scheduler.preemptions == 0


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 1), ([1], 0)])
def test_nothing_to_do_is_refused(prompt, max_tokens):
    engine = ToyEngine(num_blocks=5, block_size=4, max_num_seqs=2)
    with pytest.raises(ValueError, match="at least one token"):
        engine.add(prompt, max_tokens)
    assert engine.scheduler.unfinished == 0


def test_an_id_is_free_again_after_its_request():
    engine = ToyEngine(num_blocks=5, block_size=4, max_num_seqs=2)
    request = engine.add([1], 3)
    with pytest.raises(ValueError, match="'0' exists already"):
        engine.scheduler.add(request.spec)
    engine.step(Limits(2, 2))
    engine.abort(request)
    again = engine.scheduler.add(request.spec)
    assert engine.scheduler.get("0") is again
    engine.run(Limits(2, 2))
    assert again.output == expected_output(again.spec) and not request.output


def test_one_token_is_one_step():
    engine = ToyEngine(num_blocks=5, block_size=4, max_num_seqs=2)
    request = engine.add([1, 2, 3], 1)
    assert engine.step(Limits(2, 8)).chunks
    assert not engine.step(Limits(2, 8)).chunks
    assert request.finish_reason == "length" and request.output == expected_output(request.spec)


def test_finishing_a_waiting_request():
    engine = ToyEngine(num_blocks=3, block_size=4, max_num_seqs=1)
    first, second, third = (engine.add([i], 3) for i in range(3))
    engine.step(Limits(1, 4))
    engine.abort(second)
    engine.abort(second)
    assert list(engine.scheduler.waiting) == [third]
    engine.run(Limits(1, 4))
    assert [r.finish_reason for r in (first, second, third)] == ["length", "abort", "length"]


def test_preempted_with_a_token_in_flight():
    engine = ToyEngine(num_blocks=3, block_size=4, max_num_seqs=2)
    old, new = engine.add([1, 2, 3, 4], 5), engine.add([5, 6, 7], 5)
    engine.step(Limits(2, 8))
    assert new.inflight == 1
    engine.step(Limits(2, 8))
    # its token was read while it waits, and it comes back with it
    assert list(engine.scheduler.waiting) == [new] and new.preemptions == 1
    assert new.output == expected_output(new.spec)[:1]
    engine.run(Limits(2, 8))
    assert new.preemptions == 1 and old.preemptions == 0


def test_preempted_with_its_last_token_in_flight():
    engine = ToyEngine(num_blocks=3, block_size=4, max_num_seqs=2)
    old, new = engine.add([1, 2, 3, 4], 5), engine.add([5, 6, 7], 1)
    engine.step(Limits(2, 8))
    engine.step(Limits(2, 8))
    assert new.preemptions == 1
    assert new.finish_reason == "length" and not engine.scheduler.waiting
    engine.run(Limits(2, 8))
    assert old.preemptions == 0


def test_aborted_while_its_first_step_is_in_flight():
    engine = ToyEngine(num_blocks=5, block_size=4, max_num_seqs=2)
    request = engine.add([1, 2, 3], 4)
    schedule = engine.step(Limits(2, 8))
    assert schedule.admitted == [request]
    engine.abort(request)
    assert engine.pool.used == 0
    other = engine.add([4, 5, 6], 4)
    engine.run(Limits(2, 8))
    assert request.output == [] and other.finish_reason == "length"


def test_a_prompt_waits_until_all_of_it_fits():
    engine = ToyEngine(num_blocks=7, block_size=4, max_num_seqs=3)
    long, newcomer = engine.add([1] * 20, 2), engine.add([2] * 5, 2)
    for _ in range(2):
        assert [chunk.request for chunk in engine.step(Limits(3, 16)).chunks] == [long]
    # one of six blocks is free, and the newcomer needs two
    assert engine.pool.free == 1 and list(engine.scheduler.waiting) == [newcomer]
    engine.run(Limits(3, 16))
    assert engine.scheduler.preemptions == 0


def test_the_newest_gives_way_to_the_oldest():
    engine = ToyEngine(num_blocks=4, block_size=2, max_num_seqs=3)
    requests = [engine.add([i, i], 4) for i in range(3)]
    limits = Limits(3, 16)
    while engine.scheduler.preemptions == 0:
        engine.step(limits)
    assert requests[0].preemptions == 0 and requests[2].preemptions == 1
    engine.run(limits)
    assert requests[0].preemptions == 0
