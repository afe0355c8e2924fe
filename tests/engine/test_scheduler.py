"""The scheduler's promises, kept over random traffic and in the corners."""

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Limits, Policy

from .toy_engine import VOCAB, ToyEngine, expected_output


def play(rng: random.Random, steps: int) -> ToyEngine:
    """Random traffic over a random small engine: arrivals, aborts, lost devices, limits that grow."""
    block_size = rng.choice([1, 2, 3, 4, 16])
    max_num_seqs = rng.randint(1, 8)
    num_blocks = rng.choice([rng.randint(2, 24), rng.randint(2, 24), 60])
    aging = rng.choice([None, None, 1.0, 30.0])
    policy = Policy(aging, rng.random() < 0.5, rng.choice([0.01, 0.5, 1.0]))
    engine = ToyEngine(num_blocks, block_size, max_num_seqs, rng.choice([0, 1, 1, 2, 3]), policy=policy)
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
            salt, tenant = rng.choice(["", "", "other"]), rng.choice("aab")
            priority, now = rng.randint(-2, 2), float(engine.turns)
            engine.add(_prompt(rng, engine, prompt), max_tokens, stop, salt, tenant, priority, now)
        if rng.random() < 0.05:
            engine.abort(rng.choice(engine.requests)) if engine.requests else None
        if rng.random() < 0.01:
            engine.lose_device()
        if rng.random() < 0.01:
            engine.pool.cache.clear()
        if rng.random() < 0.1 and limits != most:
            seqs = rng.randint(limits.seqs, most.seqs)
            limits = Limits(seqs, rng.randint(max(seqs, limits.tokens), most.tokens))
        engine.step(limits)
    engine.run(limits)
    return engine


def _prompt(rng: random.Random, engine: ToyEngine, length: int) -> list[int]:
    """Random tokens, often after those of an earlier request and what was generated for it."""
    known: list[int] = []
    if engine.requests and rng.random() < 0.6:
        earlier = rng.choice(engine.requests)
        known = earlier.spec.prompt + earlier.output
        known = known[: rng.randint(0, len(known))]
    return (known + [rng.randrange(VOCAB) for _ in range(length)])[:length]


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False))
def test_every_request_gets_its_tokens(rng):
    play(rng, 40)


def test_thousands_of_steps():
    preemptions = stopped = aborted = cached = 0
    for seed in range(60):
        engine = play(random.Random(seed), 150)
        preemptions += engine.scheduler.preemptions
        cached += engine.pool.cache.hits
        stopped += sum(request.finish_reason == "stop" for request in engine.requests)
        aborted += sum(request.finish_reason == "abort" for request in engine.requests)
    # the traffic really went to where it hurts
    assert preemptions > 500 and stopped > 100 and aborted > 100 and cached > 300


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


def chunks(engine: ToyEngine, limits: Limits, steps: int) -> list[dict[Request, int]]:
    """The number of tokens of every request in each of the next steps."""
    return [{c.request: c.length for c in engine.step(limits).chunks} for _ in range(steps)]


def test_a_short_prompt_passes_long_ones():
    engine = ToyEngine(num_blocks=100, block_size=4, max_num_seqs=4)
    limits = Limits(4, 16)
    first, second = engine.add([1] * 100, 1), engine.add([2] * 100, 1)
    assert chunks(engine, limits, 1) == [{first: 16}]
    short, late = engine.add([3] * 8, 1), engine.add([4] * 3, 1)
    # each long one leaves half of what there is; what the short ones do not need goes to the first
    assert chunks(engine, limits, 4) == [
        {first: 8, second: 4, short: 4},
        {first: 8, second: 4, short: 4},
        {first: 9, second: 4, late: 3},
        {first: 16},
    ]
    engine.run(limits)


def test_without_slots_for_short_prompts_a_long_one_has_all():
    engine = ToyEngine(num_blocks=100, block_size=4, max_num_seqs=1)
    long, _ = engine.add([1] * 40, 1), engine.add([2] * 4, 1)
    limits = Limits(1, 16)
    assert chunks(engine, limits, 3) == [{long: 16}, {long: 16}, {long: 8}]
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
    old, new = engine.add([1, 2, 3], 6), engine.add([5, 6, 7], 5)
    engine.step(Limits(2, 8))
    engine.step(Limits(2, 8))
    assert new.inflight == 1
    engine.step(Limits(2, 8))
    # its token was read while it waits, and it comes back with it
    assert list(engine.scheduler.waiting) == [new] and new.preemptions == 1
    assert new.output == expected_output(new.spec)[:2]
    engine.run(Limits(2, 8))
    assert new.preemptions == 1 and old.preemptions == 0


def test_preempted_with_its_last_token_in_flight():
    engine = ToyEngine(num_blocks=3, block_size=4, max_num_seqs=2)
    old, new = engine.add([1, 2, 3], 6), engine.add([5, 6, 7], 2)
    for _ in range(3):
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
    requests = [engine.add([i], 5) for i in range(3)]
    limits = Limits(3, 16)
    while engine.scheduler.preemptions == 0:
        engine.step(limits)
    assert requests[0].preemptions == 0 and requests[2].preemptions == 1
    engine.run(limits)
    assert requests[0].preemptions == 0


LIMITS = Limits(8, 64)


def cached(engine: ToyEngine, *args, **options) -> int:
    """Add one more request, run it, and say how much of its prompt the cache had."""
    request = engine.add(*args, **options)
    engine.run(LIMITS)
    return request.cached


def test_a_prompt_is_found_again_but_for_its_last_block():
    engine = ToyEngine(num_blocks=50, block_size=4, max_num_seqs=8)
    prompt = list(range(16))
    assert cached(engine, prompt, 1) == 0
    assert cached(engine, prompt, 1) == 12  # its last token gives the next one
    assert cached(engine, [*prompt, 5], 1) == 16
    assert cached(engine, [9, *prompt], 1) == 0
    assert cached(engine, prompt, 1, salt="another tenant") == 0
    engine.pool.cache.clear()
    assert cached(engine, prompt, 1) == 0


def test_the_next_turn_begins_with_what_was_generated():
    engine = ToyEngine(num_blocks=50, block_size=4, max_num_seqs=8)
    first = engine.add([1, 2, 3], 10)
    engine.run(LIMITS)
    # the last token was never fed back
    assert cached(engine, [*first.spec.prompt, *first.output, 7], 4) == 12


def test_sequences_of_one_prompt_share_its_blocks_from_the_first_step():
    engine = ToyEngine(num_blocks=50, block_size=4, max_num_seqs=8)
    requests = [engine.add([3] * 18, 3) for _ in range(5)]
    schedule = engine.step(LIMITS)
    assert [chunk.length for chunk in schedule.chunks] == [18, 2, 2, 2, 2]
    assert engine.pool.used == 4 + 5
    engine.run(LIMITS)
    assert {request.cached for request in requests} == {0, 16}


def test_the_least_recently_used_is_forgotten_first():
    engine = ToyEngine(num_blocks=9, block_size=4, max_num_seqs=1)
    old, new = [1] * 9, [2] * 9
    cached(engine, old, 1)
    cached(engine, new, 1)
    assert cached(engine, old, 1) == 8
    cached(engine, [3] * 16, 1)  # takes the free ones, then two blocks of the cache
    assert cached(engine, old, 1) == 8
    assert cached(engine, new, 1) < 8


def test_without_the_cache_nothing_is_found():
    engine = ToyEngine(num_blocks=50, block_size=4, max_num_seqs=8, prefix_cache=False)
    assert [cached(engine, [1] * 16, 4) for _ in range(2)] == [0, 0]
