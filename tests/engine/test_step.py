"""admit, forward and sample over a model small enough to follow by hand: token t is followed by t + 1."""

from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.batch import AdmitLayout, Bucket, StepLayout
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler import Chunk
from jaxserve.engine.step import Model, Slots, admit, forward, sample

VOCAB, SLOTS, WIDTH, BLOCK = 50, 4, 6, 2
seen: list[dict[str, np.ndarray]] = []
"""What the model was given, step by step."""


def hidden(weights, ids, meta, kv):
    jax.debug.callback(lambda **x: seen.append(x), ids=ids, **meta._asdict())
    return weights[0][ids], kv


MODEL = Model(hidden, lambda weights, x, used: x)
WEIGHTS = [jnp.roll(jnp.eye(VOCAB), 1, axis=1)]


@cache
def compiled(bucket: Bucket):
    return jax.jit(partial(forward, MODEL, StepLayout(bucket, BLOCK)), donate_argnums=(1, 2))


admit_jit = jax.jit(admit, donate_argnums=0)
sample_jit = jax.jit(partial(sample, "random", "xla"), donate_argnums=0)


class Device:
    def __init__(self):
        shapes = Slots.shapes(SLOTS, WIDTH)
        self.slots = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        seen.clear()

    def admit(self, slot: int, seed: int = 0, blocks: Sequence[int] = (), **options) -> None:
        spec = CoreRequest(id="a", prompt=[1], max_tokens=1, **options)
        self.slots = admit_jit(self.slots, AdmitLayout(WIDTH).pack(slot, spec, seed, blocks))

    def run(self, bucket: Bucket, chunks: list[Chunk]) -> tuple[np.ndarray, np.ndarray]:
        """(sampled tokens, targets) of a step."""
        packed = StepLayout(bucket, BLOCK).pack(chunks, SLOTS)
        _, self.slots, logits, targets, hidden = compiled(bucket)(WEIGHTS, [], self.slots, packed)
        assert logits.shape == (bucket.seqs, VOCAB) and targets.shape == (bucket.seqs, 2)
        assert (hidden.shape == (bucket.tokens, VOCAB)) if bucket.mixed else hidden is None
        targets = np.asarray(targets)
        self.slots, sampled = sample_jit(self.slots, logits, logits, targets)
        jax.effects_barrier()
        return np.asarray(sampled)[:, 0], targets


def request(slot: int, prompt: list[int], blocks: list[int]) -> Request:
    made = Request(CoreRequest(id=str(slot), prompt=prompt, max_tokens=9, temperature=0.0), rank=(0.0, slot))
    made.slot, made.blocks = slot, blocks
    return made


def follow(chunk: Chunk) -> int:
    """The token that the toy model puts after a chunk whose tokens the host knows."""
    return (chunk.request.tokens(chunk.start, chunk.length)[-1] + 1) % VOCAB


def test_prompts_then_tokens_from_the_device():
    device = Device()
    first, second = request(2, [5, 6, 7], [3, 4]), request(0, [20], [5])
    chunks = [Chunk(second, 0, 1, [5], True), Chunk(first, 0, 3, [3, 4], True)]
    tokens, targets = device.run(Bucket(8, 3), chunks)
    assert tokens[:2].tolist() == [21, 8]
    assert targets.tolist() == [[0, 1], [2, 3], [SLOTS, 0]]
    assert device.slots.last_token[jnp.array([0, 2])].tolist() == [21, 8]

    # the host has not read them: the next step takes them from the slots, whatever the row
    tokens, targets = device.run(Bucket(4, 4), [Chunk(first, 3, 1, [], True), Chunk(second, 1, 1, [], True)])
    assert seen[-1]["ids"][:2].tolist() == [8, 21]
    assert tokens[:2].tolist() == [9, 22]
    assert targets.tolist() == [[2, 4], [0, 2], [SLOTS, 0], [SLOTS, 0]]


def test_a_part_of_a_prompt_samples_nothing():
    device = Device()
    part = request(1, [5, 6, 7, 8], [3])
    other = request(3, [30], [4])
    device.run(Bucket(4, 2), [Chunk(other, 0, 1, [4], True), Chunk(part, 0, 2, [3], False)])
    assert device.slots.last_token[:SLOTS].tolist() == [0, 0, 0, 31]
    part.blocks.append(6)
    tokens, targets = device.run(Bucket(4, 2), [Chunk(part, 2, 2, [6], True)])
    assert tokens[0] == 9 and targets[0].tolist() == [1, 4]
    assert device.slots.last_token[:SLOTS].tolist() == [0, 9, 0, 31]


