"""The ladder: every program the engine can ever run, compiled ahead of time and held in a table.

It serves as soon as one program of each kind is ready and rounds up to those while a thread compiles
the rest, so nothing is ever compiled on a request's path: a step calls an executable or does not run.
What was compiled once is on a shelf (`compilation.Shelf`), and is not even traced again.
"""

import atexit
import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.batch import AdmitLayout, Bucket, StepLayout
from jaxserve.engine.compilation import Counts, Shelf, compiler_options, prune
from jaxserve.engine.model import POOL_SPEC, LoadedModel
from jaxserve.engine.sampling import Variant
from jaxserve.engine.scheduler import Limits
from jaxserve.engine.shaping import EnterLayout, RowsLayout, ShapeVariant, Shaping, enter, shape
from jaxserve.engine.step import KV, Slots, admit, forward, sample, score
from jaxserve.pallas_kernels.paged_attention import Implementation, PoolShape, empty_pool

log = logging.getLogger(__name__)

DECODE_RUNGS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SMALLEST_MIXED = 64
VARIANTS: tuple[Variant, ...] = ("full", "greedy", "random")
"""`full` serves every row, so it comes first."""
SHAPES: tuple[ShapeVariant, ...] = ("typical", "plain", "masks")
"""So does `typical`."""


class Shapes(NamedTuple):
    """The sizes that all programs share."""

    max_num_seqs: int
    max_num_batched_tokens: int
    table_width: int
    vocab: int
    layers: int
    pool: PoolShape


