import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxserve.engine.blocks import DUMMY, BlockPool

CAPACITY = 6


class PoolMachine(RuleBasedStateMachine):
    """Any order of allocate, share and release, against a list of the references that are held."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(CAPACITY + 1, 4)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, CAPACITY + 1))
    def allocate(self, count):
        free = self.pool.free
        blocks = self.pool.allocate(count)
        if count > free:
            assert blocks is None
        else:
            assert len(set(blocks)) == count
            assert not set(blocks) & {block for held in self.held for block in held}
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data):
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.share(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index))

    @invariant()
    def counts_are_right(self):
        held = [block for blocks in self.held for block in blocks]
        assert DUMMY not in held
        assert self.pool.used == len(set(held)) == self.pool.capacity - self.pool.free
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == held.count(block)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_too_many_takes_nothing():
    pool = BlockPool(4, 16)
    assert pool.allocate(4) is None
    assert pool.free == pool.capacity == 3
    assert sorted(pool.allocate(3)) == [1, 2, 3]


def test_blocks_of_the_cache_are_reused_last_and_in_the_order_they_were_freed():
    pool = BlockPool(6, 1)
    known = pool.allocate(3)
    for token, block in enumerate(known):
        pool.cache.commit("", [token], block)
    unknown = pool.allocate(2)
    pool.release([known[1], unknown[0], known[2], unknown[1], known[0]])
    assert pool.allocate(5) == [unknown[1], unknown[0], known[1], known[2], known[0]]


@pytest.mark.parametrize("use", [BlockPool.share, BlockPool.release])
def test_a_free_block_cannot_be_used(use):
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(AssertionError, match=f"block {blocks[0]} is not in use"):
        use(pool, blocks)


@given(st.integers(0, 10_000), st.integers(1, 256))
def test_blocks_for(tokens, size):
    count = BlockPool(2, size).blocks_for(tokens)
    assert (count - 1) * size < tokens <= count * size if tokens else count == 0
