"""Deterministic mode: which programs give a row the same bits, wherever it stands and whoever is beside it.

Probes run through every program in different places: rows, slots, blocks, chunks and neighbours are drawn
anew. What a program computes is kept as digests of its bits, by what it was computed from. Programs that
never contradict each other form a class. One class stays in the table; where a program was left out, the
next larger one serves.
"""

import hashlib
import logging
from collections.abc import Hashable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.engine.batch import Bucket
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.programs import Programs
from jaxserve.engine.request import Request
from jaxserve.engine.sampling import Variant
from jaxserve.engine.scheduler import Chunk
from jaxserve.engine.shaping import ShapeVariant, Shaping
from jaxserve.engine.step import KV, Slots, Weights
from jaxserve.errors import ConfigError
from jaxserve.pallas_kernels.paged_attention import read

log = logging.getLogger(__name__)

CONTEXT = 320
"""Tokens of the probes' text: more than one turn of attention's loops."""
TAIL = 6
"""Tokens that a probe goes on for after a beginning that it shares."""
TAILS = 16
"""How many such probes there are, at least."""
CORE = 8
"""The first of them, which every program sees."""
ROWS = CORE * TAIL
"""Rows that a decode program is tried with, at least: one whose sums have another order shows it in some."""
ENOUGH = 128
"""Rows that a mixed program is tried with, but at least a whole step."""
DRAWS = 16
"""Rows that a sample program is tried with, at least."""
PLAIN = 8
"""And those of them that are tried without filters beside them."""
SCORED_TOKEN = 0
"""Whose logprob is asked for everywhere: what else a row tells does not depend on it."""
STEP = 64
"""What a step costs beside its rows, in rows."""
NOTHING = "deterministic: no program gives a row the same bits in all places on this device"


def certify(
    programs: Programs, weights: Weights, kv: KV, slots: Slots, shaping: Shaping
) -> tuple[KV, Slots, Shaping, list[str]]:
    """Leave one class of programs in the table; the state, which it uses, and the names of the others.

    Raises ConfigError when no program repeats its own bits.
    """
    probing = _Probing(programs, weights, kv, slots)
    found = {bucket: probing.forward(bucket) for bucket in programs.ready}
    kept = best_class(found, programs.shapes.max_num_seqs)
    refused = [bucket.name for bucket in found if bucket not in kept]
    for bucket in found.keys() - kept:
        programs.leave_out(bucket)
    draws = _Draws(programs, probing.slots, shaping)
    most = programs.limits.seqs
    known, shaped = draws.sample(most, "full"), draws.shape(most, "typical")
    if known.contradicted or shaped.contradicted:
        raise ConfigError(NOTHING)
    for seqs, variant in programs.samples:
        if not known.agrees(draws.sample(seqs, variant)):
            refused.append(f"sample[{seqs}, {variant}]")
            programs.leave_out((seqs, variant))
    for seqs, shaping_variant in programs.shapings:
        if not shaped.agrees(draws.shape(seqs, shaping_variant)):
            refused.append(f"shape[{seqs}, {shaping_variant}]")
            programs.leave_out((seqs, shaping_variant))
    if refused:
        log.warning("deterministic: left out, for bits unlike the others': %s", ", ".join(refused))
    return probing.kv, draws.slots, draws.shaping, refused


class Bits:
    """Digests of what a program computed, by what it was computed from."""

    def __init__(self) -> None:
        self.contradicted = False
        """The program itself gave different bits in different places."""
        self._digests: dict[Hashable, bytes] = {}

    def note(self, what: Hashable, *arrays: np.ndarray) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update(array.tobytes())
        found = digest.digest()
        self.contradicted |= self._digests.setdefault(what, found) != found

    def agrees(self, other: "Bits") -> bool:
        """Whether neither contradicts itself or the other."""
        mine, theirs = self._digests, other._digests
        same = all(mine.get(what, digest) == digest for what, digest in theirs.items())
        return same and not (self.contradicted or other.contradicted)

    def add(self, other: "Bits") -> None:
        self._digests |= other._digests


def best_class(found: dict[Bucket, Bits], seqs: int) -> list[Bucket]:
    """The cheapest set of programs that agree with each other, a mixed one among them.

    Raises ConfigError when there is none.
    """
    classes = []
    for first in found:
        if not first.mixed or found[first].contradicted:
            continue
        known, members = Bits(), [first]
        known.add(found[first])
        for other, bits in found.items():
            if other != first and known.agrees(bits):
                known.add(bits)
                members.append(other)
        classes.append(members)
    if not classes:
        raise ConfigError(NOTHING)
    return min(classes, key=lambda members: _cost(members, seqs))