def ladder(shapes: Shapes, smallest_decode: int) -> list[Bucket]:
    """Every bucket, in the order in which they are compiled: the first serves any request."""
    most = shapes.max_num_seqs
    decode = [r for r in DECODE_RUNGS if smallest_decode <= r < most] + [max(most, smallest_decode)]
    mixed = [SMALLEST_MIXED]
    while mixed[-1] < max(shapes.max_num_batched_tokens, 2 * most):
        mixed.append(mixed[-1] * 2)
    # more tokens than sequences: that is what tells a mixed bucket from a decode bucket
    chunks = [Bucket(t, min(most, t // 2)) for t in mixed]
    first, rest = chunks[0], chunks[1:]
    singles = [Bucket(r, r) for r in decode]
    return [first, singles[0], *rest, *singles[1:]]


class Programs:
    """Compiled programs by shape. After `start` the first can serve; `warm` is set after the last."""

    def __init__(
        self,
        model: LoadedModel,
        shapes: Shapes,
        smallest_decode: int,
        compiles: Counts,
        deterministic: bool = False,
    ):
        self.shapes = shapes
        self.admit_layout = AdmitLayout(shapes.table_width)
        self.enter_layout = EnterLayout(shapes.vocab)
        self.buckets = ladder(shapes, smallest_decode)
        self.warm = threading.Event()
        self.attention = model.kernels.attention
        self._functions = model.functions()
        self._features = model.config.hidden_size
        self._kernels = model.kernels
        self._mesh = model.mesh
        self._compiles = compiles
        devices = _devices(model.mesh)
        platform = devices[0].platform if devices else ""
        self._options = compiler_options(platform, model.dtype, deterministic)
        self._weights = model.abstract
        pool = jax.tree.map(partial(self._abstract, spec=POOL_SPEC), shapes.pool.arrays)
        self._kv = [pool] * shapes.layers
        self._slots = jax.tree.map(self._abstract, Slots.shapes(shapes.max_num_seqs, shapes.table_width))
        shaping = Shaping.shapes(shapes.max_num_seqs, shapes.vocab)
        self._shaping = jax.tree.map(self._abstract, shaping)
        facts = (model.code, model.config, model.kernels, shapes, self._options, self._weights)
        self._shelf = Shelf(devices, *facts) if _are_here(devices) else None
        self._forward: dict[Bucket, Any] = {}
        self._shape: dict[tuple[int, ShapeVariant], Any] = {}
        self._sample: dict[tuple[int, Variant], Any] = {}
        self._score: dict[Bucket, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._compile_rest, name="compile", daemon=True)

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """Make what serves any request, while what is inside runs; then the rest in the background."""
        self._todo = iter(self._plan())
        first = islice(self._todo, 4)
        more = self._compile_admit, self._compile_enter, self._compile_empty
        with ThreadPoolExecutor(2, "compile") as threads:
            jobs = [threads.submit(job) for job in (*first, *more)]
            try:
                yield
                for job in jobs:
                    job.result()
            finally:
                threads.shutdown(cancel_futures=True)
        self._thread.start()
        # a thread that is inside the compiler when Python exits would abort the process
        atexit.register(self.close)

    def wait_until_warm(self, timeout: float | None = None) -> bool:
        """Wait for the background compilation to end; whether every program is ready."""
        self._thread.join(timeout)
        return self.warm.is_set()

    def close(self) -> None:
        """Stop compiling; waits for the program under way."""
        atexit.unregister(self.close)
        self._closed.set()
        self._thread.join()

    @property
    def count(self) -> int:
        """Programs that are ready."""
        return len(self._forward) + len(self._shape) + len(self._sample) + len(self._score) + 2

    @property
    def bytes_on_disk(self) -> int:
        """Of the programs that are kept."""
        return self._shelf.bytes if self._shelf else 0

    @property
    def ready(self) -> list[Bucket]:
        """Buckets that can run: their rows can be shaped, sampled and, of prompts, scored too."""
        forward = [b for b in list(self._forward) if b in self._score or not b.mixed]
        sampled = {seqs for seqs, variant in list(self._sample) if variant == VARIANTS[0]}
        shaped = {seqs for seqs, variant in list(self._shape) if variant == SHAPES[0]}
        return [b for b in forward if b.seqs in sampled & shaped]

    @property
    def shapings(self) -> list[tuple[int, ShapeVariant]]:
        """Rows and variants of the shape programs that are ready."""
        return list(self._shape)

    @property
    def samples(self) -> list[tuple[int, Variant]]:
        """Rows and variants of the sample programs that are ready."""
        return list(self._sample)

    @property
    def limits(self) -> Limits:
        """The largest step that is sure to have a program."""
        largest = max(bucket for bucket in self.ready if bucket.mixed)
        return Limits(largest.seqs, min(largest.tokens, self.shapes.max_num_batched_tokens))

    def bucket(self, tokens: int, seqs: int, scores: bool = False) -> Bucket:
        """The smallest ready bucket for so many tokens of so many sequences, and whether any are scored."""
        single = tokens == seqs and not scores
        return min(b for b in self.ready if seqs <= b.seqs and tokens <= b.tokens and (single or b.mixed))

    def rows_layout(self, seqs: int) -> RowsLayout:
        return RowsLayout(seqs, self.shapes.vocab)

    def layout(self, bucket: Bucket) -> StepLayout:
        return StepLayout(bucket, self.shapes.pool.block_size)

    def forward(self, bucket: Bucket) -> Any:
        """(weights, kv, slots, packed) -> (kv, slots, logits, targets, hidden), compiled for the bucket."""
        return self._forward[bucket]

    def shape(self, seqs: int, variant: ShapeVariant) -> Any:
        """shape for that many rows: (shaping, slots, logits, targets, rows) -> (shaping, logits). Any but
        `typical` may put them where those given were."""
        return self._shape.get((seqs, variant)) or self._shape[seqs, SHAPES[0]]

    def score(self, bucket: Bucket) -> Any:
        """score for what a mixed bucket's forward gives: (weights, hidden, tokens) -> scored."""
        return self._score[bucket]

    def sample(self, seqs: int, variant: Variant) -> Any:
        """sample for that many rows: (slots, logits, raw, targets) -> (slots, sampled)."""
        return self._sample.get((seqs, variant)) or self._sample[seqs, "full"]

    def leave_out(self, program: Bucket | tuple[int, Variant | ShapeVariant]) -> None:
        """Forget a program (forward, shape or sample): another one serves in its place."""
        tables: tuple[dict[Any, Any], ...] = self._forward, self._shape, self._sample
        for table in tables:
            table.pop(program, None)

    def compile_largest(self) -> None:
        """Compile the programs that take most memory, and no others: for a plan."""
        chunks, singles = max(self.buckets), max(b for b in self.buckets if b.tokens == b.seqs)
        for bucket in (chunks, singles):
            self._compile_forward(bucket)
        self._compile_shape(singles.seqs, SHAPES[0])
        self._compile_score(chunks)
        self._compile_sample(singles.seqs, "full")

    def temporaries(self) -> dict[str, int]:
        """Bytes that each program that is ready takes on a device beside weights, pool and slots, from the
        compiler's analysis. While logits are sampled, the next step's may be there already."""
        found = {bucket.name: _new(program) for bucket, program in list(self._forward.items())}
        for (rows, shaping), program in list(self._shape.items()):
            found[f"shape[{rows}] {shaping}"] = _new(program) + 2 * 4 * rows * self.shapes.vocab
        for bucket, program in list(self._score.items()):
            found[f"score[{bucket.tokens}]"] = _new(program) + 4 * bucket.tokens * self._features
        for (rows, variant), program in list(self._sample.items()):
            found[f"sample[{rows}] {variant}"] = _new(program) + 3 * 4 * rows * self.shapes.vocab
        return found

    def empty_state(self) -> tuple[KV, Slots, Shaping]:
        """A fresh pool, fresh slots and what shapes their logits, on the devices."""
        state: tuple[KV, Slots, Shaping] = self._empty()
        return state

    def _plan(self) -> Iterator[Any]:
        """Compilations in order: a bucket is ready once its rows can be sampled too."""
        for bucket in self.buckets:
            if (bucket.seqs, VARIANTS[0]) not in self._sample:
                yield partial(self._compile_sample, bucket.seqs, VARIANTS[0])
                yield partial(self._compile_shape, bucket.seqs, SHAPES[0])
            yield partial(self._compile_forward, bucket)
            if bucket.mixed:
                yield partial(self._compile_score, bucket)
        for bucket in self.buckets:
            for variant in VARIANTS[1:]:
                if (bucket.seqs, variant) not in self._sample:
                    yield partial(self._compile_sample, bucket.seqs, variant)
            for shaping in SHAPES[1:]:
                if (bucket.seqs, shaping) not in self._shape:
                    yield partial(self._compile_shape, bucket.seqs, shaping)

    def _compile_rest(self) -> None:
        try:
            for job in self._todo:
                if self._closed.is_set():
                    return
                job()
            if self._compiles.cache_misses:
                prune()
        except Exception:
            log.exception("compiling in the background failed; the programs that are ready go on serving")
            return
        self.warm.set()

    def _compile_empty(self) -> None:
        state = (self._kv, self._slots, self._shaping)
        # held like the others: after a failed step the state is made anew, while requests wait
        attention = self._kernels.attention if self._mesh.size == 1 else "xla"
        empty = partial(_empty, [self.shapes.pool] * self.shapes.layers, attention, state[1:])
        self._empty = self._compile("empty", empty, out=_shardings(state), donate=())

    def _compile_admit(self) -> None:
        self.admit = self._compile("admit", admit, self._slots, self._array(self.admit_layout.size))

    def _compile_enter(self) -> None:
        layout = self.enter_layout
        args = self._shaping, self._array(layout.size)
        self.enter = self._compile("enter", partial(enter, layout.vocab), *args)

    def _compile_forward(self, bucket: Bucket) -> None:
        layout = self.layout(bucket)
        step = partial(forward, self._functions, layout)
        args = (self._weights, self._kv, self._slots, self._array(layout.size))
        replicated = NamedSharding(self._mesh, PartitionSpec())
        hidden = replicated if bucket.mixed else None
        out = (*_shardings((self._kv, self._slots)), replicated, replicated, hidden)
        self._forward[bucket] = self._compile(bucket.name, step, *args, donate=(1, 2), out=out)

    def _compile_shape(self, seqs: int, variant: ShapeVariant) -> None:
        logits = self._array(seqs, self.shapes.vocab, dtype=jnp.float32)
        rows = self._array(seqs, 1 + self.rows_layout(seqs).words, dtype=jnp.uint32)
        args = (self._shaping, self._slots, logits, self._array(seqs, 2), rows)
        # what tells logprobs needs the model's own logits too
        donate = (0,) if variant == SHAPES[0] else (0, 2)
        name, function = f"shape {seqs} {variant}", partial(shape, variant)
        self._shape[seqs, variant] = self._compile(name, function, *args, donate=donate)

    def _compile_sample(self, seqs: int, variant: Variant) -> None:
        logits = self._array(seqs, self.shapes.vocab, dtype=jnp.float32)
        args = (self._slots, logits, logits, self._array(seqs, 2))
        self._sample[seqs, variant] = self._compile(
            f"sample {seqs} {variant}", partial(sample, variant, self._kernels.sampler), *args
        )

    def _compile_score(self, bucket: Bucket) -> None:
        hidden = self._array(bucket.tokens, self._features, dtype=jnp.float32)
        args = (self._weights, hidden, self._array(bucket.tokens))
        step = partial(score, self._functions, self._kernels.sampler)
        self._score[bucket] = self._compile(f"score {bucket.tokens}", step, *args, donate=())

    def _compile(
        self, name: str, function: Any, *args: Any, donate: tuple[int, ...] = (0,), out: Any = None
    ) -> Any:
        """A program, from the shelf if it is there."""
        shelf = self._shelf if _module(function).startswith("jaxserve.") else None
        if shelf and (program := shelf.get(name)) is not None:
            self._compiles.add("cache_hits")
            return program
        lowered = self._jit(function, donate, out).lower(*args)
        program = lowered.compile(compiler_options=self._options)
        self._compiles.add("cache_misses")
        # what jax read from a cache of its own cannot be written again
        if shelf and not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            shelf.put(name, program, lowered.as_text())
        return program

    def _jit(self, function: Any, donate: tuple[int, ...], out: Any) -> Any:
        out = NamedSharding(self._mesh, PartitionSpec()) if out is None else out
        return jax.jit(function, donate_argnums=donate, out_shardings=out)

    def _array(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return self._abstract(jax.ShapeDtypeStruct(shape, dtype))

    def _abstract(self, x: Any, spec: PartitionSpec = PartitionSpec()) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self._mesh, spec))


def _new(program: Any) -> int:
    """Bytes that a program allocates: scratch, and results that are not written in place."""
    memory = program.memory_analysis()
    size: int = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return size


def _empty(
    pools: list[PoolShape], attention: Implementation, state: tuple[Slots, Shaping]
) -> tuple[KV, Slots, Shaping]:
    slots, shaping = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    return [empty_pool(pool, attention) for pool in pools], slots, shaping


def _shardings(state: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, state)


def _devices(mesh: Mesh | AbstractMesh) -> list[jax.Device]:
    """None of a mesh that is only a shape: programs can be lowered for it, not compiled."""
    return [] if isinstance(mesh, AbstractMesh) else list(mesh.devices.flat)


def _are_here(devices: list[jax.Device]) -> bool:
    """Whether programs can run, and are not only made to see what they are."""
    return bool(devices) and all(device in jax.devices() for device in devices)


def _module(function: Any) -> str:
    """Where the code is that a program is made of: only ours is part of what it is kept under."""
    module: str = getattr(function, "func", function).__module__
    return module
