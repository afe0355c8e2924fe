"""What an engine takes and holds: one that does not exist yet, or one that runs."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import msgspec

from jaxserve.config import EngineConfig
from jaxserve.engine import compilation
from jaxserve.engine.batch import Bucket
from jaxserve.engine.devices import gib, make_mesh, memory_of, weight_type
from jaxserve.engine.kernels import check_device, choose_kernels, kernels_for
from jaxserve.engine.memory import Budget, fit, process_bytes
from jaxserve.engine.model import LoadedModel
from jaxserve.engine.programs import SHAPES, VARIANTS, Programs, ladder
from jaxserve.engine.topology import abstract_mesh, chip, compiler_mesh, memory_of_chip
from jaxserve.errors import ConfigError
from jaxserve.loading.checkpoint import read_config
from jaxserve.loading.hub import pull_config

log = logging.getLogger(__name__)

LENGTHS = (1024, 4096, 32768)
"""Tokens of the sequences that a plan counts."""


class Sequences(msgspec.Struct):
    """How many sequences of one length there can be."""

    tokens: int
    in_pool: int
    """As many as the KV pool holds."""
    at_once: int
    """As many as run in one step: at most max_num_seqs, and none longer than max_model_len."""


class Plan(msgspec.Struct, kw_only=True):
    """One replica of an engine. Sizes are in bytes and, where nothing else is said, of one device."""

    model: str
    device: str
    mesh: str
    dtype: str
    kv_cache_dtype: str
    memory: int
    """What may be in use."""
    memory_from: str
    memory_used: int
    """What others used when it was measured."""
    weights: int
    weights_in_all: int
    """On all devices of the replica."""
    state: int
    """Block tables and sampling parameters."""
    temporaries: int
    """Of the program that takes most; `reserved` is kept free for it."""
    temporaries_from: str
    reserved: int
    autotuning: int
    """Kept free on a GPU for its compiler to try products out. What it then chooses is in no plan."""
    runtime: int
    """Compiled programs and, where the device's memory is the host's, the process."""
    block_size: int
    """Tokens."""
    block_bytes: int
    """In all layers."""
    num_blocks: int
    """One of them is the dummy that padding writes to."""
    pool: int
    pool_tokens: int
    left: int
    """Bytes that nothing will use."""
    host: int
    """Most memory that the process ever has."""
    max_model_len: int
    max_request_tokens: int
    """No more than the pool holds."""
    max_num_seqs: int
    max_num_batched_tokens: int
    sequences: list[Sequences]
    programs: list[str]


class Temporaries(NamedTuple):
    """What programs take while they run, and who says so."""

    bytes: int
    source: str


def make_plan(config: EngineConfig, device: str | None = None) -> Plan:
    """The plan of an engine that does not exist, from its model's config alone: no weight is read.

    For this machine's devices or, with `device`, for a kind that need not be here (`topology.CHIPS`).
    Programs are compiled, those that take most memory, where a compiler for the device is here.

    Raises ConfigError with the arithmetic when it does not fit, before anything is compiled.
    """
    place = pull_config(config.model)
    raw = read_config(place)
    there = None if device is None else chip(device)
    mesh: Any = make_mesh(config, 0) if there is None else abstract_mesh(config)
    memory = memory_of(config, mesh.devices.flat[0]) if there is None else memory_of_chip(config, there)
    dtype = weight_type(config.dtype, raw, memory.platform)
    if there:
        kernels = kernels_for(config, there.platform, dtype)
        check_device(config, kernels, there.name, there.compute_capability)
    else:
        kernels = choose_kernels(config, mesh, dtype)
    model = LoadedModel(raw, mesh, dtype, kernels, config.quantization)
    budget = fit(config, model, memory)
    buckets = ladder(budget.shapes, memory.platform.smallest_decode)
    if there is None:
        programs = _compile(config, model, budget)
        buckets, found = programs.buckets, measured(programs)
    else:
        try:
            mesh = compiler_mesh(config, there)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                chosen = choose_kernels(config, mesh, dtype)
                compiled = LoadedModel(raw, mesh, dtype, chosen, config.quantization)
                found = measured(_compile(config, compiled, budget))
        except ConfigError:
            raise
        except Exception as error:  # jax's, its plugins' and libtpu's own: all mean that there is none
            log.debug("no compiler for %s", there.name, exc_info=error)
            why = next(iter(str(error).splitlines()), type(error).__name__)
            source = f"an estimate: to compile for it takes {there.packages} ({why})"
            found = Temporaries(budget.temporaries, source)
    plan = describe(config, model, budget, _names(buckets), found, _size(place))
    if (short := plan.temporaries - plan.reserved - plan.left) > 0:
        blocks = plan.num_blocks - -(-short // plan.block_bytes)
        what = f"num_blocks={blocks}" if blocks >= 2 else "a smaller max_num_seqs or max_num_batched_tokens"
        raise ConfigError(
            f"{config.model} does not fit: a program takes {gib(found.bytes)} ({found.source}), and beside "
            f"the KV pool {gib(plan.reserved + plan.left)} are left; it would with {what}"
        )
    return plan


def measured(programs: Programs) -> Temporaries:
    """The largest of the programs that are compiled, by the compiler's own analysis."""
    found = programs.temporaries()
    name = max(found, key=lambda name: found[name])
    return Temporaries(found[name], f"the compiler: {name}")