def _cost(members: list[Bucket], seqs: int) -> float:
    """Rows that it takes to decode a token of one sequence, one of many, and to read one of a prompt."""
    largest = max(bucket for bucket in members if bucket.mixed)

    def decode(count: int) -> float:
        count = min(count, largest.seqs)
        return (min(bucket.tokens for bucket in members if bucket.seqs >= count) + STEP) / count

    return decode(1) + decode(seqs) + (largest.tokens + STEP) / largest.tokens


class _Probe(NamedTuple):
    """A sequence whose tokens from `start` on are computed, into blocks of its own."""

    request: Request
    start: int

    @classmethod
    def of(cls, tokens: list[int], start: int) -> "_Probe":
        return cls(Request(CoreRequest(id="probe", prompt=tokens, max_tokens=1), (0.0, 0)), start)

    @property
    def end(self) -> int:
        return len(self.request.spec.prompt)


Piece = tuple[_Probe, int, int]
"""A probe, the position that a chunk begins at, and its length."""


class _Probing:
    """Sequences to try forward programs with, and the state that these run on.

    All begin one text, so whatever is computed can be compared. `tails` share its first blocks, as prefix
    hits do, and go on for some tokens, one by one or together; `wholes` have it in their own blocks, in long
    chunks.
    """

    def __init__(self, programs: Programs, weights: Weights, kv: KV, slots: Slots):
        self.kv, self.slots = kv, slots
        self._programs, self._weights = programs, weights
        self._random = np.random.default_rng(0)
        self._read = jax.jit(partial(read, implementation=programs.attention))
        shapes, size = programs.shapes, programs.shapes.pool.block_size
        # a small pool has room for little here, as it has later
        capacity = shapes.pool.num_blocks - 1
        own = min(-(-TAIL // size), capacity, shapes.table_width)
        tails = min(max(shapes.max_num_seqs, TAILS), max(1, capacity // 2 // own))
        shared = min(-(-CONTEXT // size), (capacity - tails * own) // 2, shapes.table_width)
        text = self._random.integers(0, shapes.vocab, max(shared, own) * size).tolist()
        wholes = 0
        if shared:
            wanted = -(-max(programs.ready).tokens // len(text))
            wholes = min(wanted, (capacity - tails * own - shared) // max(shared, own))
        self._wholes = [_Probe.of(text, 0) for _ in range(wholes)]
        starts = [i % max(1, shared - own + 1) * size for i in range(tails)]
        self._tails = [_Probe.of(text[: start + min(TAIL, own * size)], start) for start in starts]
        self._shared = list(range(1, shared + 1))
        self._free = list(range(shared + 1, capacity + 1))
        self._compute(text[: shared * size])

    def forward(self, bucket: Bucket) -> Bits:
        """What a program computes of the probes."""
        bits = Bits()
        self._place()
        computed: list[tuple[_Probe, int]] = []
        for pieces in self._traffic(bucket):
            logits, scored = self._step(bucket, pieces)
            rows = [(probe, position) for probe, start, n in pieces for position in range(start, start + n)]
            computed += rows
            for row, (_, start, length) in enumerate(pieces):
                bits.note((start + length, "logits"), logits[row])
            for row, (_, position) in enumerate(rows if bucket.mixed else ()):
                bits.note((position, "scored"), scored[row])
        for (_, position), *layers in zip(computed, *self._written(computed), strict=True):
            bits.note((position, "kv"), *layers)
        return bits

    def _compute(self, text: list[int]) -> None:
        """Have a text in the blocks that tails share."""
        bucket = self._programs.ready[0]
        probe = _Probe.of(text, 0)
        probe.request.blocks = self._shared
        for start in range(0, len(text), bucket.tokens):
            self._step(bucket, [(probe, start, min(bucket.tokens, len(text) - start))])

    def _place(self) -> None:
        """Give the probes other blocks."""
        free = self._random.permutation(self._free).tolist()
        size = self._programs.shapes.pool.block_size
        for probe in (*self._wholes, *self._tails):
            first, last = probe.start // size, -(-probe.end // size)
            probe.request.blocks = self._shared[:first] + [free.pop() for _ in range(last - first)]

    def _traffic(self, bucket: Bucket) -> Iterator[list[Piece]]:
        """Steps for a bucket, full and partly filled in turn, until it has seen enough."""
        slots = self._programs.shapes.max_num_seqs
        at = {probe: probe.start for probe in (*self._tails, *self._wholes)}
        enough, turns = _enough(bucket)
        turn = rows = 0
        while turn < turns or rows < enough:
            room = int(self._random.integers(1, bucket.tokens + 1)) if turn % 2 else bucket.tokens
            pieces = []
            for probe in self._sequences(bucket, turn, at)[: min(bucket.seqs, slots)]:
                if left := min(probe.end - at[probe], room):
                    length = self._length(bucket, left)
                    pieces.append((probe, at[probe], length))
                    at[probe] += length
                    room -= length
            if not pieces:
                return
            yield sorted(pieces, key=lambda piece: piece[2] > 1)
            turn += 1
            rows += bucket.tokens if bucket.mixed else len(pieces)

    def _sequences(self, bucket: Bucket, turn: int, at: dict[_Probe, int]) -> list[_Probe]:
        """Who is in a step: tails, and long chunks for what room is left or before them."""
        core, others = self._shuffled(self._tails[:CORE], at), self._shuffled(self._tails[CORE:], at)
        probes = core + others
        if bucket.mixed:
            wholes = self._shuffled(self._wholes, at)
            probes = probes[: max(1, bucket.seqs - len(wholes))] + wholes
        return probes[::-1] if bucket.mixed and turn % 2 else probes

    def _shuffled(self, probes: list[_Probe], at: dict[_Probe, int]) -> list[_Probe]:
        """Those that are not at their end."""
        return [probes[i] for i in self._random.permutation(len(probes)) if at[probes[i]] < probes[i].end]

    def _length(self, bucket: Bucket, left: int) -> int:
        """Of the next chunk of a probe that has so many tokens left."""
        if not bucket.mixed or (left <= TAIL and self._random.random() < 0.5):
            return 1
        return int(self._random.integers(1, left + 1)) if left <= TAIL else left

    def _step(self, bucket: Bucket, pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Run the bucket's program; logits [seqs, vocab], and what it scores of a mixed one's tokens."""
        layout, dummy = self._programs.admit_layout, self._programs.shapes.max_num_seqs
        slots, chunks = self._random.permutation(dummy).tolist(), []
        for slot, (probe, start, length) in zip(slots, pieces, strict=False):
            request = probe.request
            request.slot = slot
            packed = layout.pack(slot, request.spec, 0, request.blocks)
            self.slots = self._programs.admit(self.slots, packed)
            chunks.append(Chunk(request, start, length, [], True))
        packed = self._programs.layout(bucket).pack(chunks, dummy)
        run = self._programs.forward(bucket)
        self.kv, self.slots, logits, _, hidden = run(self._weights, self.kv, self.slots, packed)
        scored = None
        if bucket.mixed:
            tokens = np.full(bucket.tokens, -1, np.int32)
            tokens[: sum(length for _, _, length in pieces)] = SCORED_TOKEN
            scored = self._programs.score(bucket)(self._weights, hidden, tokens)
        return np.asarray(logits), np.asarray(scored)

    def _written(self, rows: list[tuple[_Probe, int]]) -> list[np.ndarray]:
        """Of each layer, keys and values [rows, 2, kv_heads, dim] of these positions, and their scales."""
        size = self._programs.shapes.pool.block_size
        at = np.array([(probe.request.blocks[p // size], p % size) for probe, p in rows], np.int32)
        most = sum(probe.end - probe.start for probe in (*self._tails, *self._wholes))
        at = np.pad(at, ((0, most - len(at)), (0, 0)))  # one shape: one program
        found = jax.tree.leaves([self._read(pool, *at.T) for pool in self.kv])
        return [np.asarray(array)[: len(rows)] for array in found]


def _enough(bucket: Bucket) -> tuple[int, int]:
    """Rows and steps that a program is tried with, at least."""
    if bucket.mixed:
        return ENOUGH, 2 if bucket.seqs == 1 else 1  # a single sequence is either a tail or a whole
    return ROWS, 2


class _Draws:
    """Logits and parameters to try shape and sample programs with.

    The logits are nearly level: a token's share is so small that a sum's last bits decide which is drawn.
    """

    def __init__(self, programs: Programs, slots: Slots, shaping: Shaping):
        self.slots, self.shaping = slots, shaping
        self._programs = programs
        self._random = random = np.random.default_rng(0)
        count = max(programs.shapes.max_num_seqs, DRAWS)
        logits = random.standard_normal((count, programs.shapes.vocab), np.float32)
        self._logits = logits * random.choice([0.1, 1.0, 3.0], (count, 1)).astype(np.float32)
        self._requests = [self._request(i) for i in range(count)]
        words = programs.rows_layout(count).words
        self._masks = random.integers(0, 2**32, (count, words), np.uint32)

    def _request(self, i: int) -> CoreRequest:
        """Some greedy, and every other one plain: without filters in a batch, nothing is searched for."""

        def pick(*values: float) -> float:
            return float(self._random.choice(values))

        vocab = self._programs.shapes.vocab
        return CoreRequest(
            id=str(i),
            prompt=self._random.integers(0, vocab, TAIL).tolist(),
            max_tokens=1,
            seed=i,
            temperature=pick(0.5, 1.0, 2.0) if i % 4 else 0.0,
            min_p=pick(0.0, 0.0, 0.1),
            top_p=pick(1.0, 0.5, 0.95) if i % 2 else 1.0,
            top_k=int(pick(0, 20, 1000)) if i % 2 else 0,
            typical_p=pick(1.0, 0.5, 0.95) if i % 2 else 1.0,
            repetition_penalty=pick(1.0, 1.3),
            frequency_penalty=pick(0.0, 0.7),
            logit_bias={int(self._random.integers(0, vocab)): pick(0.5, -1.0)},
        )

    def sample(self, seqs: int, variant: Variant) -> Bits:
        """What a sample program gives for rows in different places, with filters among them and without."""
        bits, program = Bits(), self._programs.sample(seqs, variant)
        for places, rows, logits, targets in self._steps(seqs):
            self.slots, sampled = program(self.slots, logits, logits, targets)
            found = np.asarray(sampled)
            for place, row in zip(places, rows, strict=True):
                if variant != "greedy" or self._requests[row].temperature == 0.0:
                    bits.note((row, "token"), found[place, 0])
                if variant == "full":
                    bits.note((row, "logprobs"), found[place, 1:])
        return bits

    def shape(self, seqs: int, variant: ShapeVariant) -> Bits:
        """What a shape program makes of rows in different places."""
        bits, program = Bits(), self._programs.shape(seqs, variant)
        for places, rows, logits, targets in self._steps(seqs):
            for place, row in zip(places, rows, strict=True):
                packed = self._programs.enter_layout.pack(int(targets[place, 0]), self._requests[row], [])
                self.shaping = self._programs.enter(self.shaping, packed)
                targets[place, 1] = len(self._requests[row].prompt)
            packed, here, masks = self._programs.rows_layout(seqs).empty()
            masks[places] = self._masks[rows]
            for asks in (0,) if variant == "masks" else (0, 1):
                here[places] = asks
                self.shaping, shaped = program(self.shaping, self.slots, logits, targets, packed)
                found = np.asarray(shaped)
                for place, row in zip(places, rows, strict=True):
                    if variant == "typical" or not asks or self._requests[row].typical_p == 1.0:
                        bits.note((row, asks), found[place])
        return bits

    def _steps(self, seqs: int) -> Iterator[tuple[list[int], list[int], np.ndarray, np.ndarray]]:
        """Places in a step of so many rows, what is in them, and its logits and targets."""
        vocab, dummy = self._programs.shapes.vocab, self._programs.shapes.max_num_seqs
        for rows in self._batches(min(seqs, dummy)):
            places = self._random.permutation(seqs)[: len(rows)]
            slots = self._random.permutation(dummy)[: len(rows)]
            logits = np.zeros((seqs, vocab), np.float32)
            targets = np.full((seqs, 2), (dummy, 0), np.int32)
            logits[places] = self._logits[rows]
            targets[places] = np.stack([slots, rows], axis=1)
            for slot, row in zip(slots.tolist(), rows.tolist(), strict=True):
                packed = self._programs.admit_layout.pack(slot, self._requests[row], row, [])
                self.slots = self._programs.admit(self.slots, packed)
            yield places.tolist(), rows.tolist(), logits, targets

    def _batches(self, most: int) -> Iterator[np.ndarray]:
        """Rows that are sampled together: some of all kinds, then plain ones."""
        kinds = np.arange(len(self._requests))
        for rows, enough in ((kinds, DRAWS), (kinds[::2], PLAIN)):
            shuffled = self._random.permutation(rows)
            for start in range(0, min(enough, len(rows)), most):
                yield shuffled[start : start + most]
