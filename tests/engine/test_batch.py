import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.batch import FROM_DEVICE, AdmitLayout, Bucket, StepLayout
from jaxserve.engine.blocks import DUMMY, BlockPool
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Chunk

DUMMY_SLOT = 9


def chunk(slot: int, prompt: list[int], start: int, length: int, blocks: list[int], new: int) -> Chunk:
    request = Request(CoreRequest(id=str(slot), prompt=prompt, max_tokens=50), rank=(0.0, slot))
    request.slot, request.blocks = slot, blocks
    return Chunk(request, start, length, blocks[len(blocks) - new :], start + length == len(prompt))


def test_a_step_field_by_field():
    layout = StepLayout(Bucket(8, 4), block_size=2)
    decode = chunk(5, [1, 2, 3], 3, 1, [11, 12], 0)._replace(samples=True)
    part = chunk(2, [4, 5, 6, 7, 8, 9], 1, 4, [13, 14, 15], 2)
    packed = layout.pack([decode, part], DUMMY_SLOT)
    assert packed.dtype == np.int32 and packed.shape == (layout.size,)
    assert {name: view.tolist() for name, view in layout.fields(packed).items()} == {
        "tokens": [FROM_DEVICE, 5, 6, 7, 8, 0, 0, 0],
        "slots": [5, 2, DUMMY_SLOT, DUMMY_SLOT],
        "starts": [3, 1, 0, 0],
        "q_lens": [1, 4, 0, 0],
        "samples": [1, 0, 0, 0],
        "update_slot": [2, 2] + [DUMMY_SLOT] * 6,
        "update_index": [1, 2] + [0] * 6,
        "update_block": [14, 15] + [DUMMY] * 6,
    }


@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
def test_fields_cover_the_buffer_once(tokens, seqs, block_size):
    layout = StepLayout(Bucket(tokens, seqs), block_size)
    fields = layout.fields(np.arange(layout.size, dtype=np.int32))
    assert {name: len(view) for name, view in fields.items()} == layout.sizes
    assert np.concatenate(list(fields.values())).tolist() == list(range(layout.size))


@st.composite
def full_steps(draw):
    """(bucket, block size, (start, length) of each sequence): as many new blocks as a step can have."""
    block_size = draw(st.integers(1, 17))
    parts = draw(
        st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=12).map(
            lambda parts: sorted(parts, key=lambda part: part[1] > 1)
        )
    )
    tokens = sum(length for _, length in parts) + draw(st.integers(0, 3))
    return Bucket(tokens, len(parts)), block_size, parts


@given(full_steps())
def test_table_updates_always_fit(step):
    bucket, block_size, parts = step
    pool = BlockPool(2000, block_size)
    chunks = []
    for slot, (start, length) in enumerate(parts):
        have, need = pool.blocks_for(start), pool.blocks_for(start + length)
        blocks = pool.allocate(need)
        chunks.append(chunk(slot, [slot] * (start + length), start, length, blocks, need - have))
    layout = StepLayout(bucket, block_size)
    fields = layout.fields(layout.pack(chunks, len(parts)))
    written = {
        (slot, index): block
        for slot, index, block in zip(
            *(fields[name].tolist() for name in ("update_slot", "update_index", "update_block")), strict=True
        )
        if slot != len(parts)
    }
    assert written == {
        (c.request.slot, c.request.blocks.index(block)): block for c in chunks for block in c.new_blocks
    }


def test_every_decode_may_start_a_block():
    decodes = StepLayout(Bucket(2, 2), block_size=4)
    chunks = [chunk(slot, [1] * 5, 4, 1, [1 + slot, 3 + slot], 1) for slot in range(2)]
    assert decodes.fields(decodes.pack(chunks, 2))["update_slot"].tolist() == [0, 1]


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("count", range(1, 6))
def test_tokens_of_prompt_and_output(start, count):
    request = Request(CoreRequest(id="a", prompt=[1, 2, 3], max_tokens=9), rank=(0.0, 0))
    request.output = [4, 5, 6]
    assert request.tokens(start, count) == [1, 2, 3, 4, 5, 6][start : start + count]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, -(2**63)])
def test_admission(seed):
    spec = CoreRequest(
        id="a", prompt=[1], max_tokens=1, temperature=0.7, top_p=0.9, min_p=0.1, top_k=40, sample_index=3
    )
    layout = AdmitLayout(table_width=5)
    packed = layout.pack(6, spec, seed, [9, 7])
    assert packed.dtype == np.int32 and packed.shape == (layout.size,)
    assert packed[[0, 3, 4]].tolist() == [6, 3, 40]
    assert packed[1:3].view(np.uint64).tolist() == [seed % 2**64]
    assert packed[5:8].view(np.float32).tolist() == np.float32([0.7, 0.9, 0.1]).tolist()
    assert packed[8:].tolist() == [9, 7, 0, 0, 0]


@pytest.mark.parametrize(("top_k", "packed"), [(-1, 0), (0, 0), (2**31, 2**31 - 1), (10**30, 2**31 - 1)])
def test_any_top_k_can_be_admitted(top_k, packed):
    spec = CoreRequest(id="a", prompt=[1], max_tokens=1, top_k=top_k)
    assert AdmitLayout(1).pack(0, spec, 0, [])[4] == packed


def test_bucket_names():
    assert [Bucket(8, 8).name, Bucket(64, 8).name] == ["decode[8]", "mixed[64]"]
