"""How requests compete: turns between tenants, priorities, a queue that is full."""

import pytest

from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Limits, Policy
from jaxserve.errors import QueueFull

from .toy_engine import ToyEngine


def test_tenants_take_turns():
    engine = ToyEngine(num_blocks=100, block_size=4, max_num_seqs=1)
    flood = [engine.add([1] * 8, 8, tenant="a") for _ in range(10)]
    limits = Limits(1, 16)
    for _ in range(20):
        engine.step(limits)
    single = [engine.add([2] * 4, 4, tenant="b") for _ in range(2)]
    newcomer = engine.add([3] * 4, 4, tenant="c")
    order: list[Request] = []
    while engine.scheduler.unfinished or engine.flights:
        order += engine.step(limits).admitted
    # the one that runs goes on; then the newcomers' requests, each half the work of one of the flood
    assert set(order[:2]) == {single[0], newcomer} and order.index(single[1]) <= 4
    assert order.index(flood[-1]) == len(order) - 1
    engine.check_finished()


def test_a_tenant_does_not_save_up_turns():
    engine = ToyEngine(num_blocks=100, block_size=4, max_num_seqs=1)
    limits = Limits(1, 16)
    engine.add([1] * 4, 1, tenant="b")  # served little
    for _ in range(5):
        engine.add([1] * 8, 8, tenant="a")
    engine.run(limits)
    mine = [engine.add([1] * 8, 8, tenant="a") for _ in range(3)]
    others = [engine.add([1] * 8, 8, tenant="b") for _ in range(3)]
    order: list[Request] = []
    while engine.scheduler.unfinished or engine.flights:
        order += engine.step(limits).admitted
    turns = [r.spec.tenant for r in order]
    assert abs(turns[:4].count("a") - turns[:4].count("b")) <= 1 and set(order) == {*mine, *others}


def test_without_fair_share_the_first_come_is_first_served():
    engine = ToyEngine(100, 4, max_num_seqs=1, policy=Policy(fair_share=False))
    requests = [engine.add([1] * 8, 3, tenant=tenant) for tenant in "aaaab"]
    order: list[Request] = []
    while engine.scheduler.unfinished or engine.flights:
        order += engine.step(Limits(1, 16)).admitted
    assert order == requests


def test_priority_takes_the_place_of_what_it_outranks():
    engine = ToyEngine(100, 4, max_num_seqs=2, policy=Policy(aging=10.0))
    limits = Limits(2, 16)
    low, middle = engine.add([1], 30, priority=5), engine.add([2], 30, priority=2)
    for _ in range(5):
        engine.step(limits)
    high = engine.add([3] * 4, 4, priority=-1, now=5.0)
    assert high in engine.step(limits).admitted
    assert list(engine.scheduler.waiting) == [low] and middle in engine.scheduler.running
    equal = engine.add([4], 4, priority=2, now=6.0)
    engine.step(limits)
    assert set(engine.scheduler.waiting) == {low, equal}
    engine.run(limits)  # which sees that `low` has exactly its tokens
    assert (low.preemptions, middle.preemptions, high.preemptions) == (1, 0, 0)


def test_priority_makes_room_in_the_pool():
    engine = ToyEngine(num_blocks=9, block_size=4, max_num_seqs=4, policy=Policy(aging=10.0))
    limits = Limits(4, 64)
    low = engine.add([1] * 20, 8, priority=1)
    engine.step(limits)
    engine.add([2] * 16, 2)
    engine.step(limits)
    assert list(engine.scheduler.waiting) == [low]
    engine.run(limits)


@pytest.mark.parametrize(
    ("prompts", "steps"),
    [
        ([[1] * 32, [1] * 32 + [2]], 3),  # eight of their blocks are free only when both give way
        ([[1] * 44], 1),  # most of its blocks are promised, not taken
    ],
)
def test_priority_takes_blocks_that_are_shared_or_promised(prompts, steps):
    engine = ToyEngine(num_blocks=13, block_size=4, max_num_seqs=4, policy=Policy(aging=10.0))
    limits = Limits(4, 8 if len(prompts) == 1 else 64)
    low = [engine.add(prompt, 4, priority=5) for prompt in prompts]
    for _ in range(steps):
        engine.step(limits)
    assert engine.scheduler.running == low
    high = engine.add([3] * 24, 4)
    assert high in engine.step(limits).admitted
    engine.run(limits)


def test_one_that_waits_grows_older_than_priority():
    engine = ToyEngine(100, 4, max_num_seqs=1, policy=Policy(aging=10.0))
    limits = Limits(1, 16)
    low = engine.add([1], 5, priority=3)
    for second in range(200):  # more of higher priority than can ever be served
        engine.add([2] * 4, 5, priority=0, now=float(second))
        engine.step(limits)
    assert low.finish_reason == "length"
    engine.run(limits)


def test_priority_counts_within_a_tenant_when_tenants_take_turns():
    engine = ToyEngine(100, 4, max_num_seqs=1, policy=Policy(aging=10.0))
    calm = engine.add([1] * 4, 20, tenant="a")
    engine.step(Limits(1, 16))
    engine.add([2] * 4, 20, tenant="b", priority=-100)
    engine.run(Limits(1, 16))
    assert calm.preemptions == 0


def test_a_full_queue_refuses():
    engine = ToyEngine(100, 4, max_num_seqs=2, policy=Policy(max_queued=1))
    limits = Limits(2, 16)
    for _ in range(3):  # two could run at once
        engine.add([1], 4)
    with pytest.raises(QueueFull, match="3 sequences"):
        engine.add([1], 4)
    engine.step(limits)
    with pytest.raises(QueueFull, match="1 sequences"):
        engine.add([1], 4)
    engine.run(limits)
    engine.add([1], 4)
    engine.run(limits)


def test_a_request_is_let_in_whole():
    engine = ToyEngine(100, 4, max_num_seqs=2, policy=Policy(max_queued=0))
    engine.add([1], 4)
    for _ in range(5):
        engine.add([1], 4, follows=True)
    with pytest.raises(QueueFull):
        engine.add([1], 4)
    engine.run(Limits(2, 16))


def test_a_flood_fills_its_own_line():
    engine = ToyEngine(100, 4, max_num_seqs=1, policy=Policy(max_queued=2))
    for _ in range(3):
        engine.add([1], 4, tenant="flood")
    with pytest.raises(QueueFull):
        engine.add([1], 4, tenant="flood")
    engine.add([1], 4, tenant="other")
    engine.run(Limits(1, 16))


def test_free_slots_are_no_queue_places_when_the_pool_is_full():
    engine = ToyEngine(5, 4, max_num_seqs=4, policy=Policy(max_queued=1))
    limits = Limits(4, 16)
    engine.add([1] * 12, 4)
    waits = engine.add([2] * 12, 4)
    engine.step(limits)
    with pytest.raises(QueueFull):
        engine.add([1], 4)
    engine.abort(waits)
    engine.add([1], 4)
    engine.run(limits)
