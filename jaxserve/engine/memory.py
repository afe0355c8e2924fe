"""The arithmetic of memory: what an engine takes on one device, and the KV pool that what is left allows.

An engine that starts and the plan of one that does not exist ask the same function, `fit`, before a
weight is loaded or a program compiled.
"""

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgspec

from jaxserve.config import EngineConfig, parse_mesh
from jaxserve.engine.devices import CPU, GPU, TPU, Memory, Platform, gib, kv_type
from jaxserve.engine.kernels import Kernels, check_attention
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.programs import SHAPES, VARIANTS, Shapes, ladder
from jaxserve.engine.shaping import Shaping
from jaxserve.engine.step import SCORED
from jaxserve.errors import ConfigError
from jaxserve.models.layers.activation import GATES
from jaxserve.models.layers.heads import HeadLayout
from jaxserve.models.layers.param import padded
from jaxserve.pallas_kernels import native
from jaxserve.pallas_kernels.matmul.tiles import OUTS
from jaxserve.pallas_kernels.paged_attention import PoolShape, pool_shape, why_not
from jaxserve.pallas_kernels.paged_attention.tuning import gpu, mosaic, tpu
from jaxserve.pallas_kernels.paged_attention.xla import CHUNK, GROUP, TILE
from jaxserve.sampling_params import MAX_LOGPROBS

log = logging.getLogger(__name__)