def test_a_single_known_token_is_not_taken_from_the_device():
    device = Device()
    device.run(Bucket(4, 2), [Chunk(request(1, [40], [1]), 0, 1, [1], True)])
    # the slot has a new owner, whose one-token prompt the host knows
    owner = Chunk(request(1, [10], [2]), 0, 1, [2], True)
    tokens, _ = device.run(Bucket(4, 4), [owner])
    assert tokens[0] == follow(owner) == 11


@pytest.mark.parametrize("bucket", [Bucket(4, 4), Bucket(16, 3)])
def test_tables_grow_and_padding_stays_with_the_dummy(bucket):
    device = Device()
    grown = request(3, [1, 2], [7])
    device.run(Bucket(8, 3), [Chunk(grown, 0, 2, [7], True)])
    grown.blocks.append(9)
    device.run(bucket, [Chunk(grown, 2, 1, [9], True)])
    tables = np.asarray(device.slots.tables)
    assert tables[3].tolist() == [7, 9, 0, 0, 0, 0]
    assert not tables[[0, 1, 2, SLOTS]].any()
    meta = seen[-1]
    assert meta["block_tables"][0].tolist() == [7, 9, 0, 0, 0, 0] and not meta["block_tables"][1:].any()
    assert meta["row_pos"].tolist() == [2] + [-1] * (bucket.tokens - 1)
    assert meta["q_lens"].tolist() == [1] + [0] * (bucket.seqs - 1)
    assert device.slots.last_token[:SLOTS].tolist() == [0, 0, 0, 4]


def test_a_full_bucket_has_no_padding():
    device = Device()
    chunks = [Chunk(request(slot, [slot * 10], [slot + 1]), 0, 1, [slot + 1], True) for slot in range(SLOTS)]
    tokens, targets = device.run(Bucket(4, 4), chunks)
    assert tokens.tolist() == [1, 11, 21, 31] and targets[:, 0].tolist() == [0, 1, 2, 3]
    chunks = [
        Chunk(request(0, [3], [5]), 0, 1, [5], True),
        Chunk(request(1, [4] * 7, [6] * 4), 0, 7, [], True),
    ]
    assert device.run(Bucket(8, 2), chunks)[0].tolist() == [4, 5]


def test_admission_writes_its_slot_alone():
    device = Device()
    device.admit(2, seed=2**40 + 7, temperature=0.5, top_p=0.25, min_p=0.125, top_k=9, sample_index=4)
    params = jax.tree.map(np.asarray, device.slots.params)
    assert [params.temperature[2], params.top_p[2], params.min_p[2]] == [0.5, 0.25, 0.125]
    assert [params.top_k[2], params.sample_index[2]] == [9, 4] and params.seed[2].tolist() == [7, 256]
    assert all(not np.delete(value, 2, axis=0).any() for value in params)
    device.admit(2)
    assert device.slots.params.temperature[2] == 1.0 and device.slots.params.seed[2].tolist() == [0, 0]


def test_a_row_samples_with_the_parameters_of_its_slot():
    def flat(weights, x, used):
        return jnp.zeros((x.shape[0], VOCAB))

    def drawn(slots: list[int], seeds: dict[int, int]) -> list[int]:
        device = Device()
        for slot, seed in seeds.items():
            device.admit(slot, seed=seed)
        layout = StepLayout(Bucket(4, 4), BLOCK)
        chunks = [Chunk(request(slot, [1], [slot + 1]), 0, 1, [slot + 1], True) for slot in slots]
        step = partial(forward, MODEL._replace(logits=flat), layout)
        _, state, logits, targets, _ = jax.jit(step)(WEIGHTS, [], device.slots, layout.pack(chunks, SLOTS))
        return sample_jit(state, logits, logits, targets)[1][:, 0].tolist()

    one = drawn([1, 3], {1: 11, 3: 34})
    # padding rows are greedy, and a request's token moves with it to any slot and row
    assert one[2:] == [0, 0] and one[0] != one[1]
    assert drawn([0, 2], {0: 34, 2: 11})[:2] == [one[1], one[0]]
