"""Deterministic mode: which programs give a row the same bits, wherever it stands and whoever is beside it.

Probes run through every program in different places: rows, slots, blocks, chunks and neighbours are drawn
anew. What a program computes is kept as digests of its bits, by what it was computed from. Programs that
never contradict each other form a class. One class stays in the table; where a program was left out, the
next larger one serves.
"""

import hashlib
import logging
from collections.abc import Hashable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from jaxserve.engine.batch import Bucket
from jaxserve.engine.messages import CoreRequest
from jaxserve.engine.programs import Programs
from jaxserve.engine.request import Request
from jaxserve.engine.sampling import Variant
from jaxserve.engine.scheduler import Chunk
from jaxserve.engine.step import KV, Slots, Weights
from jaxserve.errors import ConfigError

log = logging.getLogger(__name__)

CONTEXT = 320
"""Tokens of the text that probes share or repeat: more than one turn of attention's loops."""
TAIL = 2
"""Tokens that a probe has of its own: a chunk, or two single rows."""
CORE = 8
"""The first probes: every program sees them, so that any two can be compared."""
TWICE = 2
"""Each probe is there twice, so that a program can contradict itself."""
ENOUGH = 128
"""Rows that a mixed program is tried with, but at least a whole step."""
DRAWS = 16
"""Rows that a sample program is tried with, at least."""
STEP = 64
"""What a step costs beside its rows, in rows."""
NOTHING = "deterministic: no program gives a row the same bits in all places on this device"


def certify(programs: Programs, weights: Weights, kv: KV, slots: Slots) -> tuple[KV, Slots, list[str]]:
    """Leave one class of programs in the table; the state, which it uses, and the names of the others.

    Raises ConfigError when no program repeats its own bits.
    """
    probing = _Probing(programs, weights, kv, slots)
    found = {bucket: probing.forward(bucket) for bucket in programs.ready}
    kept = best_class(found, programs.shapes.max_num_seqs)
    refused = [bucket.name for bucket in found if bucket not in kept]
    for bucket in found.keys() - kept:
        programs.leave_out(bucket)
    draws = _Draws(programs, probing.slots)
    known = draws.sample(programs.limits.seqs, "full")
    if known.contradicted:
        raise ConfigError(NOTHING)
    for seqs, variant in programs.samples:
        if not known.agrees(draws.sample(seqs, variant)):
            refused.append(f"sample[{seqs}, {variant}]")
            programs.leave_out((seqs, variant))
    if refused:
        log.warning("deterministic: left out, for bits unlike the others': %s", ", ".join(refused))
    return probing.kv, draws.slots, refused


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
        if not _mixed(first) or found[first].contradicted:
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
    largest = max(bucket for bucket in members if _mixed(bucket))

    def decode(count: int) -> float:
        count = min(count, largest.seqs)
        return (min(bucket.tokens for bucket in members if bucket.seqs >= count) + STEP) / count

    return decode(1) + decode(seqs) + (largest.tokens + STEP) / largest.tokens


class _Probe(NamedTuple):
    """A sequence whose tokens from `start` on are computed, into blocks of its own."""

    name: Hashable
    """The same for sequences of the same tokens."""
    request: Request
    start: int

    @property
    def end(self) -> int:
        return len(self.request.spec.prompt)


Piece = tuple[_Probe, int, int]
"""A probe, the position that a chunk begins at, and its length."""