GRID = 64
"""The pool's size is rounded down to this many blocks, so that another reading of free memory does not
change the programs' shapes."""
CPU_POOL_BYTES = 4 * 2**30
"""For all virtual devices together: they share one memory."""
MIB = 2**20
PROCESS_BYTES = {CPU: 330 * MIB, GPU: 2048 * MIB, TPU: 2048 * MIB}
"""Host memory of a process with a runtime and no engine. The CPU's is measured (docs/memory.md)."""
FORWARD_BYTES = {"native": MIB, "xla": 11 * MIB // 4}
"""Host memory of a layer in a forward program for the CPU, by the kind of attention. Measured too."""
TPU_LAYER = {"tpu": (2 * MIB, MIB), "xla": (8 * MIB, 5 * MIB)}
"""Of a layer in a mixed and in a decode program on a TPU, by the kind of attention."""
SAMPLE_BYTES = 2 * MIB
"""Of a program that samples or scores."""
SCORE_WIDTH: int = 3 + 2 * MAX_LOGPROBS
"""Numbers that a row's scores are."""
ROUNDED_HIDDEN = {GPU: 12, TPU: 22}
"""Bytes of a token's feature between layers whose products are rounded: measured with the compilers."""
GPU_WORKSPACE = 64 * MIB
"""For cuBLAS (32 MiB on Hopper) and the partial results of split attention."""
LARGEST_MESH = 64


class Case(NamedTuple):
    """A model as it would lie on its devices."""

    config: EngineConfig
    dims: Any
    """The model's own config."""
    shards: int
    dtype: jnp.dtype
    weights: int
    """Bytes on one device."""
    kernels: Kernels


class Budget(NamedTuple):
    """What an engine takes on one device, in bytes, and the shapes that follow."""

    shapes: Shapes
    max_model_len: int
    memory: Memory
    weights: int
    state: int
    """Block tables and sampling parameters of all slots."""
    temporaries: int
    """What a step takes while it runs: an upper bound, known before anything is compiled."""
    autotuning: int
    """What a GPU's compiler takes to try out the largest product."""
    runtime: int
    """Compiled programs and, where the device's memory is the host's, the process itself."""
    block: int
    """A block of the pool, in all layers."""

    @property
    def pool(self) -> int:
        return self.block * self.shapes.pool.num_blocks

    @property
    def room(self) -> int:
        """What is left for the pool."""
        return self.memory.limit - self.memory.used - self.beside

    @property
    def beside(self) -> int:
        """All but the pool."""
        return self.weights + self.state + self.temporaries + self.autotuning + self.runtime

    @property
    def max_request_tokens(self) -> int:
        """A sequence's last token is never fed back, so it needs no place in the pool."""
        pool = self.shapes.pool
        return min(self.max_model_len, (pool.num_blocks - 1) * pool.block_size + 1)

    @property
    def fits(self) -> bool:
        """One block is the dummy that padding writes to."""
        return self.shapes.pool.num_blocks >= 2 and self.pool <= self.room


def fit(config: EngineConfig, model: LoadedModel, memory: Memory) -> Budget:
    """The shapes of an engine, with as many blocks as there is room for, or as were asked for.

    Raises ConfigError with the arithmetic, and what to change, when it does not fit.
    """
    case = Case(config, model.config, model.shards, model.dtype, model.bytes, model.kernels)
    budget = _budget(case, memory)
    check_attention(case.kernels, case.dims.heads(case.shards).q.shape[1], budget.shapes.pool)
    if config.attention == "tpu" and case.kernels.attention != "tpu":
        missing = why_not("tpu", case.dtype, case.dims.head_dim, case.dims.alibi)
        raise ConfigError(f"attention=tpu cannot be had for this model: {missing}")
    if case.kernels.attention == "tpu":
        _check_tables(budget.shapes, budget.max_model_len)
    if not budget.fits:
        raise ConfigError(_refusal(case, budget))
    pool = budget.shapes.pool
    if (most := _addressable(case, pool, pool.num_blocks)) < pool.num_blocks:
        raise ConfigError(
            f"num_blocks={pool.num_blocks} cannot be had with kv_cache_dtype={config.kv_cache_dtype}: "
            f"attention=gpu reads up to {most} blocks of 8 bits, or more than twice as many"
        )
    if pool.num_blocks == _addressable(case, pool, room := budget.room // budget.block) < room:
        size = gib(room * budget.block - budget.pool)
        log.warning("%s stay free: attention=gpu reads no more than 2 GiB of 8-bit KV in a layer", size)
    return budget


def _check_tables(shapes: Shapes, length: int) -> None:
    """Raises ConfigError where the block tables of a step are too large for a TPU's kernel."""
    seqs, size = shapes.max_num_seqs, shapes.pool.block_size
    need = tpu.table_bytes(seqs, shapes.table_width)
    if need > tpu.TABLE_BYTES:
        larger = tpu.default_block_size(seqs, length)
        does = tpu.table_bytes(seqs, -(-length // larger)) <= tpu.TABLE_BYTES
        raise ConfigError(
            f"attention=tpu cannot be had: in blocks of {size} tokens the block tables of {seqs} sequences "
            f"of {length} tokens take {gib(need)}, and a TPU has {gib(tpu.TABLE_BYTES)} for them; it would "
            f"with {f'block_size={larger}, ' if does else ''}a smaller max_num_seqs or max_model_len, "
            f"and attention=xla has no such limit"
        )


def _budget(case: Case, memory: Memory) -> Budget:
    config, dims, platform = case.config, case.dims, memory.platform
    length = _max_model_len(config, dims)
    seqs = config.max_num_seqs or platform.max_num_seqs
    tokens = max(config.max_num_batched_tokens or platform.max_num_batched_tokens, seqs)
    size = config.block_size or _block_size(case.kernels, platform, seqs, length)
    width = -(-length // size)
    heads = len(dims.heads(case.shards).kv)
    number = kv_type(config.kv_cache_dtype, case.dtype)
    pool = PoolShape(0, heads, size, dims.head_dim, number, platform.kv_as_bits)
    pool = pool_shape(pool, case.kernels.attention, case.shards)
    shapes = Shapes(seqs, tokens, width, dims.vocab_size, dims.num_hidden_layers, pool)
    budget = Budget(
        shapes,
        length,
        memory,
        weights=case.weights,
        state=4 * (seqs + 1) * (width + 8) + Shaping.bytes(seqs, dims.vocab_size),
        temporaries=temporaries(case, shapes, memory),
        autotuning=_autotuning(case, shapes) if platform is GPU else 0,
        runtime=_runtime(case, shapes, memory),
        block=pool.block_bytes // case.shards * dims.num_hidden_layers,
    )
    count = config.num_blocks or _addressable(case, pool, _count(budget, config, seqs * width))
    return budget._replace(shapes=shapes._replace(pool=pool._replace(num_blocks=count)))


def _addressable(case: Case, pool: PoolShape, count: int) -> int:
    """Of so many blocks on a device, those that its attention can read."""
    if case.kernels.attention != "gpu" or not pool.scaled:
        return count
    return gpu.addressable(count, math.prod(pool.shape[1:]) // case.shards)


def _block_size(kernels: Kernels, platform: Platform, seqs: int, length: int) -> int:
    """The default."""
    return tpu.default_block_size(seqs, length) if kernels.attention == "tpu" else platform.block_size


def _count(budget: Budget, config: EngineConfig, most: int) -> int:
    """Blocks that there is room for, the dummy included; `most` is what all sequences at full length need."""
    room = budget.room
    if budget.memory.platform is CPU:
        mesh = parse_mesh(config.mesh)
        room = min(room, CPU_POOL_BYTES // (mesh.tensor * mesh.data))
    count = max(0, min(room // budget.block, most + 1))
    return count // GRID * GRID if GRID < count <= most else count


def temporaries(case: Case, shapes: Shapes, memory: Memory) -> int:
    """Bytes that the largest step takes on a device beside weights, pool and slots.

    A forward pass holds each token's hidden state and either the gated MLP's three widths in float32 (in 8
    bits, its sums and the step's hidden states too; the C++ product writes one, between its input and
    output), or what attention needs. Rounded products are half as large, but XLA keeps several of them, to
    add them up in the next sum. Choosing tokens holds the logits six times (in XLA seven times), the model's
    own and the next step's among them; scoring those of some rows as often, and a step's hidden states.
    A bound that tests/engine/test_memory.py holds against what the compiler says.
    """
    (tokens, rows), dims, shards = max(ladder(shapes, 1)), case.dims, case.shards
    rows = max(rows, shapes.max_num_seqs)
    logits = 4 * rows * padded(shapes.vocab, 128)
    gathered = logits + logits // shards if shards > 1 else 0
    width = padded(dims.intermediate_size, shards) // shards
    result = 2 if case.kernels.rounded else 4
    gated = dims.gated and dims.hidden_act in GATES and not dims.mlp_bias and width % OUTS == 0
    if case.kernels.matmul == "cpu" and gated:
        mlp = 4 * tokens * (width + 2 * dims.hidden_size)
    else:
        # sums of 8 bits are integers of 32 before they are floats
        in_8_bits = tokens * (width * (14 if case.kernels.rounded else 16) + 4 * dims.hidden_size)
        mlp = in_8_bits if case.config.quantization else 3 * tokens * width * result
    layer = max(mlp, _attention(case, shapes, tokens, rows, memory))
    tables = 2 * 4 * rows * shapes.table_width
    hidden = tokens * dims.hidden_size * (ROUNDED_HIDDEN[memory.platform] if case.kernels.rounded else 4)
    forward: int = hidden + layer + tables + logits + gathered
    workspace = {GPU: GPU_WORKSPACE, TPU: forward // 20}.get(memory.platform, 0)
    kept = 7 if case.kernels.sampler == "xla" else 6
    states = 4 * tokens * (dims.hidden_size + SCORE_WIDTH)
    scored: int = states + kept * 4 * SCORED * padded(shapes.vocab, 128)
    return max(forward + forward // 50 + workspace, kept * logits + logits // 16, scored) + MIB


def _attention(case: Case, shapes: Shapes, tokens: int, rows: int, memory: Memory) -> int:
    """Bytes: queries, keys and values before and after rotation, and what their implementation adds."""
    layout: HeadLayout = case.dims.heads(case.shards)
    dim: int = case.dims.head_dim
    heads = layout.q.size // case.shards
    q, kv = heads * dim, len(layout.kv) // case.shards * dim
    wanted = case.config.attention
    size = 4 if wanted == "cpu" else case.dtype.itemsize
    result = 2 if case.kernels.rounded else 4
    own = tokens * (result * (q + 2 * kv) + size * (2 * q + kv))
    if wanted == "mosaic":  # queries and outputs in tiles
        tiles = tokens // mosaic.per_tile(layout.q.shape[1]) + rows
        return own + 2 * size * tiles * mosaic.WARPGROUPS * mosaic.ROWS * kv
    if wanted == "cpu" or (memory.platform is GPU and wanted != "xla"):
        return own
    if case.kernels.attention == "tpu":  # heads as the pool has them
        pool = shapes.pool
        places = pool.kv_heads // case.shards * pool.head_dim
        return int(own + size * tokens * (2 * places + 2 * places * layout.q.shape[1]))
    if wanted == "reference":  # gathers the whole context of every token
        return own + 4 * tokens * shapes.table_width * shapes.pool.block_size * (2 * kv + 2 * q + heads)
    chunk = max(CHUNK, shapes.pool.block_size)
    singles = 8 * (rows if rows < 2 * GROUP else GROUP) * chunk * kv
    tiles = 12 * TILE * chunk * heads + 16 * chunk * kv
    return own + 8 * tokens * q + max(singles, tiles)


def _autotuning(case: Case, shapes: Shapes) -> int:
    """The largest product's operands, and two results to compare."""
    dims, shards = case.dims, case.shards
    tokens, rows = max(ladder(shapes, 1))
    wide, vocab = padded(dims.intermediate_size, shards) // shards, padded(shapes.vocab, shards) // shards
    products = [(tokens, dims.hidden_size, 2 * wide), (rows, dims.hidden_size, vocab)]
    size: int = max(case.dtype.itemsize * (n * i + i * o) + 8 * n * o for n, i, o in products)
    return size


def _runtime(case: Case, shapes: Shapes, memory: Memory) -> int:
    """Programs are small on a GPU; what a layer takes on a TPU is measured with its compiler."""
    if memory.platform is GPU:
        return 0
    buckets = ladder(shapes, memory.platform.smallest_decode)
    samples = len({bucket.seqs for bucket in buckets}) * (len(VARIANTS) + len(SHAPES))
    samples += sum(bucket.mixed for bucket in buckets)
    if memory.platform is TPU:
        mixed, decode = TPU_LAYER["tpu" if case.kernels.attention == "tpu" else "xla"]
        layers = sum(mixed if bucket.tokens > bucket.seqs else decode for bucket in buckets) * shapes.layers
        return layers + 2 * samples * SAMPLE_BYTES
    mesh = parse_mesh(case.config.mesh)
    layer = FORWARD_BYTES["native" if _native(case.config) else "xla"]
    programs = len(buckets) * shapes.layers * layer + samples * SAMPLE_BYTES
    return (PROCESS_BYTES[CPU] + programs) // (mesh.tensor * mesh.data)


def _native(config: EngineConfig) -> bool:
    """Whether attention is likely to be the C++ kernel."""
    with contextlib.suppress(native.NativeError):
        wanted = config.attention in ("auto", "cpu") and config.kv_cache_dtype == "auto"
        return wanted and bool(native.compiler())
    return False


def process_bytes(config: EngineConfig, model: LoadedModel, budget: Budget, stored: int) -> int:
    """Most host memory that the process of an engine ever has; its checkpoint's files hold `stored` bytes.

    Files are mapped, and a parameter is made ready at a time, until the weights are on their devices.
    """
    platform, mesh = budget.memory.platform, parse_mesh(config.mesh)
    largest: int = max(math.prod(weight.shape) for weight in model.abstract) * 4
    loading = PROCESS_BYTES[platform] + stored + largest
    if platform is not CPU:
        return loading
    count = mesh.tensor * mesh.data
    return max(loading + count * budget.weights, count * (budget.beside + budget.pool))


def _max_model_len(config: EngineConfig, dims: Any) -> int:
    length: int = config.max_model_len or dims.max_position_embeddings
    if length > dims.longest:
        reach = f"this model's positions reach {dims.longest} tokens"
        raise ConfigError(f"max_model_len is {length}, and {reach}")
    return length


def _refusal(case: Case, budget: Budget) -> str:
    """The arithmetic of what does not fit, and what would."""
    memory, asked = budget.memory, max(case.config.num_blocks or 2, 2)
    pool = asked * budget.block
    names = ("weights", "state", "temporaries", "autotuning", "runtime")
    parts = [f"{name} {gib(size)}" for name in names if (size := getattr(budget, name))]
    parts.append(f"KV pool {gib(pool)} ({asked} blocks of {gib(budget.block)})")
    used = f", {gib(memory.used)} of them in use" if memory.used else ""
    each = "on each device " if parse_mesh(case.config.mesh).tensor > 1 else ""
    need = gib(budget.beside + pool)
    what = ", or ".join(_remedies(case, budget)) or f"{need} of memory: no one option is enough"
    return (
        f"{case.config.model} does not fit: {' + '.join(parts)} = {need} {each}"
        f"and there are {gib(memory.limit)} ({memory.about}){used}; it would with {what}"
    )


def _remedies(case: Case, budget: Budget) -> Iterator[str]:
    """Changes of one option that make it fit, each as little as possible."""
    if case.dtype.itemsize == 4 and not case.config.quantization:
        kernels = case.kernels._replace(rounded=budget.memory.platform is not CPU)
        half = case._replace(dtype=jnp.dtype(jnp.bfloat16), weights=case.weights // 2, kernels=kernels)
        if _budget(half, budget.memory).fits:
            yield "dtype=bfloat16"
    count = _addressable(case, budget.shapes.pool, budget.room // budget.block)
    if case.config.num_blocks and count >= 2:
        yield f"num_blocks={count}"
    sizes = {
        "max_num_batched_tokens": budget.shapes.max_num_batched_tokens,
        "max_num_seqs": budget.shapes.max_num_seqs,
        "max_model_len": budget.max_model_len,
    }
    for name, value in sizes.items():
        while (value := value // 2) >= 1:
            changed = msgspec.structs.replace(case.config, **{name: value})
            if _budget(case._replace(config=changed), budget.memory).fits:
                yield f"{name}={value}"
                break
    mesh = parse_mesh(case.config.mesh)
    shards = mesh.tensor * 2
    while budget.memory.platform is not CPU and shards <= LARGEST_MESH:
        changed = msgspec.structs.replace(case.config, mesh=f"{shards}x{mesh.data}")
        weights = -(-case.weights * case.shards // shards)
        if _budget(case._replace(config=changed, shards=shards, weights=weights), budget.memory).fits:
            yield f"mesh={changed.mesh}"
            break
        shards *= 2
