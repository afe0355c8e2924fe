"""Heads over a mesh: none is lost, shards are even, and padding is no more than needed."""

from itertools import product

import numpy as np
import pytest

from jaxserve.models.layers.heads import EMPTY, HeadLayout

CASES = [
    (shards, group * kv_heads, kv_heads)
    for shards, group, kv_heads in product((1, 2, 3, 4, 6, 8, 16), (1, 2, 3, 4, 7, 8), range(1, 13))
]


@pytest.mark.parametrize("shards", sorted({case[0] for case in CASES}))
def test_every_head_has_one_place_beside_its_kv_head(shards):
    for _, heads, kv_heads in (case for case in CASES if case[0] == shards):
        layout = HeadLayout.over(shards, heads, kv_heads)
        assert len(layout.kv) == len(layout.q)
        assert sorted(layout.q[layout.q != EMPTY]) == list(range(heads))
        assert set(layout.kv) - {EMPTY} == set(range(kv_heads))
        for kv, members in zip(layout.kv, layout.q, strict=True):
            assert all(head // (heads // kv_heads) == kv for head in members[members != EMPTY])


@pytest.mark.parametrize("shards", sorted({case[0] for case in CASES}))
def test_shards_are_even_the_pool_smallest_and_groups_as_narrow_as_it_allows(shards):
    for _, heads, kv_heads in (case for case in CASES if case[0] == shards):
        places, width = HeadLayout.over(shards, heads, kv_heads).q.shape
        assert places % shards == 0
        assert places - shards < kv_heads <= places, "a place per KV head, and no device has one to spare"
        # narrower groups of some KV head would need more places than there are
        assert width == 1 or kv_heads * -(-(heads // kv_heads) // (width - 1)) > places


@pytest.mark.parametrize(
    ("shards", "heads", "kv_heads", "kv", "q"),
    [
        (1, 4, 2, [0, 1], [[0, 1], [2, 3]]),
        (2, 4, 2, [0, 1], [[0, 1], [2, 3]]),
        (4, 9, 3, [0, 1, 2, EMPTY], [[0, 1, 2], [3, 4, 5], [6, 7, 8], [EMPTY] * 3]),
        (4, 8, 2, [0, 0, 1, 1], [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (4, 7, 1, [0, 0, 0, 0], [[0, 1], [2, 3], [4, 5], [6, EMPTY]]),
        (2, 3, 3, [0, 1, 2, EMPTY], [[0], [1], [2], [EMPTY]]),
    ],
)
def test_layouts_one_can_check_by_eye(shards, heads, kv_heads, kv, q):
    layout = HeadLayout.over(shards, heads, kv_heads)
    assert layout.kv.tolist() == kv
    assert layout.q.tolist() == q


@pytest.mark.parametrize("tail", [(), (5,)], ids=["bias", "weight"])
def test_fused_qkv_is_each_place_filled_by_hand(tail):
    dim, rng = 4, np.random.default_rng(0)
    for shards, heads, kv_heads in CASES:
        layout = HeadLayout.over(shards, heads, kv_heads)
        q, k, v = (rng.normal(size=(n, dim, *tail)) for n in (heads, kv_heads, kv_heads))
        places, width = layout.q.shape
        wanted = np.zeros((places, width + 2, dim, *tail))
        for place in range(places):
            for at, head in enumerate(layout.q[place]):
                if head != EMPTY:
                    wanted[place, at] = q[head]
            if layout.kv[place] != EMPTY:
                wanted[place, -2] = k[layout.kv[place]]
                wanted[place, -1] = v[layout.kv[place]]
        np.testing.assert_array_equal(layout.fuse_qkv(q, k, v), wanted)