def plan_of(config: EngineConfig, model: LoadedModel, budget: Budget, programs: Programs) -> Plan:
    """The plan of an engine that runs, with what is known of the programs that are compiled."""
    names = ["admit", "enter", *programs.temporaries()]
    return describe(config, model, budget, names, measured(programs), _size(Path(config.model)))


def describe(
    config: EngineConfig,
    model: LoadedModel,
    budget: Budget,
    programs: list[str],
    temporaries: Temporaries,
    stored: int,
) -> Plan:
    """A budget in words; `stored` is the size of the checkpoint's files."""
    shapes, memory, pool = budget.shapes, budget.memory, budget.shapes.pool
    capacity = pool.num_blocks - 1
    return Plan(
        model=config.model,
        device=memory.device,
        mesh=config.mesh,
        dtype=model.dtype.name,
        kv_cache_dtype=pool.dtype.name,
        memory=memory.limit,
        memory_from=memory.about,
        memory_used=memory.used,
        weights=budget.weights,
        weights_in_all=budget.weights * model.shards,
        state=budget.state,
        temporaries=temporaries.bytes,
        temporaries_from=temporaries.source,
        reserved=budget.temporaries,
        autotuning=budget.autotuning,
        runtime=budget.runtime,
        block_size=pool.block_size,
        block_bytes=budget.block,
        num_blocks=pool.num_blocks,
        pool=budget.pool,
        pool_tokens=capacity * pool.block_size,
        left=budget.room - budget.pool,
        host=process_bytes(config, model, budget, stored or budget.weights * model.shards),
        max_model_len=budget.max_model_len,
        max_request_tokens=budget.max_request_tokens,
        max_num_seqs=shapes.max_num_seqs,
        max_num_batched_tokens=shapes.max_num_batched_tokens,
        sequences=[_sequences(tokens, budget) for tokens in LENGTHS],
        programs=programs,
    )


def _names(buckets: Sequence[Bucket]) -> list[str]:
    """All programs of a ladder."""
    rows = sorted({bucket.seqs for bucket in buckets})
    samples = [f"sample[{n}] {variant}" for n in rows for variant in VARIANTS]
    shapes = [f"shape[{n}] {variant}" for n in rows for variant in SHAPES]
    scores = [f"score[{bucket.tokens}]" for bucket in sorted(buckets) if bucket.mixed]
    return ["admit", "enter", *(bucket.name for bucket in sorted(buckets)), *shapes, *samples, *scores]


def _sequences(tokens: int, budget: Budget) -> Sequences:
    shapes = budget.shapes
    in_pool = (shapes.pool.num_blocks - 1) // -(-tokens // shapes.pool.block_size)
    at_once = min(in_pool, shapes.max_num_seqs) if tokens <= budget.max_model_len else 0
    return Sequences(tokens, in_pool, at_once)


def _compile(config: EngineConfig, model: LoadedModel, budget: Budget) -> Programs:
    smallest = model.kernels.smallest_decode(budget.memory.platform)
    programs = Programs(model, budget.shapes, smallest, compilation.Counts(), config.deterministic)
    programs.compile_largest()
    return programs


def _size(place: Path) -> int:
    """Bytes of a model's files; 0 where only its config is here."""
    if place.suffix == ".gguf":
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))