class _Probing:
    """Sequences to try forward programs with, and the state that these run on.

    A text lies in the pool once. `tails` share its beginning, as prefix hits do, and end with tokens of their
    own, which run one by one or together; `wholes` repeat the text in their own blocks, in long chunks.
    """

    def __init__(self, programs: Programs, weights: Weights, kv: KV, slots: Slots):
        self.kv, self.slots = kv, slots
        self._programs, self._weights = programs, weights
        self._random = np.random.default_rng(0)
        self._read = jax.jit(lambda pool, blocks, offsets: pool[blocks, :, :, offsets])
        shapes, size = programs.shapes, programs.shapes.pool.block_size
        # a small pool has room for little here, as it has later
        capacity = shapes.pool.num_blocks - 1
        own = min(-(-TAIL // size), capacity, shapes.table_width)
        tails = min(shapes.max_num_seqs, max(1, capacity // 2 // own))
        shared = min(-(-CONTEXT // size), (capacity - tails * own) // 2, shapes.table_width - own)
        text = self._tokens(shared * size)
        self._wholes, self._tails = [], []
        if shared:
            most = (capacity - tails * own - shared) // shared
            wanted = -(-max(programs.ready).tokens // len(text))
            self._wholes = [_probe("text", text, 0) for _ in range(min(wanted, most))]
        for i in range(tails):
            if i % TWICE == 0:
                start = int(self._random.integers(0, shared + 1)) * size
                tokens = text[:start] + self._tokens(min(TAIL, own * size))
            self._tails.append(_probe(i // TWICE, tokens, start))
        self._shared = list(range(1, shared + 1))
        self._free = list(range(shared + 1, capacity + 1))
        self._compute_text(text)

    def forward(self, bucket: Bucket) -> Bits:
        """What a program computes of the probes."""
        bits = Bits()
        self._place()
        computed: list[tuple[_Probe, int]] = []
        for pieces in self._traffic(bucket):
            logits = self._step(bucket, pieces)
            for row, (probe, start, length) in enumerate(pieces):
                bits.note((probe.name, start + length, "logits"), logits[row])
                computed += [(probe, position) for position in range(start, start + length)]
        for (probe, position), *layers in zip(computed, *self._written(computed), strict=True):
            bits.note((probe.name, position, "kv"), *layers)
        return bits

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._random.integers(0, self._programs.shapes.vocab, count).tolist()
        return tokens

    def _compute_text(self, text: list[int]) -> None:
        """Have the text in the blocks that tails share."""
        bucket = self._programs.ready[0]
        probe = _probe("text", text, 0)
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
        """Steps for a bucket, full and partly filled in turn."""
        at = {probe: probe.start for probe in (*self._tails, *self._wholes)}
        for turn in range(_turns(bucket)):
            room = int(self._random.integers(1, bucket.tokens + 1)) if turn % 2 else bucket.tokens
            pieces = []
            for probe in self._sequences(bucket, turn, at)[: bucket.seqs]:
                if left := min(probe.end - at[probe], room):
                    one = not _mixed(bucket) or (left <= TAIL and self._random.random() < 0.5)
                    pieces.append((probe, at[probe], 1 if one else left))
                    at[probe] += pieces[-1][2]
                    room -= pieces[-1][2]
            if pieces:
                yield sorted(pieces, key=lambda piece: piece[2] > 1)

    def _sequences(self, bucket: Bucket, turn: int, at: dict[_Probe, int]) -> list[_Probe]:
        """Who is in a step: what every program sees, then others, then long chunks for what room is left."""
        tails = [*self._shuffled(self._tails[:CORE]), *self._shuffled(self._tails[CORE:])]
        if _mixed(bucket):
            tails = tails[: max(1, bucket.seqs - len(self._wholes))] + self._wholes
        live = [probe for probe in tails if at[probe] < probe.end]
        return live[::-1] if _mixed(bucket) and turn % 2 else live

    def _shuffled(self, probes: list[_Probe]) -> list[_Probe]:
        return [probes[i] for i in self._random.permutation(len(probes))]

    def _step(self, bucket: Bucket, pieces: list[Piece]) -> np.ndarray:
        """Run the bucket's program; logits [seqs, vocab]."""
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
        self.kv, self.slots, logits, _ = run(self._weights, self.kv, self.slots, packed)
        return np.asarray(logits)

    def _written(self, rows: list[tuple[_Probe, int]]) -> list[np.ndarray]:
        """Of each layer, keys and values [rows, 2, kv_heads, dim] of these positions."""
        size = self._programs.shapes.pool.block_size
        at = np.array([(probe.request.blocks[p // size], p % size) for probe, p in rows], np.int32)
        most = sum(probe.end - probe.start for probe in (*self._tails, *self._wholes))
        at = np.pad(at, ((0, most - len(at)), (0, 0)))  # one shape: one program
        return [np.asarray(self._read(pool, *at.T))[: len(rows)] for pool in self.kv]


def _mixed(bucket: Bucket) -> bool:
    return bucket.tokens > bucket.seqs


def _turns(bucket: Bucket) -> int:
    """Steps that a program is tried with."""
    if _mixed(bucket):  # a single sequence is either a tail or a whole
        return max(2 if bucket.seqs == 1 else 1, ENOUGH // bucket.tokens)
    return max(2, CORE * TAIL // bucket.seqs)


def _probe(name: Hashable, tokens: list[int], start: int) -> _Probe:
    return _Probe(name, Request(CoreRequest(id=str(name), prompt=tokens, max_tokens=1), (0.0, 0)), start)


class _Draws:
    """Logits and parameters to try sample programs with.

    The logits are nearly level: a token's share is so small that a sum's last bits decide which is drawn.
    """

    def __init__(self, programs: Programs, slots: Slots):
        self.slots = slots
        self._programs = programs
        self._random = random = np.random.default_rng(0)
        count = max(programs.shapes.max_num_seqs, DRAWS)
        logits = random.standard_normal((count, programs.shapes.vocab), np.float32)
        self._logits = logits * random.choice([0.1, 1.0, 3.0], (count, 1)).astype(np.float32)
        self._requests = [self._request(i) for i in range(count)]

    def _request(self, i: int) -> CoreRequest:
        """Some greedy, and every other one plain: without filters in a batch, nothing is searched for."""

        def pick(*values: float) -> float:
            return float(self._random.choice(values))

        return CoreRequest(
            id=str(i),
            prompt=[0],
            max_tokens=1,
            seed=i,
            temperature=pick(0.5, 1.0, 2.0) if i % 4 else 0.0,
            min_p=pick(0.0, 0.0, 0.1),
            top_p=pick(1.0, 0.5, 0.95) if i % 2 else 1.0,
            top_k=int(pick(0, 20, 1000)) if i % 2 else 0,
        )

    def sample(self, seqs: int, variant: Variant) -> Bits:
        """What a sample program gives for rows in different places, with filters among them and without."""
        bits, program = Bits(), self._programs.sample(seqs, variant)
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
            self.slots, sampled = program(self.slots, logits, targets)
            tokens, *more = (np.asarray(array) for array in jax.tree.leaves(sampled))
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                if variant != "greedy" or self._requests[row].temperature == 0.0:
                    bits.note((row, "token"), tokens[place])
                if more:
                    bits.note((row, "logprobs"), *(array[place] for array in more))
        return bits

    def _batches(self, most: int) -> Iterator[np.ndarray]:
        """Rows that are sampled together: some of all kinds, then plain ones."""
        kinds = np.arange(len(self._requests))
        for rows, enough in ((kinds, DRAWS), (kinds[::2], CORE)):
            shuffled = self._random.permutation(rows)
            for start in range(0, min(enough, len(rows)), most):
                yield shuffled[start : start + most]
